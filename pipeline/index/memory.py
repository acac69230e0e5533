"""What a process takes of memory: anonymous pages, which nothing but the process can give back.

Pages of mapped files are not counted: the kernel drops them when others need the room.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from types import TracebackType
from typing import Self

import pyarrow as pa

_INTERVAL_S = 0.02


def anonymous_bytes() -> int:
    """RssAnon of this process, from the kernel; 0 where it does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon")), 0)
    except OSError:
        return 0


def give_back() -> None:
    """Return what Arrow and the C library keep of freed memory to the system, where they can."""
    pa.default_memory_pool().release_unused()
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class PeakMemory:
    """The most anonymous memory of this process while the block runs, looked at fifty times a second."""

    def __init__(self) -> None:
        self.peak_bytes = anonymous_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def _watch(self) -> None:
        while not self._ended.wait(_INTERVAL_S):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
