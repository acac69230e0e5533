"""A remote file, open for reading, that goes on where it was after a failure that passes.

The clients fetch blocks by range. Where that fails for the moment, the file is opened again at the same
position; where it has changed meanwhile, its reader is told, and no mixture of two files is read.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any, cast

from pipeline.errors import StorageError
from pipeline.retry import TruncatedError, storage_errors, with_retries

BLOCK_BYTES = 16 * 2**20  # fetched at once: what a retry repeats, and what an open file holds in memory
_DISCARD_BYTES = 2**20


class RemoteFile(io.RawIOBase):
    """Bytes of a remote file. `open_file` opens it from its beginning; `version_of` identifies it.

    `failures` turns what is left of them into words.
    """

    def __init__(
        self,
        open_file: Callable[[], Any],
        version_of: Callable[[Any], str],
        failures: Callable[[], contextlib.AbstractContextManager[None]],
        place: str,
        patience_s: float | None = None,
    ) -> None:
        super().__init__()
        self._open, self._version_of = open_file, version_of
        self._failures, self._place, self._patience_s = failures, place, patience_s
        self._position = 0
        self._file: Any = None
        self._version: str | None = None
        self._try(lambda: None)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True  # a stream that cannot is opened again

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self._size is None:
            raise io.UnsupportedOperation(f"the size of {self._place} is not known")
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size or 0}[whence]
        self._position = max(0, start + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """`size` bytes, or what is left; never fewer than there are."""
        wanted = -1 if size is None or size < 0 else size
        data: bytes = self._try(lambda: self._read(wanted))
        self._position += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if self._file is not None and not self.closed:
            with contextlib.suppress(*storage_errors()):
                self._file.close()
        super().close()

    @property
    def _size(self) -> int | None:
        return getattr(self._file, "size", None)

    def _read(self, wanted: int) -> bytes:
        self._go_to_position()
        pieces = list(_pieces(self._file, wanted))
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        there = None if self._size is None else max(0, self._size - self._position)
        if there is not None and len(data) < (there if wanted < 0 else min(wanted, there)):
            raise TruncatedError(
                f"{self._place} ends at byte {self._position + len(data):,} of {self._size:,}"
            )
        return data

    def _go_to_position(self) -> None:
        if self._file.tell() == self._position:
            return
        try:
            self._file.seek(self._position)
            return
        except ValueError:  # a stream, which only goes forward
            if self._file.tell() > self._position:
                self._reopen()
        while (left := self._position - self._file.tell()) > 0:
            if not self._file.read(min(left, _DISCARD_BYTES)):
                raise TruncatedError(f"{self._place} ends before byte {self._position:,}")

    def _try(self, step: Callable[[], Any]) -> Any:
        def attempt(number: int) -> Any:
            if number or self._file is None:
                self._reopen()
            return step()

        with self._failures():
            return with_retries(attempt, self._place, self._patience_s)

    def _reopen(self) -> None:
        if self._file is not None:
            with contextlib.suppress(*storage_errors()):
                self._file.close()
        self._file = self._open()
        version = self._version_of(self._file)
        if self._version is not None and version != self._version:
            raise StorageError(f"{self._place} changed while it was read; run again")
        self._version = version


def _pieces(file: Any, wanted: int) -> Iterator[bytes]:
    """What a file gives until `wanted` bytes, or its end, are there; at least one piece."""
    left = wanted
    while True:
        piece = _read_piece(file, left)
        yield piece
        left -= len(piece)
        if not piece or wanted < 0 or left <= 0:
            return


def _read_piece(file: Any, size: int) -> bytes:
    try:
        return cast(bytes, file.read(size))
    except IndexError as error:  # s3fs looks into the message of a timeout, which has none
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
