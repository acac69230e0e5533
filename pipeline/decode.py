"""Encoded samples to pixels: the decode stage, one task a chunk, as many at once as there are cores.

Enters: a CHUNK of SAMPLES. Leaves: the same CHUNK with PIXELS; images that cannot be decoded, or whose
decoder does not survive them, join its rejects. One bad image never costs another. Knows no model, and
does not import torch.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pyarrow as pa

from cvt_model.image_processor import CvtImageProcessor
from pipeline import schema
from pipeline.decoder import Decoded, DecodeOptions, Decoder, Failed, borrowed_decoder

__all__ = ["DecodeOptions", "decode_chunk", "replace_rows"]


def decode_chunk(chunk: pa.Table, processor: CvtImageProcessor, options: DecodeOptions) -> pa.Table:
    """A CHUNK of one row with its samples decoded to uint8 pixels (H, W, 3) of the processor's size.

    Raises DecoderError where no process can be started to decode in.
    """
    started = time.time()
    samples = schema.unpack(chunk.column("rows")[0])
    assert samples is not None
    with borrowed_decoder(
        processor, options
    ) as decoder:  # whose pixels are there as long as it is borrowed
        rows, rejects = _decode(samples, decoder)
        return replace_rows(chunk, "decode", started, rows, rejects)


def replace_rows(
    chunk: pa.Table, stage: str, started: float, rows: pa.Table, rejects: list[dict[str, Any]]
) -> pa.Table:
    """`chunk` with `rows` in the place of its rows, `rejects` added, and the stage's time noted.

    `started` is in seconds since the epoch.
    """
    earlier = schema.unpack(chunk.column("rejects")[0])
    added = pa.Table.from_pylist(rejects, schema.REJECTS)
    timings = json.loads(chunk.column("timings")[0].as_py())
    timings[f"{stage}_started"] = started
    timings[stage] = time.time() - started
    columns = {name: chunk.column(name)[0].as_py() for name in ("stem", "chunk", "num_chunks", "error")}
    columns["amendments"] = chunk.column("amendments")[0].as_buffer()
    columns["rows"] = schema.pack(rows)
    columns["rejects"] = schema.pack(pa.concat_tables([earlier, added]))
    columns["timings"] = json.dumps(timings)
    return schema.chunk_row(columns)


def _decode(samples: pa.Table, decoder: Decoder) -> tuple[pa.Table, list[dict[str, Any]]]:
    """PIXELS, with the samples' metadata, of what can be decoded, and REJECTS of the rest."""
    data, offsets = _encoded(samples.column("data"))
    outcomes, pixels = decoder.decode(data, offsets) if samples.num_rows else ([], memoryview(b""))
    rejects = [
        {
            **{name: samples.column(name)[number].as_py() for name in schema.SAMPLES.names[:3]},
            "reason": outcome.reason,
            "message": schema.safe_text(outcome.message),
            "size_bytes": offsets[number + 1] - offsets[number],
        }
        for number, outcome in enumerate(outcomes)
        if isinstance(outcome, Failed)
    ]
    columns = {name: samples.column(name) for name in samples.column_names if name != "data"}
    columns["pixels"] = _cells(pixels, decoder.image_bytes, samples.num_rows)
    nothing = Decoded(0, 0, "", bytes(32))  # in the place of a failed one, until these are taken out
    decoded = [nothing if isinstance(outcome, Failed) else outcome for outcome in outcomes]
    for name in Decoded._fields:
        columns[name] = pa.array([getattr(it, name) for it in decoded], schema.PIXELS.field(name).type)
    fields = [*schema.PIXELS, *schema.metadata_fields(samples.schema, schema.SAMPLES)]
    table = pa.table([columns[field.name] for field in fields], pa.schema(fields))
    if rejects:  # the only case that copies pixels here
        table = table.filter(pa.array([isinstance(outcome, Decoded) for outcome in outcomes], pa.bool_()))
    return table, rejects


def _encoded(column: pa.ChunkedArray) -> tuple[memoryview, list[int]]:
    """A large_binary column's bytes, without a copy where it is one chunk, and where each cell begins."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    _, offsets, data = array.buffers()
    if not len(array):
        return memoryview(b""), [0]
    begins = np.frombuffer(offsets, np.int64)[array.offset :][: len(array) + 1]
    return memoryview(data or b""), begins.tolist()


def _cells(data: memoryview, size: int, count: int) -> pa.Array:
    """`data` as `count` cells of `size` bytes each, without a copy."""
    offsets = np.arange(0, (count + 1) * size, size, dtype=np.int64)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), count, buffers)
