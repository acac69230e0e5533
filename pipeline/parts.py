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

AMENDMENTS = "amendments"
_GROUP_ROWS, _GROUP_BYTES = 4096, 2**26

Amendments = dict[str, dict[str, Any]]
"""What a shard's end told of earlier rows: key -> the columns to set."""


def write_chunk(chunk: pa.Table, output: Storage, run: str) -> pa.Table:
    """Write the parts of a CHUNK of embeddings rows, of one row; returns its RECEIPTS row."""
    started = time.time()
    receipt = {name: chunk.column(name)[0].as_py() for name in schema.CHUNKS.names[:3]}
    tables = {
        EMBEDDINGS: schema.unpack(chunk.column("rows")[0]),
        REJECTS: schema.unpack(chunk.column("rejects")[0]),
        AMENDMENTS: schema.unpack(chunk.column("amendments")[0]),
    }
    for kind, table in tables.items():
        if table is not None and table.num_rows:
            path = f"{STAGING}/{run}/{receipt['stem']}/{receipt['chunk']:08d}.{kind}.parquet"
            with output.replacing(path) as local:
                pq.write_table(table, local, compression="none", use_dictionary=False)
    timings = json.loads(chunk.column("timings")[0].as_py())
    rows, rejects = tables[EMBEDDINGS], tables[REJECTS]
    assert rows is not None
    assert rejects is not None
    receipt |= {
        "error": chunk.column("error")[0].as_py(),
        "timings": json.dumps(timings | {"write": time.time() - started}),
        "num_rows": rows.num_rows,
        "rejects_by_reason": json.dumps(Counter(rejects.column("reason").to_pylist())),
    }
    return pa.Table.from_pylist([receipt], schema.RECEIPTS)


def assemble(
    output: Storage, run: str, work: Work, table_schema: pa.Schema
) -> tuple[DataFile, DataFile | None, dict[str, int]]:
    """Make a shard's files of its parts, in `_staging/`; only the driver puts them in place.

    Returns the files, as they will be, and the number of rejects by reason. Rows of `work.carried`
    members are copied from the files that this shard supersedes.
    """
    parts = [info.path for info in output.find(f"{STAGING}/{run}/{work.stem}")]
    amendments = _read_amendments(output, parts)
    reasons: dict[str, int] = defaultdict(int)
    tables = _parts(output, work, parts, EMBEDDINGS, amendments)
    embeddings = _write_file(output, run, EMBEDDINGS, work.stem, tables, table_schema)
    counted = _count(_parts(output, work, parts, REJECTS, amendments), reasons)
    rejects = _write_file(output, run, REJECTS, work.stem, counted, schema.REJECTS)
    return embeddings, rejects if rejects.num_rows else None, dict(reasons)


def put_in_place(output: Storage, run: str, file: DataFile) -> None:
    """Move an assembled file from `_staging/` to where readers find it."""
    output.move(f"{STAGING}/{run}/{file.path}", file.path)


def _parts(
    output: Storage, work: Work, parts: list[str], kind: str, amendments: Amendments
) -> Iterator[pa.Table]:
    for path in parts:
        if path.endswith(f".{kind}.parquet"):
            with output.open(path) as file:
                yield _amend(pq.read_table(file), amendments)
    if not work.carried:
        return
    keys = pa.array([schema.safe_text(path) for path in work.carried], pa.string())
    for path in [f"{kind}/{stem}.parquet" for stem in work.supersedes]:
        if output.exists(path):
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


def _read_amendments(output: Storage, parts: list[str]) -> Amendments:
    amendments: Amendments = {}
    for path in parts:
        if path.endswith(f".{AMENDMENTS}.parquet"):
            with output.open(path) as file:
                for row in pq.read_table(file).to_pylist():
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
