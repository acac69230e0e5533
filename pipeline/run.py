"""The Ray Data graph, and the loop over its receipts: the only module that runs Ray Data.

read (a task a shard) -> decode (a task a chunk) -> embed (an actor pool) -> write parts -> receipts to the
driver. Ray moves the rows; commits tell the truth: when every chunk of a shard has its receipt, its parts
are assembled and its commit is created. Memory stays bounded by waves of shards and back-pressure.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import ray
import ray.data
from ray.data import ActorPoolStrategy, TaskPoolStrategy
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from pipeline.back_pressure import bound_queues
from pipeline.cluster import DEATHS
from pipeline.commits import DataFile
from pipeline.decode import DecodeOptions, decode_chunk
from pipeline.errors import PipelineError, WorkersDiedError
from pipeline.parts import assemble, write_chunk
from pipeline.prepare import Prepared
from pipeline.resources import ACTOR_CPUS, DECODE_CPUS, READ_CPUS, WRITE_CPUS, Resources
from pipeline.samples import ReadOptions
from pipeline.shards import Work
from pipeline.stages import Embed, read_work
from pipeline.storage import storage_failures

WAVE_SHARDS = 2000
WAVE_BYTES = 64 * 2**20  # of shard descriptions; groups of loose images list their members
_END_S = 4.0  # for an execution to end that is left before its time
_RETRIES = 5  # of work whose worker died; beyond that the shard is looked for that ends them
_BATCH = {"batch_size": 1, "batch_format": "pyarrow"}  # one row is one chunk

Files = tuple[DataFile, DataFile | None, dict[str, int]]
"""A shard's file of embeddings, its file of rejects, and the rejects by reason."""


class Extraction:
    """The graph of a prepared run: its receipts as they come, and the assembly of finished shards."""

    def __init__(
        self, prepared: Prepared, run: str, resources: Resources, *, verbose: bool = False
    ) -> None:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = verbose
        context.raise_original_map_exception = True
        context.print_on_execution_start = verbose
        context.target_max_block_size = context.target_min_block_size = 1  # a block a chunk
        bound_queues(context, resources.most_waiting)
        self.resources = resources
        self._prepared, self._run = prepared, run
        self._assembling: dict[Any, Work] = {}
        self._begun = False
        self._assemble = ray.remote(num_cpus=0, max_retries=3)(assemble)

    def waves(self, work: Iterable[Work]) -> Iterator[list[Work]]:
        """Shards in lots that one data set can plan: bounded in number and in bytes of description."""
        wave: list[Work] = []
        size = 0
        for item in work:
            if wave and (len(wave) >= WAVE_SHARDS or size + item.size_of_json > WAVE_BYTES):
                yield wave
                wave, size = [], 0
            wave.append(item)
            size += item.size_of_json
        if wave:
            yield wave

    def receipts(self, wave: list[Work]) -> Generator[dict[str, Any] | None, None, None]:
        """RECEIPTS rows of a wave; None about ten times a second, so that the caller can look around.

        To be closed where it is left before its end: that ends what the wave has under way.
        Raises WorkersDiedError where Ray has given up on some of its work.
        """
        manifest, metadata = self._prepared.manifest, list(self._prepared.metadata)
        ready = (manifest.attach(item, metadata) if manifest else item for item in wave)
        yield from _pump(self._dataset([item.to_json() for item in ready]))

    def assemble(self, work: Work) -> None:
        """Begin to put a shard's parts in place; `assembled` tells when that is done."""
        prepared = self._prepared
        ref = self._assemble.remote(prepared.output, self._run, work, prepared.embeddings_schema)
        self._assembling[ref] = work

    def assembled(self, *, wait: bool) -> Iterator[tuple[Work, Files] | None]:
        """Shards whose files are in place by now; where `wait` is set all that were begun, with a
        None about ten times a second between them."""
        while self._assembling:
            ready, _ = ray.wait(list(self._assembling), timeout=0.1 if wait else 0)
            for ref in ready:
                with _translated():
                    files = ray.get(ref)
                yield self._assembling.pop(ref), files
            if not ready:
                if not wait:
                    return
                yield None

    def _items(self, wave: list[str]) -> list[dict[str, Any]]:
        """What the readers get: the shards that begin a run have a small first chunk, done soon."""
        beginning = 0 if self._begun else self.resources.readers
        self._begun = True
        first, whole = self.resources.first_images, self.resources.chunk_images
        return [
            {"spec": spec, "first_images": first if number < beginning else whole}
            for number, spec in enumerate(wave)
        ]

    def _dataset(self, wave: list[str]) -> Any:
        prepared, resources = self._prepared, self.resources
        config, checkpoint = prepared.config, prepared.checkpoint
        read = ReadOptions(
            chunk_images=resources.chunk_images,
            max_image_bytes=config.limits.max_image_bytes,
            metadata=prepared.metadata,
            image_column=config.input.image_column,
            id_column=config.input.id_column,
            storage_options=prepared.listing.root.options,
        )
        store_bytes = min(resources.store_bytes, ray.cluster_resources().get("object_store_memory", 0) / 2)
        context = ray.data.DataContext.get_current()
        context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
            object_store_memory=store_bytes
        )
        limits = config.limits
        decode = DecodeOptions(limits.max_pixels, limits.image_timeout_s, config.input.decode == "fast")
        embed = {
            "checkpoint": checkpoint.source,
            "weights_sha256": checkpoint.weights_sha256,
            "precision": prepared.fingerprint.precision,
            "backend": config.model.backend,
            "batch_size": config.compute.batch_size,
            "embedding": config.model.embedding,
            "logits": config.output.logits,
            "dtype": config.output.dtype,
            "num_threads": resources.num_threads,
        }
        return (
            ray.data.from_items(self._items(wave), override_num_blocks=len(wave))
            .map_batches(
                read_work,
                fn_args=(read,),
                compute=TaskPoolStrategy(size=resources.readers),
                num_cpus=READ_CPUS,
                max_retries=_RETRIES,
                **_BATCH,
            )
            .map_batches(
                decode_chunk,
                fn_args=(checkpoint.processor, decode),
                compute=TaskPoolStrategy(size=resources.decoders),
                num_cpus=DECODE_CPUS,
                max_retries=_RETRIES,
                **_BATCH,
            )
            .map_batches(
                Embed,
                fn_constructor_kwargs=embed,
                compute=ActorPoolStrategy(
                    min_size=resources.min_actors,
                    max_size=resources.max_actors,
                    # One call computes while the other unpacks its chunk or packs its results.
                    max_concurrent_calls_per_actor=2,
                    max_tasks_in_flight_per_actor=4,
                    enable_true_multi_threading=True,
                ),
                num_cpus=ACTOR_CPUS,
                num_gpus=resources.actor_gpus,
                label_selector=config.compute.actor_labels or None,
                max_task_retries=_RETRIES,
                **_BATCH,
            )
            .map_batches(
                write_chunk,
                fn_args=(prepared.output, self._run),
                compute=TaskPoolStrategy(size=resources.writers),
                num_cpus=WRITE_CPUS,
                max_retries=_RETRIES,
                **_BATCH,
            )
        )


def _pump(dataset: Any) -> Generator[dict[str, Any] | None, None, None]:
    """The data set's rows, pulled by a thread, so that the caller's signals and clocks go on."""
    rows: queue.Queue[dict[str, Any] | BaseException | None] = queue.Queue()

    def pull() -> None:
        try:
            # Batches would be fetched ahead, which keeps each receipt back until the next one comes.
            for bundle in dataset.iter_internal_ref_bundles():
                for table in ray.get(bundle.block_refs):
                    for row in table.to_pylist():
                        rows.put(row)
                _forget_statistics()
            rows.put(None)
        except BaseException as error:  # handed to the caller, who raises it
            rows.put(error)

    thread = threading.Thread(target=pull, name="receipts", daemon=True)
    thread.start()
    try:
        while True:
            try:
                row = rows.get(timeout=0.1)
            except queue.Empty:
                yield None
                continue
            if row is None:
                return
            with _translated():
                if isinstance(row, BaseException):
                    raise row
            yield row
    finally:
        _end(thread)


def _end(receipts: threading.Thread) -> None:
    """End the execution that a thread still pulls at, and with it the thread.

    Ray's core ends the process at once where a thread speaks to it after `ray.shutdown`.
    """
    patience = time.monotonic() + _END_S
    while receipts.is_alive() and time.monotonic() < patience:
        for executor in _executors():
            executor.shutdown(force=False)
        receipts.join(0.1)


def _forget_statistics() -> None:
    """Drop what Ray Data keeps of every block for its own report: a kilobyte each, in the driver."""
    for executor in _executors():
        for operator in executor._topology or ():
            getattr(operator, "_output_blocks_stats", []).clear()


def _executors() -> list[Any]:
    return [thread for thread in threading.enumerate() if isinstance(thread, StreamingExecutor)]


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """What a task raised, as the driver's error: ours as it is, storage's with the remedy."""
    try:
        yield
    except DEATHS as error:
        if getattr(error, "actor_init_failed", False):  # a bug of ours, or an installation's
            raise
        raise WorkersDiedError(_RETRIES + 1, error) from error
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, PipelineError):
            raise cause from error
        if isinstance(cause, OSError):
            with storage_failures(cause.filename or "the output"):
                raise cause from error
        raise
