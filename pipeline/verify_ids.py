"""Which image ids come twice, of any number of them: 8 bytes an id on disk, a bounded share in memory."""

from __future__ import annotations

import tempfile
import threading
from types import TracebackType
from typing import IO, Self

import numpy as np

IN_MEMORY = 8_000_000  # marks that are sorted at once
MOST_REPEATED = 1000  # that are named; a million lines help nobody
_BLOCK = 1_000_000


class SeenIds:
    """Takes ids from several threads; a context manager, which deletes its file."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._lock = threading.Lock()
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, ids: list[str]) -> None:
        """Note ids, by their hash in this process."""
        marks = np.fromiter(map(hash, ids), np.int64, len(ids))
        with self._lock:
            self._file.write(marks.tobytes())
            self._count += len(ids)

    def repeated(self) -> set[int]:
        """Hashes that came more than once, MOST_REPEATED at most; their ids are most likely equal."""
        found: set[int] = set()
        num_passes = -(-self._count // IN_MEMORY)
        for number in range(num_passes):
            marks = np.sort(self._share(number, num_passes))
            found.update(marks[1:][marks[1:] == marks[:-1]][:MOST_REPEATED].tolist())
        return set(sorted(found)[:MOST_REPEATED])

    def _share(self, number: int, num_passes: int) -> np.ndarray:
        """The marks of one pass: all equal ones are in the same."""
        self._file.seek(0)
        shares = []
        while block := self._file.read(8 * _BLOCK):
            marks = np.frombuffer(block, np.int64)
            shares.append(marks[marks % num_passes == number])
        return np.concatenate(shares) if shares else np.empty(0, np.int64)
