"""The decode stage alone, on one core or on several at once. Imports no torch, nor do its processes.

Enters: CHUNK rows of encoded images. Leaves: seconds, pass by pass, after one that is not counted; and
the pixels as an array.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from threading import Barrier

import numpy as np
import pyarrow as pa

from cvt_model.image_processor import CvtImageProcessor, Pixels
from pipeline import schema
from pipeline.bench.processes import on_cores
from pipeline.decode import DecodeOptions, decode_chunk

NUM_PASSES = 5
START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Decoding:
    """Chunks and how to decode them; one pass decodes all."""

    chunks: list[pa.Table]
    processor: CvtImageProcessor
    options: DecodeOptions

    def __call__(self) -> list[pa.Table]:
        return [decode_chunk(chunk, self.processor, self.options) for chunk in self.chunks]

    def warm_up(self) -> None:
        """What a pass needs to find: a process has one decoder, and other options end its child."""
        decode_chunk(self.chunks[0], self.processor, self.options)


def decode_seconds(decodings: Mapping[str, Decoding], cores: Sequence[int]) -> list[dict[str, list[float]]]:
    """Seconds of each pass, a process a core, all at once: for each core by the names of `decodings`."""
    spawn = multiprocessing.get_context("spawn")
    count = len(cores)
    with spawn.Manager() as manager, ProcessPoolExecutor(count, spawn) as pool:
        start = manager.Barrier(count)  # nobody passes before each has a process of its own
        return list(pool.map(_decode_on, cores, [dict(decodings)] * count, [start] * count))


def _decode_on(core: int, decodings: Mapping[str, Decoding], start: Barrier) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in decodings}
    with on_cores([core]):
        for decoding in decodings.values():
            decoding()
        start.wait(START_TIMEOUT_S)
        for _ in range(NUM_PASSES):
            for name, decoding in decodings.items():
                decoding.warm_up()
                began = time.perf_counter()
                decoding()
                seconds[name].append(time.perf_counter() - began)
    return seconds


def pixels_of(chunks: Sequence[pa.Table], size: tuple[int, int]) -> Pixels:
    """The decoded images of CHUNK rows, (N, H, W, 3); every one that was read, as all of them decode."""
    arrays = []
    for chunk in chunks:
        table, rejects = (schema.unpack(chunk.column(name)[0]) for name in ("rows", "rejects"))
        assert table is not None
        assert rejects is not None
        assert rejects.num_rows == 0, rejects.to_pylist()
        cells = table.column("pixels")
        arrays += [np.frombuffer(cell.as_buffer(), np.uint8).reshape(*size, 3) for cell in cells]
    return np.stack(arrays)
