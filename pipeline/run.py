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
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # after a stop, threads must not start Ray again

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from pipeline.commits import DataFile
from pipeline.config import Config
from pipeline.decode import decode_chunk
from pipeline.errors import PipelineError
from pipeline.parts import assemble, write_chunk
from pipeline.plan import Plan
from pipeline.prepare import Prepared
from pipeline.readers import read_shard
from pipeline.samples import ReadOptions
from pipeline.shards import Work
from pipeline.storage import storage_failures

WAVE_SHARDS = 2000
WAVE_BYTES = 64 * 2**20  # of shard descriptions; groups of loose images list their members
_BATCH = {"batch_size": 1, "batch_format": "pyarrow"}  # one row is one chunk

Files = tuple[DataFile, DataFile | None, dict[str, int]]
"""A shard's file of embeddings, its file of rejects, and the rejects by reason."""


@dataclass(frozen=True)
class Resources:
    """How a cluster is divided between the stages.

    Shares differ from stage to stage, so that Ray does not fuse them, and leave each room beside the
    others on one core: two stages that ask for whole cores would starve each other.
    """

    actors: int
    actor_gpus: float
    actor_cpus: float
    decode_cpus: float
    num_threads: int
    chunk_images: int
    cpus: float

    @property
    def slots(self) -> dict[str, float]:
        """How many tasks of each stage can be at work at once."""
        decode = max(1.0, (self.cpus - self.actors * self.actor_cpus) / self.decode_cpus)
        slots = {"read": self.readers, "decode": decode, "model": self.actors, "write": self.writers}
        return {stage: min(count, self.cpus) for stage, count in slots.items()}

    @property
    def readers(self) -> int:
        """Shards read at once: they wait for storage more than for cores, and each holds a chunk."""
        return max(2, int(self.cpus))

    @property
    def writers(self) -> int:
        return max(2, int(self.cpus / 2))

    @classmethod
    def of_cluster(cls, config: Config) -> Resources:
        totals = ray.cluster_resources()
        cpus, gpus = totals.get("CPU", 1.0), int(totals.get("GPU", 0))
        nodes = sum(node["Alive"] for node in ray.nodes())
        compute = config.compute
        fitting = gpus or max(nodes, int(cpus // 8))
        actors = fitting if compute.actors == "auto" else compute.actors
        chunk_images = 256 if gpus else max(32, 8 * int(cpus / actors))
        if compute.batch_size != "auto":
            chunk_images = compute.batch_size
        share = cpus / actors
        return cls(
            actors=actors,
            actor_gpus=min(1.0, gpus / actors) if gpus else 0,
            actor_cpus=round(min(1.0, 0.3 * share) if gpus else 0.4 * share, 2),
            decode_cpus=0.5 if cpus <= 2 else 0.9,
            num_threads=max(1, int(share)),
            chunk_images=chunk_images,
            cpus=cpus,
        )


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

    @property
    def has_gpu(self) -> bool:
        return bool(ray.cluster_resources().get("GPU"))

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


class Extraction:
    """The graph of a prepared run: its receipts as they come, and the assembly of finished shards."""

    def __init__(self, prepared: Prepared, plan: Plan, run: str, resources: Resources) -> None:
        self._plan = plan
        self._prepared, self._run, self._resources = prepared, run, resources
        self._assembling: dict[Any, Work] = {}
        self._assemble = ray.remote(num_cpus=0, max_retries=3)(assemble)

    def receipts(self) -> Iterator[dict[str, Any] | None]:
        """RECEIPTS rows; None about ten times a second, so that the caller can look around."""
        manifest, metadata = self._prepared.manifest, list(self._prepared.metadata)
        work = self._plan.work
        ready = (manifest.attach(item, metadata) if manifest else item for item in work)
        for wave in _waves(item.to_json() for item in ready):
            yield from _pump(self._dataset(wave))

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
        prepared, resources = self._prepared, self._resources
        config, checkpoint = prepared.config, prepared.checkpoint
        read = ReadOptions(
            chunk_images=resources.chunk_images,
            max_image_bytes=config.limits.max_image_bytes,
            metadata=prepared.metadata,
            image_column=config.input.image_column,
            id_column=config.input.id_column,
        )
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
                num_cpus=0.1,
                **_BATCH,
            )
            .map_batches(
                decode_chunk,
                fn_args=(checkpoint.processor, config.limits.max_pixels),
                num_cpus=resources.decode_cpus,
                **_BATCH,
            )
            .map_batches(
                _Embed,
                fn_constructor_kwargs=embed,
                compute=ActorPoolStrategy(size=resources.actors, max_tasks_in_flight_per_actor=2),
                num_cpus=resources.actor_cpus,
                num_gpus=resources.actor_gpus,
                **_BATCH,
            )
            .map_batches(
                write_chunk,
                fn_args=(prepared.output, self._run),
                compute=TaskPoolStrategy(size=resources.writers),
                num_cpus=0.05,
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


def _waves(specs: Iterable[str]) -> Iterator[list[str]]:
    """Shards in lots that one data set can plan: bounded in number and in bytes of description."""
    wave: list[str] = []
    size = 0
    for spec in specs:
        if wave and (len(wave) >= WAVE_SHARDS or size + len(spec) > WAVE_BYTES):
            yield wave
            wave, size = [], 0
        wave.append(spec)
        size += len(spec)
    if wave:
        yield wave


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
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, PipelineError):
            raise cause from error
        if isinstance(cause, OSError):
            with storage_failures(cause.filename or "the output"):
                raise cause from error
        raise
