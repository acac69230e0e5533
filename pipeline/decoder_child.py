"""The decoder's child process as its parent sees it: started, asked, waited for, ended.

Enters: requests, as `decoder_process` has them. Leaves: its messages, or `ChildEnded`, which says how.
Images travel through `SharedMemory`, messages through a socket of their own, so that nothing that a
decoder prints can come between them.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from typing import Any, Literal

# The parent's own modules, wherever the parent found them: whatever lies in the current folder must not
# come before them, and a job's working folder is known to the parent alone.
_RUN = (
    "import json, sys; given = json.loads(sys.argv.pop(1)); "
    "sys.path[:] = given + [path for path in sys.path if path not in given]; "
    "from pipeline.decoder_process import main; main()"
)
_POLL_S = 1.0  # how often a silent child is looked after
_START_S = 120.0  # for its imports, from whatever file system
_GRACE_S = 2.0  # for its end
_MEMORY_STEP = 2**20


class ChildEnded(Exception):  # noqa: N818 - a way for a process to go, and not an error of ours
    """The child is gone; `how` ends the sentence "its decoder …"."""

    def __init__(self, kind: Literal["crash", "timeout", "memory"], how: str) -> None:
        super().__init__(how)
        self.kind, self.how = kind, how


class SharedMemory:
    """Memory that has no name, for this process and those that inherit `fd`."""

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            self.fd = os.memfd_create("decoder")
        else:
            with tempfile.TemporaryFile() as file:
                self.fd = os.dup(file.fileno())
        self.map = mmap.mmap(-1, mmap.PAGESIZE)
        self.size = 0

    def reserve(self, size: int) -> None:
        """Room for `size` bytes; what was there before is lost. Much more than that is given back."""
        if not self.size // 4 <= size <= self.size:
            self.size = (size // _MEMORY_STEP + 1) * _MEMORY_STEP
            os.ftruncate(self.fd, self.size)
            self.map = mmap.mmap(self.fd, self.size)

    def close(self) -> None:
        """Give it back, as soon as nobody has it mapped."""
        os.close(self.fd)


class Child:
    """A running `decoder_process`. Raises ChildEnded or OSError where it does not come up."""

    def __init__(self, settings: dict[str, Any], memory: SharedMemory) -> None:
        self._received = b""
        self._ended = threading.Event()
        self._link, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = self._start(theirs.fileno(), memory.fd)
        except OSError:
            self._link.close()
            raise
        try:
            self.send(settings)
            self.receive(_START_S)
        except BaseException:
            self.end()
            raise

    def _start(self, socket_fd: int, memory_fd: int) -> subprocess.Popen[bytes]:
        # A child that ends with its parent ends with the thread that started it: so let that be one that
        # waits as long as there is a child.
        process: Future[subprocess.Popen[bytes]] = Future()
        paths = json.dumps([str(path) for path in sys.path])
        words = [sys.executable, "-P", "-c", _RUN, paths, str(socket_fd), str(memory_fd), str(os.getpid())]

        def foster() -> None:
            try:
                child = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # what a decoder prints goes to the log
                    pass_fds=(socket_fd, memory_fd),
                    process_group=0,  # out of reach of a terminal's Ctrl-C; ended with all it started
                )
            except OSError as error:
                process.set_exception(error)
                return
            process.set_result(child)
            self._ended.wait()

        threading.Thread(target=foster, name="decoder's parent", daemon=True).start()
        return process.result()

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def send(self, message: dict[str, Any]) -> None:
        """Hand the child a line; raises ChildEnded."""
        self._link.settimeout(_START_S)
        try:
            self._link.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise self._gone() from error

    def receive(self, patience_s: float) -> list[Any]:
        """The child's next message; raises ChildEnded, also for one that stays silent so long."""
        deadline = time.monotonic() + patience_s
        self._link.settimeout(_POLL_S)
        while b"\n" not in self._received:
            try:
                data = self._link.recv(2**16)
            except TimeoutError:
                if self.has_ended():  # something that it started may still hold the socket
                    raise self._gone() from None
                if time.monotonic() > deadline:
                    self.end()
                    raise ChildEnded("timeout", "did not end") from None
                continue
            except OSError as error:
                raise self._gone() from error
            if not data:
                raise self._gone()
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        try:
            return json.loads(line)  # type: ignore[no-any-return]
        except ValueError as error:
            self.end()
            raise ChildEnded("crash", "wrote over its own messages") from error

    def end(self) -> int:
        """End the child and what it has started, if it still runs; its status, negative of a signal."""
        self._link.close()
        if not self._ended.is_set():
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it ended before
                os.killpg(self._process.pid, signal.SIGKILL)
        status = self._process.wait()
        self._ended.set()
        return status

    def _gone(self) -> ChildEnded:
        with contextlib.suppress(subprocess.TimeoutExpired):  # Python's own way out closes the socket first
            self._process.wait(_GRACE_S)
        status = self.end()
        if status == -signal.SIGALRM:
            return ChildEnded("timeout", "was ended by its timer")
        if status >= 0:
            return ChildEnded("crash", f"ended with exit status {status}")
        try:
            return ChildEnded("crash", f"was ended by {signal.Signals(-status).name}")
        except ValueError:
            return ChildEnded("crash", f"was ended by signal {-status}")
