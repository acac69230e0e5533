"""What the decoder's child process runs: encoded images in shared memory to pixels in the same.

Enters: on a socket, lines of JSON: the SETTINGS once, then requests `{"size", "images": [[number, begin,
end, place], …]}`. Leaves: pixels at each image's place, and for each image, as soon as it is done, a line
`[number, "decoded", width, height, format, sha256]`, `[number, "rejected", reason, message]` or `[number,
"memory", limit_bytes]`. An image may end the process at any point: no line tells of it then. Knows no
Arrow, no torch and no Ray, which would make its start slow.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import math
import mmap
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cvt_model.errors import ImageError
from cvt_model.image_decoder import decode_image
from cvt_model.image_processor import CvtImageProcessor

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_LONGEST_TIMER_S = 1e8  # three years
_NICENESS = 19  # the least: where cores are scarce, the model (or what feeds its device) comes first


def main() -> None:
    """Decode until the other end of the socket is closed."""
    socket_fd, memory_fd, parent = map(int, sys.argv[1:])
    for fd in (socket_fd, memory_fd):
        os.set_inheritable(fd, False)  # what a decoder starts must not keep them open
    _end_with(parent)
    os.nice(_NICENESS)
    with socket.socket(fileno=socket_fd) as link, link.makefile("r", encoding="ascii") as lines:
        settings = json.loads(lines.readline() or sys.exit())
        worker = Worker(settings, memory_fd)
        link.sendall(b"[]\n")
        for line in lines:
            request = json.loads(line)
            worker.map(request["size"])
            for number, begin, end, place in request["images"]:
                outcome = worker.decode(begin, end, place)
                link.sendall(json.dumps([number, *outcome]).encode() + b"\n")


class Worker:
    """Decodes images of the shared memory into their places, each within its time and its memory."""

    def __init__(self, settings: dict[str, Any], memory_fd: int) -> None:
        self._processor = CvtImageProcessor.model_validate(settings["processor"])
        self._max_pixels: int = settings["max_pixels"]
        self._timeout_s = min(settings["image_timeout_s"], _LONGEST_TIMER_S)
        self._fast: bool = settings["fast"]
        self._memory_limit = _limit_memory(self._max_pixels)
        self._memory_fd, self._memory = memory_fd, mmap.mmap(-1, mmap.PAGESIZE)
        assert self._processor.output_size is not None
        self._shape = (*self._processor.output_size, 3)

    def map(self, size: int) -> None:
        """Follow the shared memory to its size."""
        if size != len(self._memory):
            self._memory = mmap.mmap(self._memory_fd, size)

    def decode(self, begin: int, end: int, place: int) -> list[Any]:
        """What the line about the image at `begin` says, its pixels being at `place`."""
        try:
            with _time_limit(self._timeout_s):
                data = self._memory[begin:end]
                image = decode_image(data, self._processor, self._max_pixels, fast=self._fast)
                count = math.prod(self._shape)
                pixels = np.frombuffer(self._memory, np.uint8, count, place).reshape(self._shape)
                pixels[...] = image.pixels
                sha256 = hashlib.sha256(data).hexdigest()
        except (ImageError, MemoryError) as error:
            if isinstance(error, ImageError) and not isinstance(error.__cause__, MemoryError):
                return ["rejected", error.reason, error.message]
            return ["memory", self._memory_limit]
        return ["decoded", image.width, image.height, image.format, sha256]


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    # The kernel's own timer and its own way to end a process: a handler of ours would not run while C
    # code holds the interpreter. Set anew for each image, since a decoder may have changed any of it.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _end_with(parent: int) -> None:
    """Let the parent alone decide when this process ends: with it at once, not by a terminal's signals."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    with contextlib.suppress(AttributeError, OSError):  # Linux alone has it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # gone before that
        sys.exit()


def _limit_memory(max_pixels: int) -> int:
    """Bound this process's memory, in bytes, and let the kernel take it before that of others."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = min(physical // 2, 4 * 2**30 + 16 * max_pixels)
    with contextlib.suppress(OSError, ValueError):
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    return limit
