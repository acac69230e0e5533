"""Parts: what was written chunk by chunk becomes one file a shard, in order and complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import schema
from pipeline.commits import DataFile
from pipeline.errors import PipelineError
from pipeline.parts import assemble, put_in_place, write_chunk
from pipeline.schema import embeddings_schema
from pipeline.shards import Member, Shard, Work
from pipeline.storage import STAGING, Storage, sha256_of

SCHEMA = embeddings_schema(
    dim=4, num_labels=3, logits="full", dtype="float32", metadata=[pa.field("txt", pa.string())]
)
WORK = Work(Shard("a.tar", "file:///in/a.tar", "webdataset", 1, "1"), "a.tar-0123456789abcdef")


@pytest.fixture
def output(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def rows(keys: str, table_schema: pa.Schema = SCHEMA) -> pa.Table:
    """Embeddings rows whose numbers tell their key."""
    vectors = {"embedding", "logits", "top_ids", "top_logits"} & set(table_schema.names)

    def value(field: pa.Field, key: str) -> Any:
        if field.name in vectors:
            kind = field.type.value_type.to_pandas_dtype()
            return np.full(field.type.list_size, ord(key), kind)
        texts = {"image_id": f"a.tar#{key}", "shard": "a.tar", "key": key, "label": "x", "format": "PNG"}
        known = {**texts, "sha256": key.encode() * 32, "txt": None, "score": 0.5}
        return known.get(field.name, ord(key))

    columns = [pa.array([value(field, key) for key in keys], field.type) for field in table_schema]
    return pa.Table.from_arrays(columns, schema=table_schema)


def rejects(keys: str, reason: str = "empty") -> pa.Table:
    found = [
        {"image_id": f"a.tar#{key}", "shard": "a.tar", "key": key, "reason": reason, "message": ""}
        for key in keys
    ]
    return pa.Table.from_pylist(found, schema.REJECTS)


def chunk_of(
    number: int, good: pa.Table, bad: pa.Table, amendments: pa.Table | None = None, stem: str = WORK.stem
) -> pa.Table:
    row = {
        "stem": stem,
        "chunk": number,
        "rows": schema.pack(good),
        "rejects": schema.pack(bad),
        "amendments": schema.pack(amendments) if amendments is not None else None,
        "timings": "{}",
    }
    return schema.chunk_row(row)


def finish(
    output: Storage, work: Work = WORK, table_schema: pa.Schema = SCHEMA
) -> tuple[pa.Table, Any, Any]:
    """Assemble and put in place; the embeddings, the rejects and their reasons."""
    embeddings, bad, reasons = assemble(output, "run", work, table_schema)
    for file in filter(None, (embeddings, bad)):
        put_in_place(output, "run", file)
        check_file(output, file)
    return read(output, embeddings), bad and read(output, bad), reasons


def read(output: Storage, file: DataFile) -> pa.Table:
    return pq.read_table(output.path(file.path), partitioning=None)


def check_file(output: Storage, file: DataFile) -> None:
    path = Path(output.path(file.path))
    assert (path.stat().st_size, sha256_of(path)) == (file.size_bytes, file.sha256)
    assert pq.read_metadata(path).num_rows == file.num_rows


def keys(table: pa.Table) -> str:
    return "".join(table.column("key").to_pylist())


def test_a_receipt_counts_the_rows_and_the_rejects_by_reason(output: Storage) -> None:
    bad = pa.concat_tables([rejects("xy"), rejects("z", "corrupt")])
    receipt = write_chunk(chunk_of(3, rows("ab"), bad), output, "run")
    assert receipt.schema == schema.RECEIPTS
    (row,) = receipt.to_pylist()
    assert (row["stem"], row["chunk"], row["num_rows"], row["error"]) == (WORK.stem, 3, 2, None)
    assert json.loads(row["rejects_by_reason"]) == {"empty": 2, "corrupt": 1}
    assert json.loads(row["timings"])["write"] >= 0


def test_chunks_are_assembled_in_their_order_whatever_order_they_came_in(output: Storage) -> None:
    for number in (10, 2, 0, 1):
        good, bad = rows("abcdefghijklm"[number]), rejects("ABCDEFGHIJKLM"[number])
        write_chunk(chunk_of(number, good, bad), output, "run")
    embeddings, bad, reasons = finish(output)
    assert (keys(embeddings), keys(bad), reasons) == ("abck", "ABCK", {"empty": 4})
    assert embeddings.schema.equals(SCHEMA)
    assert bad.schema.equals(schema.REJECTS)
    assert embeddings.column("embedding").to_pylist()[3] == [ord("k")] * 4


def test_without_rejects_there_is_no_file_of_them(output: Storage) -> None:
    write_chunk(chunk_of(0, rows("a"), rejects("")), output, "run")
    _, bad, reasons = finish(output)
    assert (bad, reasons) == (None, {})
    assert output.find("rejects") == []


def test_a_shard_without_any_sample_has_an_empty_file_with_every_column(output: Storage) -> None:
    write_chunk(chunk_of(0, rows(""), rejects("")), output, "run")
    embeddings, bad, _ = finish(output)
    assert embeddings.num_rows == 0
    assert embeddings.schema.equals(SCHEMA)
    assert bad is None


def test_a_chunk_that_is_written_again_replaces_what_it_wrote_before(output: Storage) -> None:
    write_chunk(chunk_of(0, rows("ab"), rejects("c")), output, "run")
    write_chunk(chunk_of(0, rows("ad"), rejects("e", "corrupt")), output, "run")
    embeddings, bad, reasons = finish(output)
    assert (keys(embeddings), keys(bad), reasons) == ("ad", "e", {"corrupt": 1})


def test_a_chunk_that_fares_better_when_it_is_written_again_leaves_no_old_rejects(output: Storage) -> None:
    write_chunk(chunk_of(0, rows("a"), rejects("b", "unreadable")), output, "run")
    write_chunk(chunk_of(0, rows("ab"), rejects("")), output, "run")
    embeddings, bad, _ = finish(output)
    assert (keys(embeddings), bad) == ("ab", None)


def test_parts_of_another_run_or_shard_are_left_out(output: Storage) -> None:
    write_chunk(chunk_of(0, rows("a"), rejects("")), output, "run")
    write_chunk(chunk_of(1, rows("b"), rejects("")), output, "earlier-run")
    write_chunk(chunk_of(1, rows("c"), rejects(""), stem=WORK.stem + "0"), output, "run")
    assert keys(finish(output)[0]) == "a"


def test_what_a_killed_worker_had_half_written_is_no_part(output: Storage) -> None:
    write_chunk(chunk_of(0, rows("a"), rejects("")), output, "run")
    output.write_bytes(f"{STAGING}/run/{WORK.stem}/.tmp-0123", b"half of a par")
    assert keys(finish(output)[0]) == "a"


def test_nothing_is_in_place_before_it_is_put_there(output: Storage) -> None:
    write_chunk(chunk_of(0, rows("a"), rejects("b")), output, "run")
    assemble(output, "run", WORK, SCHEMA)
    assert {info.path.split("/")[0] for info in output.find()} == {STAGING}


def test_amendments_set_what_they_name_in_rows_and_rejects_and_nothing_else(output: Storage) -> None:
    changes = [
        {"amended_key": "a", "key": "a.jpg", "image_id": "a.tar#a.jpg", "txt": "text of a"},
        {"amended_key": "c", "txt": "text of c"},
        {"amended_key": "x", "key": "x.jpg", "image_id": "a.tar#x.jpg"},
    ]
    write_chunk(chunk_of(0, rows("ab"), rejects("x")), output, "run")
    write_chunk(chunk_of(1, rows("c"), rejects("y"), pa.Table.from_pylist(changes)), output, "run")
    embeddings, bad, _ = finish(output)
    found = embeddings.select(["image_id", "key", "txt"]).to_pylist()
    assert [tuple(row.values()) for row in found] == [
        ("a.tar#a.jpg", "a.jpg", "text of a"),
        ("a.tar#b", "b", None),
        ("a.tar#c", "c", "text of c"),
    ]
    assert bad.column("image_id").to_pylist() == ["a.tar#x.jpg", "a.tar#y"]
    assert embeddings.schema.equals(SCHEMA)


def redone(old: Work, carried: str) -> Work:
    members = tuple(Member(key, 1, "1") for key in "abcx")
    shard = Shard("images-1", "file:///in", "images", members=members)
    return Work(shard, shard.stem("f"), (old.stem,), frozenset(carried))


def test_rows_and_rejects_of_unchanged_members_are_copied_as_they_are(output: Storage) -> None:
    write_chunk(chunk_of(0, rows("abc"), rejects("xy")), output, "run")
    before = finish(output)[0]
    work = redone(WORK, "acx")
    write_chunk(chunk_of(0, rows("b"), rejects("y", "corrupt"), stem=work.stem), output, "run")
    after, bad, reasons = finish(output, work)
    assert sorted(keys(after)) == ["a", "b", "c"]
    assert after.sort_by("key").equals(before.sort_by("key"))
    assert (sorted(keys(bad)), reasons) == (["x", "y"], {"empty": 1, "corrupt": 1})


def test_rows_to_copy_that_are_gone_are_an_error_and_no_silent_loss(output: Storage) -> None:
    write_chunk(chunk_of(0, rows("abc"), rejects("")), output, "run")
    finish(output)
    output.delete(f"embeddings/{WORK.stem}.parquet")
    work = redone(WORK, "ac")
    write_chunk(chunk_of(0, rows("b"), rejects(""), stem=work.stem), output, "run")
    with pytest.raises((OSError, PipelineError)):
        assemble(output, "run", work, SCHEMA)


IDENTITY = ["image_id", "shard", "key", "embedding"]
LABELS = ["label", "label_id", "score"]
ORIGINAL = ["width", "height", "format", "sha256"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("num_labels", "logits", "columns"),
    [
        (7, "full", [*IDENTITY, "logits", *LABELS, *ORIGINAL]),
        (7, "none", [*IDENTITY, *LABELS, *ORIGINAL]),
        (7, 3, [*IDENTITY, "top_ids", "top_logits", *LABELS, *ORIGINAL]),
        (7, 9, [*IDENTITY, "top_ids", "top_logits", *LABELS, *ORIGINAL]),
        (0, "full", [*IDENTITY, *ORIGINAL]),
        (0, 3, [*IDENTITY, *ORIGINAL]),
    ],
)
def test_the_columns_of_the_file_are_those_of_the_contract(
    output: Storage, num_labels: int, logits: Any, columns: list[str], dtype: str
) -> None:
    wanted = embeddings_schema(dim=4, num_labels=num_labels, logits=logits, dtype=dtype)
    write_chunk(chunk_of(0, rows("ab", wanted), rejects("")), output, "run")
    found = finish(output, table_schema=wanted)[0].schema
    assert found.equals(wanted)
    assert found.names == columns
    real = pa.float16() if dtype == "float16" else pa.float32()
    k = 3 if logits == 3 else 7
    types = {
        **dict.fromkeys(["image_id", "shard", "key", "label", "format"], pa.string()),
        **dict.fromkeys(["width", "height", "label_id"], pa.int32()),
        "embedding": pa.list_(real, 4),
        "logits": pa.list_(real, 7),
        "top_ids": pa.list_(pa.int32(), k),
        "top_logits": pa.list_(real, k),
        "score": pa.float32(),
        "sha256": pa.binary(32),
    }
    assert {field.name: field.type for field in found} == {name: types[name] for name in columns}
