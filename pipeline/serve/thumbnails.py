"""Small pictures of the originals, made when they are first asked for and kept on disk within a limit.

Enters: a row. Leaves: JPEG. An original that has gone, changed or cannot be decoded has no
picture, which is told, not raised.
"""

from __future__ import annotations

import io
import os
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cvt_model.errors import ImageError
from cvt_model.image_file import DEFAULT_MAX_PIXELS, open_stored, turn
from pipeline.local_cache import PARTIAL, make_room
from pipeline.originals import Originals

SIZES = (256, 1024)  # pixels of the longer side
_AT_ONCE = 2  # images decoded at the same time: each may be large
_LOOK_EVERY = 64  # pictures written between two looks at the limit
_QUALITY = 85

PLACEHOLDER = (
    b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64" role="img" aria-label="no picture">'
    b'<rect width="64" height="64" fill="#8883"/><path d="M14 46l12-14 8 9 6-7 10 12z" fill="#8886"/>'
    b'<circle cx="44" cy="22" r="5" fill="#8886"/>'
    b'<path d="M10 10l44 44" stroke="#888" stroke-width="3"/></svg>'
)


class Thumbnails:
    """Pictures by row and size, in `folder`, which holds `limit_bytes` at most or a little more."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit_bytes = folder, limit_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._at_once = threading.Semaphore(_AT_ONCE)
        self._lock = threading.Lock()
        self._written = 0

    def of_row(self, row: Mapping[str, Any], size: int, originals: Originals) -> bytes | None:
        """The picture of a committed row; None where its original cannot be had any more."""
        sha256: bytes = row["sha256"]
        path = self._folder / f"{sha256.hex()}-{size}.jpg"
        if (kept := _read(path)) is not None:
            return kept
        data = originals.read(row["shard"], row["key"], sha256)
        if data is None:
            return None
        with self._at_once:
            return self._keep(path, data, size)

    def _keep(self, path: Path, data: bytes, size: int) -> bytes | None:
        picture = make_picture(data, size)
        if picture is None:
            return None
        with self._lock:
            self._written += 1
            if self._written % _LOOK_EVERY == 1:
                make_room(self._folder, len(picture) * _LOOK_EVERY, self._limit_bytes)
        partial = self._folder / f"{PARTIAL}{uuid.uuid4().hex}"
        try:
            partial.write_bytes(picture)
            partial.replace(path)
        except OSError:  # a full disk: the picture is there all the same
            partial.unlink(missing_ok=True)
        return picture


def make_picture(data: bytes, size: int) -> bytes | None:
    """A JPEG of at most `size` x `size` pixels; None where the bytes are no usable image."""
    try:
        stored = open_stored(data, DEFAULT_MAX_PIXELS, lambda whole: (2 * size, 2 * size))
    except ImageError:
        return None
    image = turn(stored.image_rgb, stored.transposition)
    image.thumbnail((size, size))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _read(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
        os.utime(path)  # used now
    except OSError:
        return None
    return data
