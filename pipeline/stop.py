"""A polite stop: signals set a flag, the loop looks at it, and a deadline stands behind both."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from pipeline.errors import Interrupted

GRACE_S = 8.0


class Stop:
    """Whether a signal has asked the run to stop. `request` is a signal handler."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def install(self) -> None:
        """Make SIGINT and SIGTERM ask for a stop; again after Ray's start, whose core takes SIGTERM."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets only the main thread handle signals
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.request)

    def request(self, signum: int, frame: FrameType | None = None) -> None:
        """Ask for a clean stop; a second signal, or GRACE_S without one, ends the process at once.

        That is safe at any moment: nothing is done until its commit record exists.
        """
        if self.signum is not None:
            os._exit(128 + signum)
        self.signum = signum
        deadline = threading.Timer(GRACE_S, os._exit, [128 + signum])
        deadline.daemon = True
        deadline.start()

    def check(self) -> None:
        """Raise Interrupted if a stop was asked for."""
        if self.signum is not None:
            raise Interrupted(self.signum)
