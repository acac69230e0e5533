"""Parts, and the one file of a shard that they become.

A run writes each chunk's results to `_staging/<run>/<stem>/`, under a path that a retried chunk writes
again, and sends the driver a tiny receipt. When every chunk of a shard has one, the parts are put in
place as its file in `embeddings/` and `rejects/`. Streams, so that memory does not grow with the shard.
Knows no Ray.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.commits import EMBEDDINGS, REJECTS, DataFile
from pipeline.shards import Work
from pipeline.storage import STAGING, Storage, sha256_of

PART = ".arrow"
_GROUP_ROWS, _GROUP_BYTES = 4096, 2**26
_EXAMPLES = 3  # rejects that a receipt tells of

Amendments = dict[str, dict[str, Any]]
"""What a shard's end told of earlier rows: key -> the columns to set."""


def write_chunk(chunk: pa.Table, output: Storage, run: str) -> pa.Table:
    """Write a CHUNK of embeddings rows as one part; returns its RECEIPTS row.

    One file holds all of a chunk, so that a retry replaces all of it.
    """
    started = time.time()
    receipt = {name: chunk.column(name)[0].as_py() for name in ("stem", "chunk", "num_chunks", "error")}
    rows, rejects = (schema.unpack(chunk.column(name)[0]) for name in ("rows", "rejects"))
    assert rows is not None
    assert rejects is not None
    part = f"{STAGING}/{run}/{receipt['stem']}/{receipt['chunk']:08d}{PART}"
    with output.replacing(part) as local, pa.ipc.new_file(str(local), schema.CHUNKS) as writer:
        writer.write_table(chunk.select(schema.CHUNKS.names))
    timings = json.loads(chunk.column("timings")[0].as_py())
    receipt |= {
        "timings": json.dumps(timings | {"write": time.time() - started}),
        "num_rows": rows.num_rows,
        "rejects_by_reason": json.dumps(Counter(rejects.column("reason").to_pylist())),
        "labels": json.dumps(
            Counter(rows.column("label").to_pylist() if "label" in rows.column_names else ())
        ),
        "examples": json.dumps(rejects.slice(0, _EXAMPLES).to_pylist()),
    }
    return pa.Table.from_pylist([receipt], schema.RECEIPTS)


def assemble(
    output: Storage, run: str, work: Work, table_schema: pa.Schema
) -> tuple[DataFile, DataFile | None, dict[str, int]]:
    """Make a shard's files of its parts, in `_staging/`; only the driver puts them in place.

    Returns the files, as they will be, and the number of rejects by reason. Rows of `work.carried`
    members are copied from the files that this shard supersedes.
    """
    found = output.find(f"{STAGING}/{run}/{work.stem}")
    parts = [info.path for info in found if info.path.endswith(PART)]  # a killed worker leaves others
    amendments = _amendments(_read_part(output, parts[-1], "amendments"))
    reasons: dict[str, int] = defaultdict(int)
    rows = _tables(output, work, parts, "rows", EMBEDDINGS, amendments)
    embeddings = _write_file(output, run, EMBEDDINGS, work.stem, rows, table_schema)
    counted = _count(_tables(output, work, parts, "rejects", REJECTS, amendments), reasons)
    rejects = _write_file(output, run, REJECTS, work.stem, counted, schema.REJECTS)
    return embeddings, rejects if rejects.num_rows else None, dict(reasons)


def put_in_place(output: Storage, run: str, file: DataFile) -> None:
    """Move an assembled file from `_staging/` to where readers find it."""
    output.move(f"{STAGING}/{run}/{file.path}", file.path)


def _read_part(output: Storage, path: str, cell: str) -> pa.Table | None:
    with output.open(path) as file, pa.ipc.open_file(file) as reader:
        return schema.unpack(reader.read_all().column(cell)[0])


def _tables(
    output: Storage, work: Work, parts: list[str], cell: str, kind: str, amendments: Amendments
) -> Iterator[pa.Table]:
    """What the chunks hold in `cell`, in their order; then what is carried over of superseded files."""
    for path in parts:
        table = _read_part(output, path, cell)
        assert table is not None
        if table.num_rows:
            yield _amend(table, amendments)
    if not work.carried:
        return
    keys = pa.array([schema.safe_text(path) for path in work.carried], pa.string())
    for path in [f"{kind}/{stem}.parquet" for stem in work.supersedes]:
        if kind == REJECTS and not output.exists(path):
            continue  # no image of that shard failed
        with output.open(path) as file:
            for batch in pq.ParquetFile(file).iter_batches():
                table = pa.Table.from_batches([batch])
                yield table.filter(pc.is_in(table.column(schema.KEY), keys))


def _count(tables: Iterable[pa.Table], reasons: dict[str, int]) -> Iterator[pa.Table]:
    for table in tables:
        for entry in table.column("reason").value_counts().to_pylist():
            reasons[entry["values"]] += entry["counts"]
        yield table


def _write_file(
    output: Storage,
    run: str,
    kind: str,
    stem: str,
    tables: Iterable[pa.Table],
    file_schema: pa.Schema,
) -> DataFile:
    path, num_rows = f"{kind}/{stem}.parquet", 0
    with output.replacing(f"{STAGING}/{run}/{path}") as local:
        with pq.ParquetWriter(local, file_schema, compression="zstd") as writer:
            for table in _row_groups(tables, file_schema):
                writer.write_table(table)
                num_rows += table.num_rows
        return DataFile(path, num_rows, local.stat().st_size, sha256_of(local))


def _row_groups(tables: Iterable[pa.Table], file_schema: pa.Schema) -> Iterator[pa.Table]:
    """Small parts gathered into row groups of about 4,096 rows or 64 MB."""
    pending: list[pa.Table] = []
    rows = size = 0
    for table in tables:
        pending.append(table.select(file_schema.names).cast(file_schema))
        rows, size = rows + table.num_rows, size + table.nbytes
        if rows >= _GROUP_ROWS or size >= _GROUP_BYTES:
            yield pa.concat_tables(pending).combine_chunks()
            pending, rows, size = [], 0, 0
    if pending:
        yield pa.concat_tables(pending).combine_chunks()


def _amendments(table: pa.Table | None) -> Amendments:
    amendments: Amendments = {}
    for row in table.to_pylist() if table is not None else ():
        columns = {name: value for name, value in row.items() if value is not None}
        amendments[columns.pop("amended_key")] = columns
    return amendments


def _amend(table: pa.Table, amendments: Amendments) -> pa.Table:
    """`table` with the amended columns of its rows set; itself where none of its keys is amended."""
    keys = table.column(schema.KEY).to_pylist() if amendments else []
    hits = {number: amendments[key] for number, key in enumerate(keys) if key in amendments}
    for name in sorted({name for columns in hits.values() for name in columns} & set(table.column_names)):
        values = table.column(name).to_pylist()
        for number, columns in hits.items():
            values[number] = columns.get(name, values[number])
        position = table.schema.get_field_index(name)
        field = table.schema.field(position)
        table = table.set_column(position, field, pa.array(values, field.type))
    return table
