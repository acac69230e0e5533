"""What a listing tells of a file.

Object stores' clients name the same thing in many ways; this is the one place that knows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
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
