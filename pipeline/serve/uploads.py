"""Images that people search by: decoded where they can do no harm, embedded, and known by a name.

The name is the SHA-256 of the bytes, so that the address of a search can be shared; vector and picture lie
in a cache on this machine for as long as it has room.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cvt_model.image_processor import CvtImageProcessor
from pipeline.decoder import DecodeOptions, Decoder, Failed
from pipeline.errors import SearchError
from pipeline.index.vectors import Vectors
from pipeline.local_cache import make_room
from pipeline.search import Searcher
from pipeline.storage import Storage

_DECODE_S = 20
_KEPT_BYTES = 200_000_000
_PICTURE = CvtImageProcessor(size=256, crop_pct=1.0)


class Uploads:
    """What was searched by, in `folder`; images are decoded in child processes, one at a time."""

    def __init__(self, folder: Path, max_pixels: int) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._max_pixels = max_pixels
        self._decoders: dict[Any, Decoder] = {}
        self._lock = threading.Lock()

    def add(self, data: bytes, searcher: Searcher) -> str:
        """Embed an encoded image; its name. SearchError where it cannot be decoded."""
        name = hashlib.sha256(data).hexdigest()
        processor, fast = searcher.preprocessing
        with self._lock:
            vector = searcher.embed_pixels(self._decode(data, processor, fast=fast))
            picture = self._decode(data, _PICTURE, fast=True)
        buffers = io.BytesIO(), io.BytesIO()
        np.save(buffers[0], vector)
        Image.fromarray(picture).save(buffers[1], "JPEG", quality=85)
        make_room(self._folder, 0, _KEPT_BYTES)
        files = Storage(str(self._folder))
        for file, buffer in zip((self._vector(name, searcher), f"{name}.jpg"), buffers, strict=True):
            files.write_bytes(file, buffer.getvalue())
        return name

    def vector(self, name: str, searcher: Searcher) -> Vectors:
        """The embedding (D,) of an image that was searched by. SearchError where it was forgotten."""
        path = self._folder / self._vector(name, searcher)
        try:
            os.utime(path)
            return np.load(path)  # type: ignore[no-any-return]
        except (OSError, ValueError) as error:
            raise SearchError("this image is not kept any more; drop it here again") from error

    def picture(self, name: str) -> bytes | None:
        """A JPEG of the image; None where it was forgotten."""
        try:
            return (self._folder / f"{name}.jpg").read_bytes()
        except OSError:
            return None

    def close(self) -> None:
        """End the child processes."""
        with self._lock:
            for decoder in self._decoders.values():
                decoder.close()
            self._decoders.clear()

    @staticmethod
    def _vector(name: str, searcher: Searcher) -> str:
        return f"{name}-{searcher.record.fingerprint}.npy"

    def _decode(self, data: bytes, processor: CvtImageProcessor, *, fast: bool) -> npt.NDArray[np.uint8]:
        """Pixels (H, W, 3)."""
        key = (processor, fast)
        if key not in self._decoders:
            self._decoders[key] = Decoder(processor, DecodeOptions(self._max_pixels, _DECODE_S, fast))
        (outcome,), pixels = self._decoders[key].decode(memoryview(data), [0, len(data)])
        if isinstance(outcome, Failed):
            raise SearchError(f"the image cannot be searched by: {outcome.message}")
        assert processor.output_size is not None
        return np.frombuffer(pixels, np.uint8).reshape(*processor.output_size, 3).copy()
