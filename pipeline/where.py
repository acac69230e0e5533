"""`search --where`: the committed rows for which an SQL expression is true.

Enters: an output, its committed files and one boolean expression over their columns. Leaves: image ids.
An expression never becomes a statement: DuckDB parses it, its tree may have only what a filter needs, and
it is evaluated without files, network and extensions. Must not know: the index, commits, command lines.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds

from pipeline.errors import SearchError
from pipeline.schema import IMAGE_ID
from pipeline.storage import Storage

_CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": False,
    "autoload_known_extensions": False,
    "autoinstall_known_extensions": False,
    "python_enable_replacements": False,
    "temp_directory": "",
    "memory_limit": "1GB",
    "threads": 4,
    "lock_configuration": True,
}
_READ_THREADS = 16
_GRACE_S, _POLL_S = 2.0, 0.05
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
    date_diff date_part date_trunc day dayofweek ends_with epoch exp floor from_hex greatest hour if
    ilike_escape isfinite isinf isnan json_array_length json_contains json_exists json_extract
    json_extract_string json_type json_valid least left len length like_escape list_avg list_contains
    list_max list_min list_sum ln log10 log2 lower ltrim make_date minute mod month not_ilike_escape
    not_like_escape now nullif octet_length position pow prefix regexp_extract regexp_full_match
    regexp_matches reverse right round rtrim second sign split_part sqrt starts_with strip_accents strpos
    strptime substr substring suffix timezone to_days to_hours to_minutes to_months to_seconds to_timestamp
    to_weeks to_years today trim trunc try_strptime unhex upper week year """


def matching_ids(
    output: Storage, commit_files: Sequence[str], expression: str, *, timeout_s: float = 30.0
) -> pa.ChunkedArray:
    """image_id (string) of every row of these files for which `expression` is true.

    `commit_files` are relative to the output (`embeddings/x.parquet`); one that has gone since is left out.
    A column that only some files have is NULL in the others; one that is not named is not read.

    SQL is DuckDB's: comparisons, AND, OR, NOT, IN (...), BETWEEN, LIKE, ILIKE, IS NULL, CASE, CAST to plain
    types, arithmetic and `_FUNCTIONS`. `sha256 = from_hex('9f86...')` finds an image by the hash of its
    bytes; `embedding[1] > 0` is of the first number; `json->>'$.author' = 'x'` looks into a JSON text;
    regexp_matches(label, '^cat') takes RE2; `score > 0.9` compares in float32, NaN above all numbers.

    Raises SearchError for what is not one boolean expression over the columns, fails at a row, or takes
    more than `timeout_s`, opening the files not counted.
    """
    connection = duckdb.connect(":memory:", config=_CONFIG)
    named = _columns_in(connection, expression)
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        opened = pool.map(lambda path: _open(output, path), commit_files)
    files = dict(zip(commit_files, opened, strict=True))
    deadline = time.monotonic() + timeout_s
    while there := {path: fragment for path, fragment in files.items() if fragment is not None}:
        rows = _rows(list(there.values()), named)
        try:
            return _query(connection, rows, expression, deadline)
        except (TimeoutError, duckdb.InterruptException) as error:
            raise _refusal(f"took more than {timeout_s:g} s and was stopped") from error
        except duckdb.Error as error:
            files = {path: fragment for path, fragment in there.items() if output.exists(path)}
            if len(files) == len(there):
                raise _refusal(f"fails: {error}", _CHANGE_IT) from error
    return pa.chunked_array([], pa.string())


def _refusal(reason: str, remedy: str = _EXAMPLE) -> SearchError:
    return SearchError(f"--where {reason.splitlines()[0]}; {remedy}")


def _columns_in(connection: duckdb.DuckDBPyConnection, expression: str) -> set[str]:
    """The columns that it names; SearchError where it is not one expression, or not only a filter."""
    if not expression.strip():
        raise _refusal("is empty")
    _parse(connection, f"({expression}\n)")  # in parentheses no clause and no statement can follow it ...
    nodes = _parse(connection, expression)  # ... and without them it can close none
    for node in reversed(nodes):  # the outermost first
        _check(node)
    return {node["column_names"][0] for node in nodes if node["class"] == "COLUMN_REF"}


def _parse(connection: duckdb.DuckDBPyConnection, condition: str) -> list[dict[str, Any]]:
    """The nodes of DuckDB's tree of a query that ends with this condition, each after those within it."""
    statement, nodes = f"SELECT 1 FROM rows WHERE {condition}\n", []

    def collect(item: dict[str, Any]) -> dict[str, Any]:
        nodes.append(item)
        return item

    (row,) = connection.execute("SELECT json_serialize_sql(?)", [statement]).fetchall()
    try:
        parsed = json.loads(row[0], object_hook=collect)
    except RecursionError as error:
        raise _refusal("is nested too deeply") from error
    if parsed["error"]:
        raise _refusal(f"is not understood: {parsed['error_message']}")
    return [node for node in nodes if "class" in node]


def _check(node: dict[str, Any]) -> None:
    part = node["type"] if node["class"] == "OPERATOR" else node["class"]
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


def _open(output: Storage, path: str) -> ds.Fragment | None:
    """The file with its footer; None where it has gone."""
    try:
        with output.failures(path):
            [fragment] = ds.dataset(output.path(path), pa.schema([]), "parquet", output.fs).get_fragments()
            fragment.ensure_complete_metadata()
            return fragment
    except FileNotFoundError:
        return None
    except pa.ArrowInvalid as error:
        raise SearchError(f"--where: {path} is damaged; run: cvt-pipeline verify {output.uri}") from error


def _rows(files: list[ds.Fragment], named: set[str]) -> ds.Dataset:
    """The rows of these files, with the named columns and no others."""
    schemas = [fragment.physical_schema for fragment in files]
    known = list(dict.fromkeys(name for schema in schemas for name in schema.names))
    if unknown := named.difference(known):
        raise _refusal(f"names {', '.join(sorted(unknown))}, the columns are {', '.join(known)}")
    columns = named | {IMAGE_ID}
    if len({name.lower() for name in columns}) < len(columns):
        raise _refusal("names columns that differ in case alone, which SQL does not tell apart")
    parts = [[field for field in schema if field.name in columns] for schema in schemas]
    readable = [pa.schema([field.with_type(_readable(field.type)) for field in part]) for part in parts]
    try:
        unified = pa.unify_schemas(readable, promote_options="permissive")
    except pa.ArrowTypeError as error:
        raise _refusal(f"names a column that is of another type in some files ({error})") from error
    return ds.FileSystemDataset(files, unified, ds.ParquetFileFormat())


def _readable(kind: pa.DataType) -> pa.DataType:
    """DuckDB knows no float16, alone or in vectors."""
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_readable(kind.value_type), kind.list_size)
    return pa.float32() if pa.types.is_float16(kind) else kind


def _query(
    connection: duckdb.DuckDBPyConnection, rows: ds.Dataset, expression: str, deadline: float
) -> pa.ChunkedArray:
    """What `_evaluate` returns. After a TimeoutError its thread stays until its chunk of rows is done."""
    pool = ThreadPoolExecutor(1)
    ids = pool.submit(_evaluate, connection, rows, expression)
    pool.shutdown(wait=False)
    wait([ids], max(deadline - time.monotonic(), 0))
    while not ids.done() and time.monotonic() < deadline + _GRACE_S:
        connection.interrupt()  # again and again: one that comes between two queries is lost
        wait([ids], _POLL_S)
    return ids.result(0)


def _evaluate(connection: duckdb.DuckDBPyConnection, rows: ds.Dataset, expression: str) -> pa.ChunkedArray:
    connection.register("rows", rows)
    kind = str(connection.sql(f"SELECT ({expression}\n) FROM rows").types[0])
    if kind != "BOOLEAN":
        raise _refusal(f"is of type {kind}, not BOOLEAN")
    found = connection.sql(f"SELECT {IMAGE_ID} FROM rows WHERE ({expression}\n)")
    return found.to_arrow_table().column(0).cast(pa.string())
