"""Folders of this machine with what can be made again, held within a limit: the oldest use goes first."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

PARTIAL = ".tmp-"  # how the name of a file begins that is still being written
ABANDONED_S = 86_400.0  # after which its writer is taken for dead


def being_written(entry: Path, modified_at: float) -> bool:
    """Whether another process may still be writing a file or folder that was last modified then."""
    return entry.name.startswith(PARTIAL) and modified_at >= time.time() - ABANDONED_S


def make_room(folder: Path, size_bytes: int, limit_bytes: int) -> None:
    """Delete what was used longest ago, until the folder with a new file keeps its limit.

    A file's last use is its modification time. One that another process has open or mapped stays readable
    to it; what one is still writing is left to it, unless it has long been dead.
    """
    known: list[tuple[float, int, Path]] = []
    for entry in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process makes room too
            facts = entry.stat()
            if not being_written(entry, facts.st_mtime):
                known.append((facts.st_mtime, facts.st_size, entry))
    known.sort()
    total = size_bytes + sum(size for _, size, _ in known)
    for _, size, entry in known:
        if total <= limit_bytes:
            return
        entry.unlink(missing_ok=True)
        total -= size
