"""Where a measurement runs: in a process of its own, on cores of its own.

Enters: calls and cores. Leaves: their results. Knows nothing of what is called.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


def alone(call: Callable[..., T], *arguments: Any) -> T:
    """The result of a call in a fresh process, which takes its threads and its memory away with it."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(call, *arguments).result()


@contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """This thread, and what it starts meanwhile, on these cores alone, where the system can do that."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def usable_cores() -> list[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
