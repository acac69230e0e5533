"""Parquet files with a column of images: bytes, or Hugging Face's struct of bytes and path.

Streamed in small batches; only the columns that are needed are read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError, ShardError
from pipeline.samples import CHUNK_BYTES, ReadOptions, Sample
from pipeline.schema import safe_text
from pipeline.shards import Listing, Work
from pipeline.storage import Storage, parent_and_name, storage_errors

_BATCH_ROWS = 64
_BUFFER_BYTES = 2**20  # read a column's pages as they are needed, not a whole row group


def read_samples(work: Work, options: ReadOptions) -> Iterator[Sample]:
    """One sample a row. Raises ShardError for a file that is not whole or lacks a column."""
    folder, name = parent_and_name(work.shard.uri)
    try:
        with Storage(folder, options.storage_options).open(name) as file:
            parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES)
            image_column = find_image_column(parquet.schema_arrow, name, options.image_column)
            wanted = _columns(parquet.schema_arrow, image_column, options, name)
            number = 0
            for batch in parquet.iter_batches(_batch_rows(parquet), columns=wanted):
                for row in _rows(batch, options):
                    yield _sample(work, row, number, image_column, options)
                    number += 1
    except (pa.ArrowException, InputError, ValueError, OverflowError, *storage_errors()) as error:
        raise ShardError(f"not readable to its end: {error}") from error


def read_keys(work: Work, options: ReadOptions) -> Iterator[str]:
    """The key of every row, in their order: the id column's value, else the row's number."""
    folder, name = parent_and_name(work.shard.uri)
    try:
        with Storage(folder, options.storage_options).open(name) as file:
            parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES)
            if options.id_column is None:
                yield from map(str, range(parquet.metadata.num_rows))
                return
            number = 0
            for batch in parquet.iter_batches(columns=[options.id_column]):
                for value in batch.column(0).to_pylist():
                    yield str(number) if value is None else safe_text(str(value))
                    number += 1
    except (pa.ArrowException, ValueError, OverflowError, *storage_errors()) as error:
        raise ShardError(f"not readable to its end: {error}") from error


def read_image(work: Work, row: int, options: ReadOptions) -> bytes | None:
    """The encoded image of one row, from its own row group alone; None where it has none."""
    folder, name = parent_and_name(work.shard.uri)
    try:
        with Storage(folder, options.storage_options).open(name) as file:
            parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES)
            column = find_image_column(parquet.schema_arrow, name, options.image_column)
            for group in range(parquet.num_row_groups):
                rows = parquet.metadata.row_group(group).num_rows
                if row < rows:
                    return _nth_image(parquet.iter_batches(_BATCH_ROWS, [group], [column]), row)
                row -= rows
    except (pa.ArrowException, InputError, ValueError, OverflowError, *storage_errors()) as error:
        raise ShardError(f"not readable: {error}") from error
    return None


def _nth_image(batches: Iterator[pa.RecordBatch], row: int) -> bytes | None:
    for batch in batches:
        if row < len(batch):
            image: Any = batch.column(0)[row].as_py()
            data: bytes | None = image["bytes"] if isinstance(image, dict) else image
            return data
        row -= len(batch)
    return None


def _batch_rows(parquet: pq.ParquetFile) -> int:
    """Rows that are about as many bytes as a chunk may have, by the file's own account."""
    groups = [parquet.metadata.row_group(n) for n in range(parquet.metadata.num_row_groups)]
    largest = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=1.0)
    return max(1, min(_BATCH_ROWS, int(CHUNK_BYTES / max(1.0, largest))))


def first_schema(listing: Listing) -> tuple[str, pa.Schema] | None:
    """The path and schema of the first file that has a readable footer; None where no file has one."""
    for file in listing.files:
        with contextlib.suppress(pa.ArrowException, OSError), listing.root.open(file.path) as stream:
            return file.path, pq.read_schema(stream)
    return None


def find_image_column(table_schema: pa.Schema, name: str, wanted: str | None = None) -> str:
    """`wanted`, or the column called image, or the only one that can hold images.

    Raises InputError where there is no such column, or it holds something else than bytes.
    """
    able = [column.name for column in table_schema if _holds_images(column.type)]
    if wanted is not None:
        if wanted not in able:
            columns = ", ".join(f"{column.name} ({column.type})" for column in table_schema)
            raise InputError(
                f"input.image_column: {name} has no column {wanted} of bytes, or of a struct of bytes and "
                f"path; its columns: {columns}"
            )
        return wanted
    if "image" in able:
        return "image"
    if len(able) == 1:
        return str(able[0])
    found = f"columns that could: {', '.join(able)}" if able else "no column holds bytes"
    raise InputError(
        f"input.image_column: cannot tell which column of {name} holds the images ({found}); "
        f"its columns: {', '.join(table_schema.names)}"
    )


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(n).name == "bytes" for n in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _columns(table_schema: pa.Schema, image_column: str, options: ReadOptions, name: str) -> list[str]:
    named = [image_column, *([options.id_column] if options.id_column else [])]
    wanted = list(dict.fromkeys([*named, *options.metadata_names]))
    missing = [column for column in wanted if column not in table_schema.names]
    if missing:
        raise InputError(
            f"{name} has no column {', '.join(missing)}; it has {', '.join(table_schema.names)}"
        )
    return wanted


def _rows(batch: pa.RecordBatch, options: ReadOptions) -> list[dict[str, Any]]:
    for column in options.metadata:
        position = batch.schema.get_field_index(column.name)
        batch = batch.set_column(position, column, batch.column(position).cast(column.type))
    rows: list[dict[str, Any]] = batch.to_pylist()
    return rows


def _sample(
    work: Work, row: dict[str, Any], number: int, image_column: str, options: ReadOptions
) -> Sample:
    key = str(number)
    image_id = f"{safe_text(work.shard.name)}#{number}"
    if options.id_column and row[options.id_column] is not None:
        key = image_id = safe_text(str(row[options.id_column]))
    metadata = {name: row[name] for name in options.metadata_names}
    image, path = row[image_column], None
    if isinstance(image, dict):
        image, path = image["bytes"], image.get("path")
    if image is None:
        where = f", only a path: {path}" if path else ""
        return Sample(image_id, key, None, metadata, "no_image", f"the row has no bytes{where}")
    if len(image) > options.max_image_bytes:
        limit = f"over limits.max_image_bytes = {options.max_image_bytes:,}"
        message = f"{len(image):,} bytes are {limit}"
        return Sample(image_id, key, None, metadata, "too_large", message, len(image))
    return Sample(image_id, key, bytes(image), metadata)
