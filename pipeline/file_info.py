"""What a listing tells of a file: here from this machine's folders, elsewhere from the client's answers.

Object stores name the same thing in many ways; this is the one place that knows them.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

# In order of trust. Google's generation changes with the content; its etag with the metadata too.
_VERSIONS = ("generation", "ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated")
_TIMES = ("LastModified", "mtime", "last_modified", "updated")


@dataclass(frozen=True)
class FileInfo:
    """A file as a listing tells it: path relative to the storage's root, bytes, ETag or mtime.

    `modified` is when it was last written, in epoch seconds; None where the storage does not tell.
    """

    path: str
    size: int
    version: str
    modified: float | None = None


def remote_info(relative: str, info: Mapping[str, Any]) -> FileInfo:
    """A FileInfo of what an fsspec file system tells of a file."""
    return FileInfo(relative, int(info["size"] or 0), version_of(info), _modified(info))


def version_of(info: Mapping[str, Any]) -> str:
    """What changes when the file does; empty where nothing tells."""
    for key in _VERSIONS:
        if info.get(key):
            return str(info[key]).strip('"')
    return ""


def _modified(info: Mapping[str, Any]) -> float | None:
    """Epoch seconds of whatever a listing calls the time of the last write."""
    for value in (info[key] for key in _TIMES if info.get(key)):
        try:
            return _epoch_seconds(value)
        except (ValueError, TypeError, OverflowError):
            continue
    return None


def _epoch_seconds(value: Any) -> float:
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, str):
        value = datetime.fromisoformat(value) if value[:1].isdigit() else parsedate_to_datetime(value)
    return float((value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp())


def walk_local(folder: Path, root: Path, ancestors: frozenset[tuple[int, int]]) -> Iterator[FileInfo]:
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
            yield from walk_local(Path(entry.path), root, ancestors | {here})
        elif stat.S_ISREG(status.st_mode):
            yield _of_entry(entry, root, status)


def local_info(relative: str, status: os.stat_result) -> FileInfo:
    """A FileInfo of a file of this machine."""
    return FileInfo(relative, status.st_size, str(status.st_mtime_ns), status.st_mtime)


def _of_entry(entry: os.DirEntry[str], root: Path, status: os.stat_result) -> FileInfo:
    relative = entry.path[len(str(root)) :].lstrip("/")
    return local_info(relative, status)
