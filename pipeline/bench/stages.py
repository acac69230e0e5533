"""The other stages of extraction alone: reading, the model, writing.

Enters: a small corpus. Leaves: images a second of each stage's own function, pass by pass, after one that
is not counted. A stage is handed what the stage before it has made. Knows no Ray.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cvt_model.backends import FeatureArrays, Pixels
from pipeline import schema
from pipeline.bench.decoding import NUM_PASSES, Decoding, pixels_of
from pipeline.bench.figures import cosines
from pipeline.bench.rounds import interleave
from pipeline.embed import Embedder, EmbedOptions
from pipeline.parts import assemble, write_chunk
from pipeline.readers import read_shard
from pipeline.samples import ReadOptions
from pipeline.shards import Shard, Work
from pipeline.storage import Storage

MODEL_S = 3.0  # a GPU needs more passes than that for a median
MAX_MODEL_PASSES = 200


# --- read


def works(tars: Sequence[Path]) -> list[Work]:
    """The tars as shards to do."""
    return [
        Work(Shard(tar.name, str(tar.resolve()), "webdataset", tar.stat().st_size), tar.stem)
        for tar in tars
    ]


def read(tars: Sequence[Path], options: ReadOptions) -> list[pa.Table]:
    """CHUNK rows of encoded images."""
    return [chunk for work in works(tars) for chunk in read_shard(work, options)]


def read_seconds(tars: Sequence[Path], options: ReadOptions) -> list[float]:
    """Seconds of each pass over all tars."""
    call = partial(read, tars, options)
    call()
    return interleave({"read": call}, {"read": NUM_PASSES})["read"]


# --- model


@dataclass(frozen=True)
class ModelFigures:
    """What the model did with the images in both modes of decoding, and what it left for the writer."""

    images_per_s: list[float]
    cosines: list[float]  # of each image's embeddings, fast to exact
    pixel_difference: float  # mean of absolute differences, of 255
    chunks: list[pa.Table]  # rows of `embeddings/`


def run_model(
    options: EmbedOptions, chunk_images: int, decodings: Mapping[str, Decoding], mode: str
) -> ModelFigures:
    """Embed what is decoded in `mode`, a chunk at a time, with all threads; compare exact and fast."""
    decoded = {name: decoding() for name, decoding in decodings.items()}
    size = decodings[mode].processor.output_size
    assert size is not None
    pixels = {name: pixels_of(chunks, size) for name, chunks in decoded.items()}
    embedder = Embedder(options)
    features = {name: embedder.embed(array) for name, array in pixels.items()}
    difference = np.abs(pixels["exact"].astype(np.int16) - pixels["fast"]).mean()
    return ModelFigures(
        _model_speed(embedder.embed, np.resize(pixels[mode], (chunk_images, *size, 3))),
        cosines(features["fast"].embedding, features["exact"].embedding).tolist(),
        float(difference),
        [embedder(chunk) for chunk in decoded[mode]],
    )


def _model_speed(embed: Callable[[Pixels], FeatureArrays], chunk: Pixels) -> list[float]:
    embed(chunk)
    speeds: list[float] = []
    began = time.perf_counter()
    while len(speeds) < NUM_PASSES or (
        time.perf_counter() - began < MODEL_S and len(speeds) < MAX_MODEL_PASSES
    ):
        before = time.perf_counter()
        embed(chunk)
        speeds.append(len(chunk) / (time.perf_counter() - before))
    return speeds


# --- write


def write_seconds(chunks: Sequence[pa.Table], folder: Path) -> list[float]:
    """Seconds of each pass: every chunk to a part, the parts to a shard's file."""
    rows = schema.unpack(chunks[0].column("rows")[0])
    assert rows is not None
    numbered = [renumbered(chunk, number) for number, chunk in enumerate(chunks)]
    output = Storage(str(folder))
    work = Work(Shard("bench.tar", "bench.tar", "webdataset"), "bench")

    def write() -> None:
        for chunk in numbered:
            write_chunk(chunk, output, "bench")
        assemble(output, "bench", work, rows.schema)

    write()
    return interleave({"write": write}, {"write": NUM_PASSES})["write"]


def renumbered(chunk: pa.Table, number: int) -> pa.Table:
    """A CHUNK as one of the shard `bench`."""
    columns: dict[str, Any] = {"stem": "bench", "chunk": number, "timings": json.dumps({})}
    for name in ("rows", "rejects"):
        columns[name] = chunk.column(name)[0].as_buffer()
    return schema.chunk_row(columns)
