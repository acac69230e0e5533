"""The connection to Ray: the cluster of RAY_ADDRESS, or one of our own on this machine, kept quiet.

Leaves: what the cluster has, divided between the stages. Knows no Ray Data, whose import takes as long as
the start of a cluster: the two go side by side.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # after a stop, threads must not start Ray again

import ray
from ray.util.annotations import RayDeprecationWarning

from pipeline.config import ComputeConfig
from pipeline.errors import PipelineError, WorkersDiedError
from pipeline.resources import Node, Resources, share_out

if TYPE_CHECKING:
    from pipeline.index.tasks import Runner

DEATHS = (
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.RayActorError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.StreamingGeneratorReplayInconsistentError,
)
"""What Ray raises where a process of its cluster died."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Cluster:
    """A connection to Ray: the cluster of RAY_ADDRESS, or one of our own on this machine."""

    def __init__(self, *, verbose: bool) -> None:
        level = logging.INFO if verbose else logging.CRITICAL
        self._ours = not ray.is_initialized()
        if self._ours:
            with contextlib.nullcontext() if verbose else _native_stderr_closed():
                _connect(verbose, level)
        for name in ("ray", "ray.data"):
            logging.getLogger(name).setLevel(level)
        if not verbose:
            warnings.filterwarnings("ignore", category=UserWarning, module=r"ray\.")
            warnings.filterwarnings("ignore", category=RayDeprecationWarning)
            _raylet_to_log()

    @property
    def has_gpu(self) -> bool:
        return bool(ray.cluster_resources().get("GPU"))

    @property
    def hosts(self) -> set[str]:
        """The machines of the cluster, by name."""
        return {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}

    def resources(self, compute: ComputeConfig, size: tuple[int, int]) -> Resources:
        """The stages' shares of what the cluster has now; `size` is that of the network's images."""
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

    @property
    def num_gpus(self) -> float:
        return float(ray.cluster_resources().get("GPU", 0))

    @property
    def cores(self) -> int:
        return max(1, int(ray.cluster_resources().get("CPU", 1)))

    def tasks(self, number: int, doing: str) -> Runner:
        """A way to run functions as Ray tasks, `number` at once, their results in order.

        Tasks whose workers die are run again, three times at most; `doing` is for the error after that.
        """
        cores = ray.cluster_resources().get("CPU", 1)

        def run(function: Callable[..., T], items: Iterable[Sequence[Any]]) -> Iterator[T]:
            options = {"num_cpus": min(1, cores / number), "max_retries": 3}
            remote = ray.remote(**options)(function)
            for reference in _windowed(lambda item: remote.remote(*item), items, 2 * number):
                try:
                    yield ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    cause = error.cause
                    raise cause if isinstance(cause, PipelineError) else error from None
                except DEATHS as error:
                    raise WorkersDiedError(4, doing) from error

        return run

    def close(self) -> None:
        if self._ours:
            ray.shutdown()


def _connect(verbose: bool, level: int) -> None:
    # Else Ray ends workers that idle for a second, and starts others that import everything again: 2 s of
    # a core each. There are never more of them than have been at work at once.
    own = {"include_dashboard": False, "_system_config": {"num_workers_soft_limit": 10_000}}
    with _sigterm_kept():
        ray.init(
            address=os.environ.get("RAY_ADDRESS", "local"),
            log_to_driver=verbose,
            logging_level=level,
            **({} if "RAY_ADDRESS" in os.environ else own),
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


def _windowed(
    start: Callable[[Sequence[Any]], T], items: Iterable[Sequence[Any]], width: int
) -> Iterator[T]:
    """Started items in their order, never more than `width` ahead of who takes them."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(start(item))
        if len(waiting) >= width:
            yield waiting.popleft()
    yield from waiting
