"""`search --where`: the committed rows for which an SQL expression is true.

Enters: an output, its committed files and one boolean expression over their columns. Leaves: image ids.
An expression never becomes a statement: DuckDB parses it, its tree may have only what a filter needs, and
it is evaluated without files, network and extensions. Must not know: the index, commits, command lines.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from duckdb import DuckDBPyConnection

from pipeline.errors import SearchError
from pipeline.schema import IMAGE_ID
from pipeline.storage import Storage

_SETTINGS = """
    SET temp_directory = ''; SET memory_limit = '1GB'; SET threads = 4; SET enable_external_access = false;
    SET autoload_known_extensions = false; SET autoinstall_known_extensions = false;
    SET python_enable_replacements = false; SET lock_configuration = true
"""
_ROW = "number_of_the_row"
_THREADS, _AHEAD, _GRACE_S, _POLL_S = 8, 32, 2.0, 0.05
_EXAMPLE = "it takes one boolean expression over the columns: --where \"label = 'cat' AND width > 500\""
_CHANGE_IT = "use TRY_CAST where a value may not convert; if a file is damaged, cvt-pipeline verify tells"

# What an expression may consist of, by the names of DuckDB's parser. Nothing looks beyond the row, and no
# value outgrows its arguments: DuckDB neither counts nor interrupts what a function does within a chunk of
# rows, so that repeat(), range(), hex(hex()), [[x]::VARCHAR]::VARCHAR or a||a would pass every limit.
_PARTS = """ BETWEEN CASE CAST COLLATE COLUMN_REF COMPARISON CONJUNCTION CONSTANT FUNCTION TYPE
    ARRAY_EXTRACT COMPARE_IN COMPARE_NOT_IN OPERATOR_COALESCE OPERATOR_IS_NOT_NULL OPERATOR_IS_NULL
    OPERATOR_NOT OPERATOR_NULLIF OPERATOR_TRY STRUCT_EXTRACT """
_TYPES = """ bigint blob boolean date decimal double float hugeint int integer interval json numeric real
    smallint string text time timestamp timestamptz tinyint ubigint uinteger uuid varchar """
_FUNCTIONS = """ + - * / // % ** ^ & | ~ << >> @ ~~ !~~ ~~* !~~* ~~~ ^@ ->> abs array_length ceil contains
    date_diff date_part date_trunc day ends_with floor from_hex greatest hour if ilike_escape isfinite isinf
    isnan json_extract json_extract_string json_valid least left len length like_escape list_avg
    list_contains list_max list_min list_sum ln log10 lower ltrim mod month not_ilike_escape not_like_escape
    now nullif position pow prefix regexp_extract regexp_full_match regexp_matches right round rtrim sign
    split_part sqrt starts_with strptime substring suffix timezone to_days to_hours to_minutes to_months
    to_seconds to_timestamp to_weeks to_years today trim trunc try_strptime unhex upper week year """


def matching_ids(
    output: Storage, commit_files: Sequence[str], expression: str, *, timeout_s: float = 30.0
) -> pa.ChunkedArray:
    """image_id (string) of every row of these files for which `expression` is true, in the files' order.

    `commit_files` are relative to the output (`embeddings/x.parquet`); one that has gone since is left out.
    A column that only some files have is NULL in the others; one that is not named is not read.

    SQL is DuckDB's: comparisons, AND, OR, NOT, IN (...), BETWEEN, LIKE, ILIKE, IS NULL, CASE, CAST to plain
    types, arithmetic and `_FUNCTIONS`. `sha256 = from_hex('9f86...')` finds an image by the hash of its
    bytes; `embedding[1] > 0` is of the first number; `json->>'$.author' = 'x'` looks into a JSON text;
    regexp_matches(label, '^cat') takes RE2; `score > 0.9` compares in float32, NaN above all numbers.

    Raises SearchError for what is not one boolean expression over the columns, fails at a row, or takes
    more than `timeout_s`, reading the files' footers not counted; StorageError for a file out of reach.
    """
    connection = _connect()
    named = _columns_in(connection, expression)
    with ThreadPoolExecutor(_THREADS) as pool:
        opened = list(pool.map(lambda path: _read(output, path), commit_files))
    files = {path: file.schema for path, file in zip(commit_files, opened, strict=True) if file is not None}
    if not files:
        return pa.chunked_array([], pa.string())
    tables = _tables(output, list(files), _unify(list(files.values()), named))
    return _query(timeout_s, connection, expression, tables, IMAGE_ID)


def columns_in(expression: str) -> set[str]:
    """The columns that an expression names; SearchError where it is not one boolean expression."""
    return _columns_in(_connect(), expression)


def matching_rows(
    tables: Callable[[Sequence[str]], Iterator[pa.Table]], expression: str, *, timeout_s: float = 30.0
) -> pa.ChunkedArray:
    """The numbers (int64), from 0 on, of the rows of some tables for which `expression` is true.

    `tables` gives them with the columns that are asked for, those that it names. Raises SearchError as
    `matching_ids` does.
    """
    connection = _connect()
    named = sorted(_columns_in(connection, expression))

    def numbered() -> Iterator[pa.Table]:
        start = 0
        for table in tables(named):
            yield table.append_column(_ROW, pa.array(range(start, start + len(table)), pa.int64()))
            start += len(table)

    return _query(timeout_s, connection, expression, numbered(), _ROW)


def _connect() -> DuckDBPyConnection:
    connection = duckdb.connect(":memory:")
    connection.execute(_SETTINGS)
    return connection


def _refusal(reason: str, remedy: str = _EXAMPLE) -> SearchError:
    return SearchError(f"--where {reason.splitlines()[0]}; {remedy}")


def _columns_in(connection: DuckDBPyConnection, expression: str) -> set[str]:
    """The columns that it names; SearchError where it is not one expression, or not only a filter."""
    if not expression.strip():
        raise _refusal("is empty")
    _parse(connection, f"({expression}\n)")  # in parentheses no clause and no statement can follow it ...
    nodes = _parse(connection, expression)  # ... and without them it can close none
    return {node["column_names"][0] for node in nodes if _checked(node) == "COLUMN_REF"}


def _parse(connection: DuckDBPyConnection, condition: str) -> list[dict[str, Any]]:
    """The nodes of DuckDB's tree of a query that ends with this condition, each before those within it."""
    sql = f"SELECT 1 FROM rows WHERE {condition}\n"
    try:
        items = [json.loads(connection.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()[0][0])]
    except RecursionError as error:
        raise _refusal("is nested too deeply") from error
    if items[0]["error"]:
        raise _refusal(f"is not understood: {items[0]['error_message']}")
    for item in items:  # which grows meanwhile
        items += item.values() if isinstance(item, dict) else item if isinstance(item, list) else []
    return [item for item in items if isinstance(item, dict) and "class" in item]


def _checked(node: dict[str, Any]) -> str:
    part: str = node["type"] if node["class"] == "OPERATOR" else node["class"]
    if part not in _PARTS.split():
        raise _refusal(f"takes no {part.lower()}")
    if part == "FUNCTION":
        name = ".".join(filter(None, [node["schema"], node["function_name"].lower()]))
        if name.removeprefix("main.") not in _FUNCTIONS.split():
            raise _refusal(f"takes no function {name}, but {' '.join(_FUNCTIONS.split())}")
    if part == "CAST":  # DuckDB 1 writes cast_type
        kind = node["type_expr"]["type_name"] if "type_expr" in node else node["cast_type"]["id"]
        if kind.lower().removesuffix(" with time zone") not in _TYPES.split():
            raise _refusal(f"casts to no {kind}, but to {' '.join(_TYPES.split())}")
    return part


def _read(output: Storage, path: str, names: Sequence[str] = ()) -> pa.Table | None:
    """Those of the named columns that a file has, or all columns without rows; None where it has gone."""
    place = output.path(path)
    try:
        with output.failures(path):  # Storage.open would fetch 16 MiB with each column
            source = place if output.is_local else output.fs.open(place, "rb", cache_type="none")
            parquet = pq.ParquetFile(source, pre_buffer=False)
            there = [name for name in names if name in parquet.schema_arrow.names]
            return parquet.read(there, use_threads=False) if names else parquet.schema_arrow.empty_table()
    except FileNotFoundError:
        return None
    except pa.ArrowInvalid as error:
        raise SearchError(f"--where: {path} is damaged; run: cvt-pipeline verify {output.uri}") from error


def _unify(schemas: list[pa.Schema], named: set[str]) -> pa.Schema:
    """The named columns, and image_id, of types that fit all files."""
    known = list(dict.fromkeys(name for schema in schemas for name in schema.names))
    if unknown := named.difference(known):
        raise _refusal(f"names {', '.join(sorted(unknown))}, the columns are {', '.join(known)}")
    columns = named | {IMAGE_ID}
    if len({name.lower() for name in columns}) < len(columns):
        raise _refusal("names columns that differ in case alone, which SQL does not tell apart")
    parts = [pa.schema([field for field in schema if field.name in columns]) for schema in schemas]
    try:
        unified = pa.unify_schemas(parts, promote_options="permissive")
    except pa.ArrowTypeError as error:
        raise _refusal(f"names a column that is of another type in some files ({error})") from error
    return pa.schema([(field.name, _readable(field.type)) for field in unified])


def _readable(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_readable(kind.value_type), kind.list_size)
    return pa.float32() if pa.types.is_float16(kind) else kind  # which DuckDB does not know


def _tables(output: Storage, paths: list[str], columns: pa.Schema) -> Iterator[pa.Table]:
    """The rows of all files, of some files at a time."""
    read = partial(_read, output, names=columns.names)
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(paths), _AHEAD):
            there = [rows for rows in pool.map(read, paths[start : start + _AHEAD]) if rows is not None]
            yield pa.concat_tables([columns.empty_table(), *there], promote_options="permissive")


def _query(timeout_s: float, connection: DuckDBPyConnection, *work: Any) -> pa.ChunkedArray:
    """What `_evaluate` returns; if it takes too long, its thread ends after a chunk of rows."""
    pool, stop = ThreadPoolExecutor(1, "where"), threading.Event()
    ids = pool.submit(_evaluate, stop, connection, *work)
    pool.shutdown(wait=False)
    try:
        return ids.result(timeout_s)
    except TimeoutError as error:
        raise _refusal(f"took more than {timeout_s:g} s and was stopped") from error
    except duckdb.Error as error:
        raise _refusal(f"fails: {error}", _CHANGE_IT) from error
    finally:
        stop.set()
        until = time.monotonic() + _GRACE_S
        while not ids.done() and time.monotonic() < until:
            connection.interrupt()  # again and again: one that comes between two queries is lost
            wait([ids], _POLL_S)


def _evaluate(
    stop: threading.Event,
    connection: DuckDBPyConnection,
    expression: str,
    tables: Iterator[pa.Table],
    wanted: str,
) -> pa.ChunkedArray:
    """The `wanted` column of the rows for which the expression is true."""
    kind_wanted = pa.int64() if wanted == _ROW else pa.string()
    found: list[pa.Array] = []
    for rows in itertools.takewhile(lambda _: not stop.is_set(), tables):
        connection.register("rows", rows)
        kind = str(connection.sql(f"SELECT ({expression}\n) FROM rows").types[0])
        if kind != "BOOLEAN":
            raise _refusal(f"is of type {kind}, not BOOLEAN")
        chosen = connection.sql(f"SELECT {wanted} FROM rows WHERE ({expression}\n)").to_arrow_table()
        found += chosen.column(0).cast(kind_wanted).chunks
    return pa.chunked_array(found, kind_wanted)
