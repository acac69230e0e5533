"""Encoded samples to pixels: the decode stage, one task a chunk, as many at once as there are cores.

Enters: a CHUNK of SAMPLES. Leaves: the same CHUNK with PIXELS; images that cannot be decoded join its
rejects. One bad image never costs another. Knows no model, and does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import pyarrow as pa

from cvt_model.errors import ImageError
from cvt_model.image_file import open_image
from cvt_model.image_processor import CvtImageProcessor
from pipeline import schema


def decode_chunk(chunk: pa.Table, processor: CvtImageProcessor, max_pixels: int) -> pa.Table:
    """A CHUNK of one row with its samples decoded to uint8 pixels (H, W, 3) of the processor's size."""
    started = time.time()
    samples = schema.unpack(chunk.column("rows")[0])
    assert samples is not None
    decoded: list[dict[str, Any] | None] = []
    rejects: list[dict[str, Any]] = []
    for number, data in enumerate(samples.column("data")):
        encoded = data.as_buffer()
        try:
            decoded.append(_decode(encoded.to_pybytes(), processor, max_pixels))
        except ImageError as error:
            decoded.append(None)
            rejects.append({**_identity(samples, number), **_fault(error), "size_bytes": encoded.size})
    metadata = schema.metadata_fields(samples.schema, schema.SAMPLES)
    kept = samples.filter(pa.array([pixels is not None for pixels in decoded], pa.bool_()))
    pixels = pa.Table.from_pylist([row for row in decoded if row], pa.schema(list(schema.PIXELS)[3:]))
    columns = {name: kept.column(name) for name in schema.SAMPLES.names[:3]}
    columns |= {field.name: pixels.column(field.name) for field in pixels.schema}
    columns |= {field.name: kept.column(field.name) for field in metadata}
    table = pa.table(columns, pa.schema([*schema.PIXELS, *metadata]))
    return replace_rows(chunk, "decode", started, table, rejects)


def replace_rows(
    chunk: pa.Table, stage: str, started: float, rows: pa.Table, rejects: list[dict[str, Any]]
) -> pa.Table:
    """`chunk` with `rows` in the place of its rows, `rejects` added, and the stage's time noted."""
    earlier = schema.unpack(chunk.column("rejects")[0])
    added = pa.Table.from_pylist(rejects, schema.REJECTS)
    timings = json.loads(chunk.column("timings")[0].as_py())
    timings[stage] = time.time() - started
    columns = {name: chunk.column(name)[0].as_py() for name in ("stem", "chunk", "num_chunks", "error")}
    columns["amendments"] = chunk.column("amendments")[0].as_buffer()
    columns["rows"] = schema.pack(rows)
    columns["rejects"] = schema.pack(pa.concat_tables([earlier, added]))
    columns["timings"] = json.dumps(timings)
    return schema.chunk_row(columns)


def _decode(data: bytes, processor: CvtImageProcessor, max_pixels: int) -> dict[str, Any]:
    image = open_image(data, max_pixels)
    return {
        "pixels": processor.to_pixels(image.image_rgb).tobytes(),
        "width": image.width,
        "height": image.height,
        "format": image.format,
        "sha256": hashlib.sha256(data).digest(),
    }


def _identity(samples: pa.Table, number: int) -> dict[str, Any]:
    return {name: samples.column(name)[number].as_py() for name in schema.SAMPLES.names[:3]}


def _fault(error: ImageError) -> dict[str, str]:
    return {"reason": error.reason, "message": schema.safe_text(error.message)}
