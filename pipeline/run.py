"""The Ray Data graph, and the loop over its receipts: the only module of extraction that imports Ray.

read (a task a shard) -> decode (a task a chunk) -> embed (an actor pool) -> write parts -> receipts to the
driver. Ray moves the rows; commits tell the truth: when every chunk of a shard has its receipt, its parts
are assembled and its commit is created. Memory stays bounded by waves of shards and Ray's back-pressure.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # after a stop, threads must not start Ray again

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, TaskPoolStrategy
from ray.util.annotations import RayDeprecationWarning

from pipeline.commits import DataFile
from pipeline.config import ComputeConfig
from pipeline.decode import DecodeOptions, decode_chunk
from pipeline.errors import PipelineError, WorkersDiedError
from pipeline.parts import assemble, write_chunk
from pipeline.prepare import Prepared
from pipeline.readers import read_shard
from pipeline.resources import (
    ACTOR_CPUS,
    DECODE_CPUS,
    READ_CPUS,
    WRITE_CPUS,
    Node,
    Resources,
    share_out,
)
from pipeline.samples import ReadOptions
from pipeline.shards import Work
from pipeline.storage import storage_failures

WAVE_SHARDS = 2000
WAVE_BYTES = 64 * 2**20  # of shard descriptions; groups of loose images list their members
_RETRIES = 5  # of work whose worker died; beyond that the shard is looked for that ends them
_BATCH = {"batch_size": 1, "batch_format": "pyarrow"}  # one row is one chunk

_DEATHS = (
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.RayActorError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.StreamingGeneratorReplayInconsistentError,
)

logger = logging.getLogger(__name__)

Files = tuple[DataFile, DataFile | None, dict[str, int]]
"""A shard's file of embeddings, its file of rejects, and the rejects by reason."""


class Cluster:
    """A connection to Ray: the cluster of RAY_ADDRESS, or one of our own on this machine."""

    def __init__(self, *, verbose: bool) -> None:
        level = logging.INFO if verbose else logging.CRITICAL
        self._ours = not ray.is_initialized()
        if self._ours:
            with contextlib.nullcontext() if verbose else _native_stderr_closed():
                _connect(verbose, level)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = verbose
        context.raise_original_map_exception = True
        context.print_on_execution_start = verbose
        context.target_max_block_size = context.target_min_block_size = 1  # a block a chunk
        for name in ("ray", "ray.data"):
            logging.getLogger(name).setLevel(level)
        if not verbose:
            warnings.filterwarnings("ignore", category=UserWarning, module=r"ray\.")
            warnings.filterwarnings("ignore", category=RayDeprecationWarning)
            _raylet_to_log()

    @property
    def has_gpu(self) -> bool:
        return bool(ray.cluster_resources().get("GPU"))

    def extraction(self, prepared: Prepared, run: str) -> Extraction:
        """The graph of a run, with shares of what the cluster has now."""
        size = prepared.checkpoint.processor.output_size
        assert size is not None
        return Extraction(prepared, run, self._resources(prepared.config.compute, size))

    def _resources(self, compute: ComputeConfig, size: tuple[int, int]) -> Resources:
        nodes = [
            Node(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0), node["Labels"])
            for node in ray.nodes()
            if node["Alive"]
        ]
        if not any(node.takes(compute) for node in nodes):
            logger.warning(
                "no node of the cluster has a core and what compute.actor_gpus (%s) and "
                "compute.actor_labels (%s) ask for; waiting for one",
                compute.actor_gpus,
                ", ".join(f"{name}={value}" for name, value in compute.actor_labels.items()) or "none",
            )
        return share_out(compute, size, nodes)

    def close(self) -> None:
        if self._ours:
            ray.shutdown()


def _connect(verbose: bool, level: int) -> None:
    with _sigterm_kept():
        ray.init(
            address=os.environ.get("RAY_ADDRESS", "local"),
            include_dashboard=False if "RAY_ADDRESS" not in os.environ else None,
            log_to_driver=verbose,
            logging_level=level,
        )


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Keep our handler of SIGTERM: Ray's start would replace it, and now and then hangs in its own."""
    original = signal.signal

    def set_others(signum: int, handler: Any) -> Any:
        return signal.getsignal(signum) if signum == signal.SIGTERM else original(signum, handler)

    signal.signal = set_others  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = original


@contextlib.contextmanager
def _native_stderr_closed() -> Iterator[None]:
    """Keep Ray's C++ core from the terminal, which announces there that it will be quiet."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    saved = os.dup(2)
    silent = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(silent, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(silent)
        os.close(saved)


def _raylet_to_log() -> None:
    """Have what the cluster tells of dead workers in our log, shortened; Ray prints it at any log level."""
    if not hasattr(ray._private.worker, "print_to_stdstream"):  # another Ray: it goes on printing
        return

    def tell(data: dict[str, Any], *_: object, **__: object) -> None:
        for line in data["lines"]:
            logger.info("ray: %s", " ".join(str(line).split())[:200])

    ray._private.worker.print_to_stdstream = tell


class Extraction:
    """The graph of a prepared run: its receipts as they come, and the assembly of finished shards."""

    def __init__(self, prepared: Prepared, run: str, resources: Resources) -> None:
        self.resources = resources
        self._prepared, self._run = prepared, run
        self._assembling: dict[Any, Work] = {}
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

    def receipts(self, wave: list[Work]) -> Iterator[dict[str, Any] | None]:
        """RECEIPTS rows of a wave; None about ten times a second, so that the caller can look around.

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
            ray.data.from_items([{"spec": spec} for spec in wave], override_num_blocks=len(wave))
            .map_batches(
                _read,
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
                _Embed,
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


def _read(batch: pa.Table, options: ReadOptions) -> Iterator[pa.Table]:
    yield from read_shard(Work.from_json(batch.column("spec")[0].as_py()), options)


class _Embed:
    """The embedder inside its actor: torch is imported there, and not in the driver.

    What a user can mend is raised with the first chunk: Ray hands on a task's error, but of one in an
    actor's start the text alone.
    """

    def __init__(self, **options: Any) -> None:
        from pipeline.embed import Embedder, EmbedOptions

        self._embedder: Embedder | PipelineError
        try:
            self._embedder = Embedder(EmbedOptions(**options))
        except PipelineError as error:
            self._embedder = error

    def __call__(self, chunk: pa.Table) -> pa.Table:
        if isinstance(self._embedder, PipelineError):
            raise self._embedder
        return self._embedder(chunk)


def _pump(dataset: Any) -> Iterator[dict[str, Any] | None]:
    """The data set's rows, pulled by a thread, so that the caller's signals and clocks go on."""
    rows: queue.Queue[dict[str, Any] | BaseException | None] = queue.Queue()

    def pull() -> None:
        try:
            for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                for row in table.to_pylist():
                    rows.put(row)
            rows.put(None)
        except BaseException as error:  # handed to the caller, who raises it
            rows.put(error)

    threading.Thread(target=pull, name="receipts", daemon=True).start()
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


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """What a task raised, as the driver's error: ours as it is, storage's with the remedy."""
    try:
        yield
    except _DEATHS as error:
        if getattr(error, "actor_init_failed", False):  # a bug of ours, or an installation's
            raise
        raise WorkersDiedError(_RETRIES + 1, " ".join(str(error).split())[:200]) from error
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, PipelineError):
            raise cause from error
        if isinstance(cause, OSError):
            with storage_failures(cause.filename or "the output"):
                raise cause from error
        raise
