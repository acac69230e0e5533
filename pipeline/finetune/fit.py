"""Ray Train around the training: workers that die are started again, and go on from the newest state.

What no new start mends, an error of ours, is told to the driver, and ends it.
Enters: a Job. Leaves: a finished training in the output, or a training that a signal stopped. What the
workers do is in training.py; here is how they are placed, told to stop, and heard of.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.exceptions import RayTaskError
from ray.train.torch import TorchTrainer, get_device

from pipeline.cluster import DEATHS
from pipeline.errors import ConfigError, PipelineError, WorkersDiedError
from pipeline.finetune.batches import between_steps, stream
from pipeline.finetune.together import Share
from pipeline.finetune.training import Command, Job, Training
from pipeline.stop import Stop

WORKER_CPUS = 0.2  # as Ray counts them; a worker takes the threads that it is given
TELL_EVERY_S = 0.5
_ASK_S = 0.2
_STOP_S = 7.0  # for workers to end, their state written; after a signal the process has 8 (stop.py)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Where workers run."""

    num_workers: int
    on_gpu: bool
    num_threads: int  # of a worker
    cores: float  # that decode for a worker


class Board:
    """An actor on which the first worker writes how it stands, and reads whether it shall stop.

    Any worker writes on it what no new start would mend: only the first such error is kept.
    """

    def __init__(self) -> None:
        self._stop = False
        self._told: dict[str, Any] = {}
        self._error: PipelineError | None = None

    def tell(self, values: dict[str, Any]) -> bool:
        self._told = values
        return self._stop

    def fail(self, error: PipelineError) -> None:
        self._error = self._error or error

    def read(self) -> tuple[dict[str, Any], PipelineError | None]:
        return self._told, self._error

    def stop(self) -> None:
        self._stop = True


def fit(job: Job, placement: Placement, stop: Stop, on_told: Callable[[dict[str, Any]], None]) -> None:
    """Train to the end. Raises Interrupted where a signal came first, the state being written."""
    board = ray.remote(num_cpus=0)(Board).remote()
    failures: list[BaseException] = []
    with tempfile.TemporaryDirectory(prefix="cvt-pipeline-") as folder:
        trainer = TorchTrainer(
            _work,
            train_loop_config={"job": job, "placement": placement, "board": board},
            scaling_config=ray.train.ScalingConfig(
                num_workers=placement.num_workers,
                use_gpu=placement.on_gpu,
                resources_per_worker={"CPU": WORKER_CPUS, **({"GPU": 1} if placement.on_gpu else {})},
                placement_strategy="PACK" if placement.on_gpu else "SPREAD",
            ),
            run_config=ray.train.RunConfig(
                storage_path=folder,
                failure_config=ray.train.FailureConfig(max_failures=job.config.compute.max_failures),
            ),
        )
        thread = threading.Thread(target=_fit, args=(trainer, failures), name="fit", daemon=True)
        thread.start()
        patience = None
        while thread.is_alive():
            thread.join(_ASK_S)
            told, error = ray.get(board.read.remote())
            on_told(told)
            if (stop.signum is not None or error is not None) and patience is None:
                board.stop.remote()
                patience = time.monotonic() + _STOP_S
            if patience is not None and time.monotonic() > patience:
                break
    stop.check()
    told, error = ray.get(board.read.remote())
    if error is not None:
        raise error
    for failure in failures:
        raise in_words(failure, job) from failure
    on_told(told)


def _fit(trainer: TorchTrainer, failures: list[BaseException]) -> None:
    try:
        trainer.fit()
    except BaseException as error:  # handed to the caller, who raises it
        failures.append(error)


def in_words(error: BaseException, job: Job) -> BaseException:
    """Ours as it was raised in the worker; deaths and want of memory in words; else what Ray says."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, PipelineError):
            return cause
        if isinstance(cause, torch.OutOfMemoryError):
            train = job.config.train
            return ConfigError(
                f"train.accumulate: {train.batch_size} images in {train.accumulate} parts do not fit into "
                f"the GPU's memory; choose more parts, which only BatchNorm's statistics see ({cause})"
            )
    deaths = [cause for cause in causes if isinstance(cause, DEATHS)]
    if deaths:
        return WorkersDiedError(job.config.compute.max_failures + 1, deaths[0], "train.batch_size less")
    return error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error of Ray Train's, and all that it wraps."""
    yield error
    names = ("controller_failure", "health_check_failure", "cause", "__cause__")
    wrapped = [getattr(error, name, None) for name in names]
    wrapped += getattr(error, "worker_failures", {}).values()
    for cause in wrapped:
        if isinstance(cause, BaseException):
            yield from _causes(cause)


def _work(settings: dict[str, Any]) -> None:
    """What a worker does. An error of ours does not leave it: Ray Train would start it anew."""
    try:
        _train(settings)
    except PipelineError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error  # without the task's traceback
        ray.get(settings["board"].fail.remote(cause))


def _train(settings: dict[str, Any]) -> None:
    job, placement, board = settings["job"], settings["placement"], settings["board"]
    context = ray.train.get_context()
    share = Share(context.get_world_rank(), context.get_world_size())
    torch.set_num_threads(placement.num_threads)
    training = Training(job, share, get_device() if placement.on_gpu else torch.device("cpu"))
    loader, steps = job.loader(share), training.steps()
    if placement.on_gpu:
        batches = stream(loader, steps, placement.cores)
    else:
        batches = between_steps(loader, steps, placement.num_threads)
    with contextlib.closing(batches):
        training.run(batches, _Orders(job, share, board))


class _Orders:
    """What is to be done after a step: the first worker decides for all."""

    def __init__(self, job: Job, share: Share, board: Any) -> None:
        self._job, self._share, self._board = job, share, board
        self._saved = time.monotonic()
        self._told = 0.0
        self._answer: Any = None
        self._stop = False
        # Beside the group of the gradients, which may be the GPUs' own.
        self._group = dist.new_group(backend="gloo") if share.num_workers > 1 else None

    def __call__(self, training: Training) -> Command:
        command = torch.zeros(1, dtype=torch.int64)
        if self._share.rank == 0:
            self._tell(training)
            command[0] = self._decide()
        if self._group is not None:
            dist.broadcast(command, 0, group=self._group)
        found: tuple[Command, ...] = ("go", "save", "stop")
        return found[int(command)]

    def _decide(self) -> int:
        if self._stop:
            return 2
        if time.monotonic() - self._saved < self._job.config.compute.checkpoint_every_s:
            return 0
        self._saved = time.monotonic()
        return 1

    def _tell(self, training: Training) -> None:
        """Tell the driver how it stands, without waiting for its answer."""
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._stop = self._stop or ray.get(self._answer)
            self._answer = None
        now = time.monotonic()
        if self._answer is None and now - self._told > TELL_EVERY_S:
            self._told = now
            self._answer = self._board.tell.remote(training.status())
