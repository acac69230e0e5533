"""`search --where` against NumPy over the same rows, and against those who want more than a filter."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import schema, where
from pipeline.errors import PipelineError, SearchError
from pipeline.storage import Storage

DIM, ROWS = 8, 600
HASH = hashlib.sha256(b"a.tar#7").hexdigest()
Column = npt.NDArray[Any]


def shard(name: str, rows: int = ROWS, dtype: str = "float32", **metadata: Any) -> pa.Table:
    """Rows as extract writes them, ids `name#0`, `name#1`, ..., with these metadata columns."""
    rng = np.random.default_rng(len(name) + sum(name.encode()))
    ids = [f"{name}#{number}" for number in range(rows)]
    extra = {
        key: values if isinstance(values, pa.Array) else pa.array(values)
        for key, values in metadata.items()
    }
    fields = [pa.field(key, values.type) for key, values in extra.items()]
    columns = {
        "image_id": ids,
        "shard": [name] * rows,
        "key": [str(number) for number in range(rows)],
        "embedding": list(rng.normal(size=(rows, DIM)).astype(dtype)),
        "top_ids": list(rng.integers(0, 9, (rows, 2)).astype(np.int32)),
        "top_logits": list(rng.normal(size=(rows, 2)).astype(dtype)),
        "label": rng.choice(["cat", "dog", "ant"], rows),
        "label_id": rng.integers(0, 3, rows),
        "score": rng.random(rows).astype(np.float32),
        "width": rng.integers(1, 1000, rows),
        "height": rng.integers(1, 1000, rows),
        "format": rng.choice(["JPEG", "PNG"], rows),
        "sha256": [hashlib.sha256(image_id.encode()).digest() for image_id in ids],
    }
    shape = schema.embeddings_schema(dim=DIM, num_labels=9, logits=2, dtype=dtype, metadata=fields)
    return pa.table({**columns, **extra}, shape)


def put(output: Storage, table: pa.Table, **options: Any) -> str:
    """Put a shard's rows in place as a commit does; returns the file's path."""
    path = f"embeddings/{table.column('shard')[0]}.parquet"
    with output.replacing(path) as local:
        pq.write_table(table, local, **options)
    return path


def is_null(column: Column) -> Column:
    return np.array([value is None for value in column])


@pytest.fixture
def output(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "out"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, list[str], dict[str, Column]]:
    """An output of two shards, their files, and all rows as NumPy columns."""
    days = [datetime(2024, 1, 1) + timedelta(days=number) for number in range(ROWS)]
    tables = [
        shard("a.tar"),
        shard(
            "b.tar",
            caption=[f"caption {number}" if number % 3 else None for number in range(ROWS)],
            taken=pa.array(days, pa.timestamp("us")),
            json=[json.dumps({"author": f"x{number % 5}"}) for number in range(ROWS)],
        ),
    ]
    output = Storage(str(tmp_path_factory.mktemp("where") / "out"))
    files = [put(output, table) for table in tables]
    rows = pa.concat_tables(tables, promote_options="default")
    return output, files, {name: np.array(rows.column(name).to_pylist()) for name in rows.column_names}


Oracle = Callable[[dict[str, Column]], Column]
ORACLES: dict[str, Oracle] = {
    "label = 'cat' AND width > 500": lambda c: (c["label"] == "cat") & (c["width"] > 500),
    "label IN ('cat', 'dog') OR NOT height < 900": lambda c: (c["label"] != "ant") | (c["height"] >= 900),
    "width BETWEEN 100 AND 200": lambda c: (c["width"] >= 100) & (c["width"] <= 200),
    "width % 2 = 0 AND width / height > 1.5": lambda c: (
        (c["width"] % 2 == 0) & (c["width"] / c["height"] > 1.5)
    ),
    "score > 0.9": lambda c: c["score"] > np.float32(0.9),
    "label LIKE 'c%' OR upper(format) ILIKE 'pn_'": lambda c: (
        (c["label"] == "cat") | (c["format"] == "PNG")
    ),
    "regexp_matches(label, '^[cd]') -- a comment": lambda c: c["label"] != "ant",
    "CASE WHEN width > 500 THEN label = 'cat' ELSE false END": lambda c: (
        (c["width"] > 500) & (c["label"] == "cat")
    ),
    "CAST(width AS VARCHAR) = '77' OR TRY_CAST(key AS INTEGER) = 5": lambda c: (
        (c["width"] == 77) | (c["key"] == "5")
    ),
    f"sha256 = from_hex('{HASH}')": lambda c: c["image_id"] == "a.tar#7",
    f"sha256 IN (unhex('{HASH}'), from_hex('00'))": lambda c: c["image_id"] == "a.tar#7",
    "image_id = 'b.tar#3'": lambda c: c["image_id"] == "b.tar#3",
    "embedding[1] > 0.5": lambda c: c["embedding"][:, 0] > 0.5,
    "list_contains(top_ids, 3)": lambda c: (c["top_ids"] == 3).any(axis=1),
    "list_max(top_logits) > 1": lambda c: c["top_logits"].max(axis=1) > 1,
    "\"label\" = 'cat' AND label <> 'a;b -- SELECT'": lambda c: c["label"] == "cat",
    "caption = 'caption 7'": lambda c: c["caption"] == "caption 7",
    "caption IS NULL": lambda c: is_null(c["caption"]),
    "caption <> 'caption 7'": lambda c: ~is_null(c["caption"]) & (c["caption"] != "caption 7"),
    "coalesce(caption, 'none') = 'none'": lambda c: is_null(c["caption"]),
    "taken >= '2024-06-01'": lambda c: np.array(
        [day is not None and day >= datetime(2024, 6, 1) for day in c["taken"]]
    ),
    "taken < DATE '2024-01-01' + INTERVAL 3 DAY": lambda c: np.array(
        [day is not None and day < datetime(2024, 1, 4) for day in c["taken"]]
    ),
    "json->>'$.author' = 'x3'": lambda c: c["json"] == '{"author": "x3"}',
}


@pytest.mark.parametrize("expression", ORACLES)
def test_the_rows_are_those_that_numpy_finds(
    expression: str, corpus: tuple[Storage, list[str], dict[str, Column]]
) -> None:
    output, files, columns = corpus

    found = where.matching_ids(output, files, expression)

    expected = columns["image_id"][ORACLES[expression](columns)].tolist()
    assert found.type == pa.string()
    assert sorted(found.to_pylist()) == sorted(expected)
    assert 0 < len(expected) < len(columns["image_id"])


def test_only_the_files_that_are_named_are_searched(output: Storage) -> None:
    first, _ = put(output, shard("a.tar", 3)), put(output, shard("b.tar", 3))

    assert where.matching_ids(output, [first], "true").to_pylist() == ["a.tar#0", "a.tar#1", "a.tar#2"]
    assert where.matching_ids(output, [], "width > 1").to_pylist() == []
    assert where.matching_ids(output, [first], "false").to_pylist() == []


def test_vectors_of_float16_can_be_asked_for_too(output: Storage) -> None:
    table = shard("a.tar", dtype="float16")

    found = where.matching_ids(output, [put(output, table)], "embedding[2] > 0.5")

    second = np.stack(table.column("embedding").to_numpy())[:, 1]
    assert found.to_pylist() == table.column("image_id").filter(pa.array(second > 0.5)).to_pylist()


def spoil(output: Storage, path: str, column: str) -> None:
    """Overwrite the data of one column, and nothing else of the file."""
    local = Path(output.path(path))
    chunks = pq.read_metadata(local).row_group(0)
    number = next(
        n for n in range(chunks.num_columns) if chunks.column(n).path_in_schema.startswith(column)
    )
    chunk = chunks.column(number)
    start = min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset)
    with local.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * chunk.total_compressed_size)


def test_a_column_that_is_not_named_is_not_read(output: Storage) -> None:
    path = put(output, shard("a.tar"))
    expected = where.matching_ids(output, [path], "label = 'cat'")
    spoil(output, path, "embedding")

    assert where.matching_ids(output, [path], "label = 'cat'").equals(expected)
    with pytest.raises(PipelineError, match=r"a\.tar\.parquet"):
        where.matching_ids(output, [path], "embedding[1] > 0")


def test_numbers_of_several_widths_are_one_column_and_other_types_are_refused(output: Storage) -> None:
    files = [
        put(output, shard("a.tar", 3, rating=pa.array([1, 2, 3], pa.int32()), note=["1", "2", "3"])),
        put(output, shard("b.tar", 3, rating=[1.5, 2.5, 3.5], note=[1, 2, 3])),
    ]

    assert where.matching_ids(output, files, "rating > 2.2").to_pylist() == [
        "a.tar#2",
        "b.tar#1",
        "b.tar#2",
    ]
    with pytest.raises(SearchError, match=r"--where names a column that is of another type .*note"):
        where.matching_ids(output, files, "note = 1")


def test_a_required_column_is_null_where_a_shard_lacks_it(output: Storage) -> None:
    table = shard("b.tar", 2, caption=["x", "y"])
    required = table.schema.set(
        table.schema.get_field_index("caption"), pa.field("caption", pa.string(), False)
    )
    files = [put(output, shard("a.tar", 2)), put(output, table.cast(required))]

    assert where.matching_ids(output, files, "caption IS NULL").to_pylist() == ["a.tar#0", "a.tar#1"]
    assert where.matching_ids(output, files, "caption = 'x'").to_pylist() == ["b.tar#0"]


def test_columns_that_differ_in_case_alone_are_told_apart_or_refused(output: Storage) -> None:
    files = [put(output, shard("a.tar", 2, Label=["x", "y"]))]

    assert where.matching_ids(output, files, "\"Label\" = 'y'").to_pylist() == ["a.tar#1"]
    with pytest.raises(SearchError, match="--where names columns that differ in case alone"):
        where.matching_ids(output, files, "\"Label\" = 'y' AND label = 'cat'")


def test_a_file_that_has_gone_is_left_out(output: Storage) -> None:
    files = [put(output, shard(name, 2)) for name in ("a.tar", "b.tar")]
    output.delete(files[0])

    assert where.matching_ids(output, files, "width > 0").to_pylist() == ["b.tar#0", "b.tar#1"]
    assert where.matching_ids(output, files[:1], "width > 0").to_pylist() == []


def test_a_file_that_goes_while_it_is_searched_is_left_out(
    output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [put(output, shard(name, 2)) for name in ("a.tar", "b.tar")]
    unify = where._unify

    def supersede(*arguments: Any) -> pa.Schema:
        output.delete(files[0])  # its footer has been read by now
        return unify(*arguments)

    monkeypatch.setattr(where, "_unify", supersede)

    assert where.matching_ids(output, files, "width > 0").to_pylist() == ["b.tar#0", "b.tar#1"]
    assert not output.exists(files[0])


def test_more_files_than_are_read_at_a_time_are_searched_in_their_order(output: Storage) -> None:
    names = [f"{number:03}.tar" for number in range(2 * where._AHEAD + 3)]
    files = [put(output, shard(name, 2)) for name in reversed(names)]

    found = where.matching_ids(output, files, "key = '1'").to_pylist()

    assert found == [f"{name}#1" for name in reversed(names)]


def test_a_damaged_file_is_named(output: Storage) -> None:
    path = put(output, shard("a.tar", 2))
    output.write_bytes(path, b"not Parquet at all")

    with pytest.raises(SearchError, match=r"a\.tar\.parquet is damaged; run: cvt-pipeline verify"):
        where.matching_ids(output, [path], "width > 0")


REFUSED = {
    "": "is empty",
    " \n ": "is empty",
    "-- nothing": "is not understood: syntax error",
    "width >": "is not understood: syntax error",
    "label = 'cat' /* and so on": "is not understood: unterminated",
    "width > 1;": "is not understood: syntax error",
    "width > 1; DROP TABLE rows": "is not understood: syntax error",
    "1=1); SELECT (1": "is not understood: syntax error",
    "width > 1) OR (width < 1": "is not understood: syntax error",
    "1=1) UNION SELECT image_id FROM rows --": "is not understood: syntax error",
    "1=1) UNION SELECT image_id FROM rows WHERE (1=1": "is not understood: syntax error",
    "1=1 UNION SELECT 'x'": "is not understood: syntax error",
    "width > 1 LIMIT 1": "is not understood: syntax error",
    "width > 1 ORDER BY width": "is not understood: syntax error",
    "width > 1 GROUP BY ALL": "is not understood: syntax error",
    "width > 1 QUALIFY true": "is not understood: syntax error",
    "SELECT true": "is not understood: syntax error",
    "(SELECT true)": "takes no subquery",
    "width IN (SELECT 1)": "takes no subquery",
    "EXISTS (FROM rows)": "takes no subquery",
    "width = (VALUES (1))": "takes no subquery",
    "(SELECT count(*) FROM range(1000000) a, range(1000000) b) > 0": "takes no subquery",
    "sum(width) > 1": "takes no function sum, but ",
    "count(*) > 1": "takes no function count",
    "row_number() OVER () > 1": "takes no window",
    "max(width) OVER () = width": "takes no window",
    "COLUMNS(*) > 1": "takes no star",
    "width > ?": "takes no parameter",
    "width > $1": "takes no parameter",
    "#1 > 1": "takes no positional_reference",
    "json -> 'a' = 'b'": "takes no lambda",
    "getenv('HOME') = 'x'": "takes no function getenv",
    "current_setting('threads') = '1'": "takes no function current_setting",
    "getvariable('x') = 1": "takes no function getvariable",
    "random() < 0.5": "takes no function random",
    "repeat(label, 1000000000) = 'x'": "takes no function repeat",
    "len(range(width * 1000000)) > 1": "takes no function range",
    "lpad(label, 1000000000, 'x') = 'x'": "takes no function lpad",
    "hex(hex(hex(label))) = 'x'": "takes no function hex",
    "label || label = 'catcat'": "takes no function ||",
    "ARRAY[ARRAY[label]::VARCHAR]::VARCHAR = 'x'": "takes no array_constructor",
    "label::INT[100000] IS NULL": "casts to no array, but to bigint",
    "label::STRUCT(a INT) IS NULL": "casts to no struct",
    "label.lower() = 'cat'": "takes no function label.lower",
    "system.main.read_text('x') = 'x'": "takes no function main.read_text",
    "nosuch = 1": "names nosuch, the columns are image_id, shard, key, embedding",
    'label = "cat"': "names cat, the columns are",
    "LABEL = 'cat'": "names LABEL, the columns are",
    "rows IS NOT NULL": "names rows, the columns are",
    "rowid = 1": "names rowid, the columns are",
    "current_user = 'duckdb'": "names current_user, the columns are",
    "width + 1": "is of type INTEGER, not BOOLEAN",
    "label": "is of type VARCHAR, not BOOLEAN",
    "label = 1": "fails: Conversion Error: .*use TRY_CAST",
    "lower(width) = 'x'": "fails: Binder Error: No function matches",
    "embedding > 1": "fails: Binder Error: Cannot compare",
    "regexp_matches(label, '(')": r"fails: .*missing \)",
    "NOT " * 2_000 + "true": "--where is (nested too deeply|not understood: Max expression depth)",
    "(" * 20_000 + "true" + ")" * 20_000: "--where is not understood",
}


@pytest.mark.parametrize("expression", REFUSED, ids=lambda text: text[:60])
def test_what_is_no_boolean_expression_over_the_columns_is_refused_with_the_remedy(
    expression: str, corpus: tuple[Storage, list[str], dict[str, Column]]
) -> None:
    output, files, _ = corpus

    with pytest.raises(SearchError, match=f"(?i){REFUSED[expression]}") as refusal:
        where.matching_ids(output, files[:1], expression)

    message = str(refusal.value)
    assert message.startswith("--where ")
    assert "\n" not in message
    assert "--where \"label = 'cat' AND width > 500\"" in message or "TRY_CAST" in message


READING = (
    "read_text('{0}') = 'x'",
    "read_blob('{0}') IS NOT NULL",
    "read_csv('{0}') IS NULL",
    "'x' IN (FROM read_text('{0}'))",
    "(SELECT content FROM read_text('{0}')) LIKE 'root%'",
    "EXISTS (FROM '{0}')",
    "EXISTS (FROM glob('{0}*'))",
    "parquet_metadata('{0}') IS NULL",
    "1=1) UNION ALL SELECT content FROM read_text('{0}') WHERE (1=1",
    "1=1 UNION ALL SELECT content FROM read_text('{0}')",
    "1=1; COPY (SELECT 1) TO '{0}'",
    "1=1); COPY (SELECT 1) TO '{0}'; SELECT (1=1",
    "COPY (SELECT 1) TO '{0}'",
    "1=1; ATTACH '{0}' AS other",
    "1=1; EXPORT DATABASE '{0}'",
    "1=1; INSTALL httpfs; LOAD httpfs",
    "1=1; SET enable_external_access = true",
    "json_execute_serialized_sql('{0}') IS NULL",
    "query('FROM read_text(''{0}'')') IS NULL",
)


@pytest.mark.parametrize("expression", READING)
def test_no_expression_reads_or_writes_a_file(
    expression: str, corpus: tuple[Storage, list[str], dict[str, Column]], tmp_path: Path
) -> None:
    output, files, _ = corpus
    for place in ("/etc/passwd", str(tmp_path / "written")):
        with pytest.raises(SearchError, match=r"--where (takes no|is not understood)") as refusal:
            where.matching_ids(output, files, expression.format(place))
        assert "root:" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "statement",
    [
        "FROM read_text('/etc/passwd')",
        "FROM '/etc/passwd'",
        "FROM glob('/etc/*')",
        "COPY (SELECT 1) TO '{0}/written.csv'",
        "ATTACH '{0}/written.db'",
        "EXPORT DATABASE '{0}/written'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "SET memory_limit = '1TB'",
        "FROM in_this_scope",
    ],
)
def test_even_a_statement_would_reach_no_file_no_setting_and_no_variable(
    statement: str, tmp_path: Path
) -> None:
    in_this_scope = pa.table({"secret": [1]})
    connection = duckdb.connect(":memory:")
    connection.execute(where._SETTINGS)

    with pytest.raises(duckdb.Error):
        connection.execute(statement.format(tmp_path)).fetchall()

    assert in_this_scope.num_rows == 1
    assert list(tmp_path.iterdir()) == []


SLOW = f"regexp_matches(caption, '{'(a?){900}' * 5}b')"  # a third of a millisecond a row


def slow_rows(count: int) -> pa.Table:
    ids = [str(number) for number in range(count)]
    return pa.table({"image_id": ids, "shard": ["slow.tar"] * count, "caption": ["a"] * count})


def at_work() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("where")]


def wait_for_its_end() -> None:
    for thread in at_work():
        thread.join(60)
    assert at_work() == []


def test_an_expression_that_takes_too_long_is_stopped(output: Storage) -> None:
    path = put(output, slow_rows(600_000))
    started = time.monotonic()

    with pytest.raises(SearchError, match=r"--where took more than 0\.3 s and was stopped"):
        where.matching_ids(output, [path], SLOW, timeout_s=0.3)
    wait_for_its_end()

    assert time.monotonic() - started < 60  # of 160 on a fast machine


def test_the_limit_holds_where_duckdb_heeds_no_interrupt(
    output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(output, slow_rows(1))
    end_of_chunk, evaluate = threading.Event(), where._evaluate

    def long_chunk(*work: Any) -> pa.ChunkedArray:
        end_of_chunk.wait(60)
        return evaluate(*work)

    monkeypatch.setattr(where, "_evaluate", long_chunk)
    monkeypatch.setattr(where, "_GRACE_S", 0.1)

    with pytest.raises(SearchError, match=r"--where took more than 0\.1 s and was stopped"):
        where.matching_ids(output, [path], SLOW, timeout_s=0.1)

    assert at_work()  # and nobody waits for it
    end_of_chunk.set()
    wait_for_its_end()


def test_nothing_more_is_read_once_the_time_is_over(
    output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, files = [], [f"embeddings/{number}.parquet" for number in range(20 * where._AHEAD)]

    def slow_storage(output: Storage, path: str, names: Sequence[str] = ()) -> pa.Table:
        if names:
            read.append(path)
            time.sleep(0.05)
        return pa.table({"image_id": [path]})

    monkeypatch.setattr(where, "_read", slow_storage)

    with pytest.raises(SearchError, match=r"--where took more than 0\.1 s and was stopped"):
        where.matching_ids(output, files, "image_id > 'x'", timeout_s=0.1)
    wait_for_its_end()

    assert len(read) <= 10 * where._AHEAD
