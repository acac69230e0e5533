"""Batches of training images: made by Ray Data while a GPU is at work, else between the steps.

Which images a step has, and how each is varied, follows from the seed and the number of the step alone: not
from the number of workers, nor from where a training was interrupted. A worker's share of a step is a row.
Shape suffixes: B a worker's share of a batch, H, W height and width, C channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data
from ray.data import TaskPoolStrategy

from pipeline.back_pressure import bound_queues
from pipeline.finetune.augment import Augmentation, Pixels
from pipeline.finetune.sample_set import SampleSet
from pipeline.finetune.together import Share

LOT_STEPS = 1000  # that one data set plans
AHEAD = 2  # batches that lie ready, beside those in the making
LOAD_CPUS = 0.3  # as Ray counts them: a worker that trains must find room beside the tasks
_RETRIES = 3
Each = Callable[..., Iterable[Pixels]]
"""Runs a function for each of some values, as `map` does."""


@dataclass(frozen=True)
class Order:
    """The endless stream of training images: one permutation of them after the other, by seed."""

    num_samples: int
    batch_size: int
    seed: int
    _permutations: dict[int, npt.NDArray[np.int64]] = field(default_factory=dict, compare=False, repr=False)

    def positions(self, step: int, share: slice) -> npt.NDArray[np.int64]:
        """The places in the stream of one worker's share of a step."""
        first = step * self.batch_size
        return np.arange(first, first + self.batch_size)[share]

    def sample(self, position: int) -> int:
        """The number of the sample at a place of the stream."""
        epoch, place = divmod(position, self.num_samples)
        if epoch not in self._permutations:
            while len(self._permutations) > 1:  # a batch may lie across two epochs
                del self._permutations[min(self._permutations)]
            rng = np.random.default_rng((self.seed, epoch))
            self._permutations[epoch] = rng.permutation(self.num_samples)
        return int(self._permutations[epoch][place])


class Batch(NamedTuple):
    """A worker's share of a step."""

    step: int
    pixels_BHWC: Pixels
    labels_B: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Loader:
    """Loads the shares of steps; travels to Ray's tasks."""

    samples: SampleSet
    augment: Augmentation
    order: Order
    share: Share

    def load(self, step: int, size: int, each: Each = map) -> Batch:
        """One worker's share of a step; `each` may be another map, of threads."""
        places = self.order.positions(step, self.share.of(self.order.batch_size)).tolist()
        numbers = [self.order.sample(place) for place in places]

        def image(place: int, number: int) -> Pixels:
            rng = np.random.default_rng((self.order.seed, place, 1))
            return self.augment(self.samples.data(number), size, rng)

        return Batch(step, np.stack(list(each(image, places, numbers))), self.samples.labels[numbers])


def between_steps(
    loader: Loader, steps: Iterator[tuple[int, int]], num_threads: int
) -> Generator[Batch, None, None]:
    """The shares of these (step, size), each made when it is asked for.

    For a network that computes on the CPU. Its threads wait for each other thousands of times a step, so
    that tasks beside it hold up all of them: on two cores `stream` costs three images of ten a second.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        for step, size in steps:
            yield loader.load(step, size, pool.map)


_loaders: dict[Any, Loader] = {}


def _loader(reference: Any) -> Loader:
    """The loader of a reference, fetched once a process, with its files mapped."""
    if reference not in _loaders:
        _loaders.clear()
        _loaders[reference] = ray.get(reference)
    return _loaders[reference]


def stream(loader: Loader, steps: Iterator[tuple[int, int]], cores: float) -> Generator[Batch, None, None]:
    """The shares of these (step, size), in their order, made a little ahead by tasks on up to `cores`.

    For a network that computes on a GPU.
    """
    reference = ray.put(loader)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = context.target_min_block_size = 1
    bound_queues(context, AHEAD)
    while lot := [{"step": step, "size": size} for step, size in itertools.islice(steps, LOT_STEPS)]:
        dataset = ray.data.from_items(lot, override_num_blocks=len(lot)).map_batches(
            load_step,
            fn_args=(reference,),
            compute=TaskPoolStrategy(size=max(1, int(cores))),
            num_cpus=LOAD_CPUS,
            max_retries=_RETRIES,
            batch_size=1,
            batch_format="pyarrow",
        )
        for table in dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=AHEAD):
            yield _unpack(table)


def load_step(batch: pa.Table, reference: Any) -> pa.Table:
    """A Ray task: a row with a step, to the row with its images."""
    (row,) = batch.to_pylist()
    made = _loader(reference).load(row["step"], row["size"])
    cells = {"pixels": made.pixels_BHWC.tobytes(), "labels": made.labels_B.tobytes()}
    columns = {name: pa.array([cell], pa.large_binary()) for name, cell in cells.items()}
    return pa.table({"step": [row["step"]], "size": [row["size"]], **columns})


def _unpack(table: pa.Table) -> Batch:
    """A row of `load_step` as arrays, without a copy."""
    step, size = table.column("step")[0].as_py(), table.column("size")[0].as_py()
    pixels = np.frombuffer(table.column("pixels")[0].as_buffer(), np.uint8).reshape(-1, size, size, 3)
    labels = np.frombuffer(table.column("labels")[0].as_buffer(), np.int32)
    return Batch(step, pixels, labels)
