"""A folder of this machine: what a Storage does where its files are at hand.

Writes are whole and durable: a temporary file beside the target, fsync, and one step that puts it in place.
What fails on a disk does not pass: only the deletion of a folder that is still written to is tried again.
Errors are the system's own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.file_info import FileInfo
from pipeline.local_cache import PARTIAL

_DELETIONS, _DELETION_PAUSE_S = 20, 0.1


@dataclass(frozen=True)
class LocalFolder:
    """Files below `root`, an absolute path; Storage says what each operation promises."""

    root: str

    def path(self, relative: str) -> str:
        return f"{self.root.rstrip('/')}/{relative}" if relative else self.root

    def url(self, relative: str) -> str:
        return f"file://{self.path(relative)}"

    def find(self, folder: str) -> list[FileInfo]:
        found = walk(Path(self.path(folder)), Path(self.root), frozenset())
        return sorted(found, key=lambda info: info.path)

    def info(self, relative: str) -> FileInfo:
        return _info(relative, self._at(relative).stat())

    def exists(self, relative: str) -> bool:
        return self._at(relative).exists()

    def is_file(self, relative: str) -> bool:
        return self._at(relative).is_file()

    def open(self, relative: str) -> BinaryIO:
        return self._at(relative).open("rb")

    def read_bytes(self, relative: str) -> bytes:
        return self._at(relative).read_bytes()

    def read_range(self, relative: str, start: int, size: int) -> bytes:
        with self.open(relative) as file:
            file.seek(start)
            return file.read(size)

    @contextlib.contextmanager
    def local_copy(self, relative: str) -> Iterator[Path]:
        yield self._at(relative)

    @contextlib.contextmanager
    def replacing(self, relative: str) -> Iterator[Path]:
        target = self._at(relative)
        with _temporary_beside(target) as temporary:
            yield temporary
            _fsync(temporary)
            temporary.replace(target)
            _fsync(target.parent)

    def create(self, relative: str, data: bytes) -> None:
        target = self._at(relative)
        with _temporary_beside(target) as temporary:
            temporary.write_bytes(data)
            _fsync(temporary)
            os.link(temporary, target)
            _fsync(target.parent)

    def move(self, source: str, target: str) -> None:
        place = self._at(target)
        place.parent.mkdir(parents=True, exist_ok=True)
        self._at(source).replace(place)
        _fsync(place.parent)

    def delete(self, relative: str) -> None:
        self._at(relative).unlink(missing_ok=True)

    def delete_folder(self, relative: str) -> None:
        folder = self._at(relative)
        for left in reversed(range(_DELETIONS)):
            try:
                shutil.rmtree(folder)
            except OSError as error:
                if not folder.exists():
                    return
                # A process that is about to end may still put files into it, or take them away.
                if not left or error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                    raise
                time.sleep(_DELETION_PAUSE_S)
            else:
                return

    def _at(self, relative: str) -> Path:
        return Path(self.path(relative))


def walk(folder: Path, root: Path, ancestors: frozenset[tuple[int, int]]) -> Iterator[FileInfo]:
    """Files below `folder`, links followed once; sockets, pipes and devices are no files.

    A link that leads nowhere is listed: it is a file that somebody expects, and cannot be read.
    """
    try:
        status = folder.stat()
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    here = (status.st_dev, status.st_ino)
    if here in ancestors:
        return  # a link that leads back to a folder it lies in
    for entry in entries:
        try:
            status = entry.stat()
        except OSError:  # a link that leads nowhere, or to itself
            with contextlib.suppress(FileNotFoundError):  # or a file that has just gone away
                status = entry.stat(follow_symlinks=False)
                yield _of_entry(entry, root, status)
            continue
        if stat.S_ISDIR(status.st_mode):
            yield from walk(Path(entry.path), root, ancestors | {here})
        elif stat.S_ISREG(status.st_mode):
            yield _of_entry(entry, root, status)


def _of_entry(entry: os.DirEntry[str], root: Path, status: os.stat_result) -> FileInfo:
    return _info(entry.path[len(str(root)) :].lstrip("/"), status)


def _info(relative: str, status: os.stat_result) -> FileInfo:
    return FileInfo(relative, status.st_size, str(status.st_mtime_ns), status.st_mtime)


@contextlib.contextmanager
def _temporary_beside(target: Path) -> Iterator[Path]:
    """A path in the target's folder, which is made; what is left there at the end is deleted."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"{PARTIAL}{uuid.uuid4().hex}"
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
