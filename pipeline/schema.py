"""The Arrow schemas: the one contract between stages, and the only place where columns are named.

A stage takes a table and returns a table. What travels through Ray is a CHUNK row: at most
`chunk_images` samples of one shard, packed as Arrow IPC in one binary cell, so that a row can be
scheduled, retried and counted as a whole, and shards with different metadata can share a data set.

Order of a sample's life: SAMPLES (encoded bytes) -> PIXELS (decoded) -> embeddings rows; a sample that
fails anywhere leaves the stream as a row of REJECTS.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, Literal, get_args

import pyarrow as pa

IMAGE_ID = "image_id"
SHARD = "shard"
KEY = "key"

RejectReason = Literal[
    "empty",  # zero bytes
    "not_an_image",  # no decoder recognises it
    "truncated",  # the data ends early
    "corrupt",  # recognised, but cannot be decoded
    "unsupported",  # recognised, but this installation lacks the decoder
    "too_many_pixels",  # over limits.max_pixels
    "too_large",  # over limits.max_image_bytes, not even read
    "unreadable",  # the file or member could not be opened
    "no_image",  # a sample without an image: null bytes, or a key with metadata only
    "duplicate_id",  # the second sample with one id
    "crashed",  # its decoder died, each time it was tried
    "timeout",  # its decoder did not end within limits.image_timeout_s
]
REJECT_REASONS: tuple[str, ...] = get_args(RejectReason)

_IDENTITY = [
    pa.field(IMAGE_ID, pa.string(), nullable=False),
    pa.field(SHARD, pa.string(), nullable=False),
    pa.field(KEY, pa.string(), nullable=False),
]

REJECTS = pa.schema(
    [
        *_IDENTITY,
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64()),
    ]
)

SAMPLES = pa.schema([*_IDENTITY, pa.field("data", pa.large_binary(), nullable=False)])

PIXELS = pa.schema(
    [
        *_IDENTITY,
        pa.field("pixels", pa.large_binary(), nullable=False),  # H * W * 3 bytes, row-major RGB
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("sha256", pa.binary(32), nullable=False),
    ]
)

CHUNKS = pa.schema(
    [
        pa.field("stem", pa.string(), nullable=False),  # the shard's file stem, <shard>-<digest>
        pa.field("chunk", pa.int32(), nullable=False),  # 0, 1, ... within the shard
        pa.field("num_chunks", pa.int32()),  # on the shard's last chunk only
        pa.field("rows", pa.large_binary()),  # IPC: SAMPLES, then PIXELS, then embeddings rows
        pa.field("rejects", pa.large_binary()),  # IPC: REJECTS
        pa.field("amendments", pa.large_binary()),  # IPC: what the shard's end told of earlier rows
        pa.field("error", pa.string()),  # why the whole shard cannot be used
        pa.field("timings", pa.string()),  # JSON: {stage: seconds}, {stage}_started: epoch seconds
    ]
)

RECEIPTS = pa.schema(
    [
        *(CHUNKS.field(name) for name in ("stem", "chunk", "num_chunks", "error", "timings")),
        pa.field("num_rows", pa.int32(), nullable=False),
        pa.field("rejects_by_reason", pa.string(), nullable=False),  # JSON: {reason: count}
        pa.field("labels", pa.string(), nullable=False),  # JSON: {label: count}
        pa.field("examples", pa.string(), nullable=False),  # JSON: a few REJECTS rows, as dicts
    ]
)

INDEX_IDS = pa.schema(
    [
        pa.field("faiss_id", pa.int64(), nullable=False),
        pa.field(IMAGE_ID, pa.string(), nullable=False),
    ]
)

SEARCH_HITS = pa.schema(
    [
        pa.field("query", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),  # from 1
        pa.field(IMAGE_ID, pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),  # cosine
    ]
)

DUPLICATES = pa.schema(
    [
        pa.field("group", pa.int64(), nullable=False),  # 0 is the largest
        pa.field(IMAGE_ID, pa.string(), nullable=False),
        pa.field("similarity", pa.float32(), nullable=False),  # cosine to the representative
        pa.field("representative", pa.bool_(), nullable=False),  # the one with the most pixels
    ]
)

LABELS = pa.schema(
    [
        pa.field(IMAGE_ID, pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),  # "unknown" below the threshold
        pa.field("label_id", pa.int32(), nullable=False),  # -1 of unknown
        pa.field("score", pa.float32(), nullable=False),  # probability of the best class, known or not
        pa.field("margin", pa.float32()),  # score less the next class's; null where that is not known
        pa.field("runner_up", pa.string()),  # the next class; of unknown the best one
        pa.field("method", pa.string(), nullable=False),  # head, neighbours, probe, given or review
    ]
)

SUSPECTS = pa.schema(
    [
        pa.field("rank", pa.int64(), nullable=False),  # from 1, the most suspicious
        pa.field(IMAGE_ID, pa.string(), nullable=False),
        pa.field("given", pa.string(), nullable=False),
        pa.field("suggested", pa.string(), nullable=False),  # the likeliest other class
        pa.field("p_given", pa.float32(), nullable=False),
        pa.field("p_suggested", pa.float32(), nullable=False),
        pa.field("flagged", pa.bool_(), nullable=False),  # probably wrong, by confident learning
    ]
)

TRUTH = pa.schema(
    [
        pa.field("query", pa.int64(), nullable=False),  # faiss id of an indexed row
        pa.field("neighbours", pa.list_(pa.int64(), 200), nullable=False),  # -1 beyond the last
        pa.field("cosines", pa.list_(pa.float32(), 200), nullable=False),
        pa.field("floor", pa.float32(), nullable=False),  # every row above it is in the list
    ]
)

Logits = Literal["full", "none"] | int
"""`output.logits`: every logit, none, or the K largest as top_ids and top_logits."""


def embeddings_schema(
    *, dim: int, num_labels: int, logits: Logits, dtype: str, metadata: Iterable[pa.Field] = ()
) -> pa.Schema:
    """Schema of a file in `embeddings/`.

    `dim` is the embedding's width, `num_labels` the head's (0 without a head: then there are no logits
    and label columns), `dtype` float32 or float16 of the vectors. Metadata columns come last.
    """
    real = {"float32": pa.float32(), "float16": pa.float16()}[dtype]
    fields = [*_IDENTITY, pa.field("embedding", pa.list_(real, dim), nullable=False)]
    if num_labels and logits == "full":
        fields.append(pa.field("logits", pa.list_(real, num_labels), nullable=False))
    elif num_labels and isinstance(logits, int):
        k = min(logits, num_labels)
        fields.append(pa.field("top_ids", pa.list_(pa.int32(), k), nullable=False))
        fields.append(pa.field("top_logits", pa.list_(real, k), nullable=False))
    if num_labels:
        fields += [
            pa.field("label", pa.string(), nullable=False),
            pa.field("label_id", pa.int32(), nullable=False),
            pa.field("score", pa.float32(), nullable=False),
        ]
    fields += [PIXELS.field(name) for name in ("width", "height", "format", "sha256")]
    return pa.schema([*fields, *metadata])


def reserved_names() -> frozenset[str]:
    """Names that metadata columns must not take, in any configuration."""
    ours = embeddings_schema(dim=1, num_labels=1, logits="full", dtype="float32").names
    top = embeddings_schema(dim=1, num_labels=1, logits=1, dtype="float32").names
    inner = [*SAMPLES.names, *PIXELS.names]
    return frozenset([*ours, *top, *inner])


def metadata_fields(table_schema: pa.Schema, base: pa.Schema) -> list[pa.Field]:
    """The fields of `table_schema` beyond those of `base`: the metadata that travels with a sample."""
    return [field for field in table_schema if field.name not in base.names]


def pack(table: pa.Table) -> pa.Buffer:
    """A table as one Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def chunk_row(columns: dict[str, Any]) -> pa.Table:
    """A CHUNK of one row; packed tables (buffers) become its binary cells without a copy."""
    arrays = [_cell(columns.get(field.name), field.type) for field in CHUNKS]
    return pa.table(arrays, CHUNKS)


def _cell(value: Any, kind: pa.DataType) -> pa.Array:
    if not isinstance(value, pa.Buffer):
        return pa.array([value], kind)
    offsets = pa.py_buffer(struct.pack("=2q", 0, value.size))
    return pa.LargeBinaryArray.from_buffers(kind, 1, [None, offsets, value])


def unpack(cell: pa.Scalar) -> pa.Table | None:
    """The table in a binary cell of a CHUNK, zero-copy; None where the cell is null."""
    if not cell.is_valid:
        return None
    return pa.ipc.open_stream(cell.as_buffer()).read_all()


def safe_text(raw: str) -> str:
    """`raw` as valid UTF-8: bytes of a file name that are not are written as `\\xNN`."""
    return raw.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
