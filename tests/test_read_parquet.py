"""Parquet shards: one sample a row; a file that is not whole or lacks a column fails."""

from __future__ import annotations

import datetime
import decimal
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.read_parquet import find_image_column
from pipeline.readers import read_shard
from tests.shard_files import Read, edit_bytes, file_work, options_for, read_file

IMAGES = pa.array([b"0", b"1", b"2"], pa.binary())


def write(folder: Path, columns: dict[str, Any], name: str = "x.parquet", **options: Any) -> Path:
    with (folder / name).open("wb") as file:  # pyarrow itself takes no name that is not UTF-8
        pq.write_table(pa.table(columns), file, **options)
    return folder / name


def read(path: Path, **changes: Any) -> Read:
    return read_file(path, "parquet", **changes)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_rows_of_a_bytes_column_are_numbered_over_all_row_groups(tmp_path: Path, kind: pa.DataType) -> None:
    images = pa.array([b"%d" % n for n in range(200)], kind)
    result = read(write(tmp_path, {"image": images}, row_group_size=70), chunk_images=64)
    assert result.error is None
    assert [row["data"] for row in result.rows] == [b"%d" % n for n in range(200)]
    assert [row["image_id"] for row in result.rows] == [f"x.parquet#{n}" for n in range(200)]
    assert result.keys == [str(n) for n in range(200)]


def test_hugging_faces_struct_of_bytes_and_path(tmp_path: Path) -> None:
    images = [
        {"bytes": b"0", "path": "a.png"},
        {"bytes": None, "path": "b.png"},
        None,
        {"bytes": b"", "path": None},
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    result = read(write(tmp_path, {"image": pa.array(images, kind), "label": [1, 2, 3, 4]}))
    assert [(row["key"], row["data"]) for row in result.rows] == [("0", b"0"), ("3", b"")]
    assert result.reasons == {"1": "no_image", "2": "no_image"}
    assert "b.png" in result.rejects[0]["message"]


def test_null_and_large_images_are_rejects_and_keep_the_numbers_of_the_others(tmp_path: Path) -> None:
    images = pa.array([b"0", None, b"2" * 11, b"3"])
    result = read(write(tmp_path, {"image": images}), max_image_bytes=10)
    assert result.keys == ["0", "3"]
    assert result.reasons == {"1": "no_image", "2": "too_large"}


def test_ids_come_from_their_column_with_rejects_for_duplicates_and_numbers_for_nulls(
    tmp_path: Path,
) -> None:
    columns = {"image": pa.array([b"0", b"1", b"2", b"3"]), "id": ["a", None, "a", "b"]}
    result = read(write(tmp_path, columns), id_column="id")
    assert [(row["image_id"], row["data"]) for row in result.rows] == [
        ("a", b"0"),
        ("x.parquet#1", b"1"),
        ("b", b"3"),
    ]
    assert result.reasons == {"a": "duplicate_id"}


def test_numeric_ids_are_written_as_text(tmp_path: Path) -> None:
    result = read(write(tmp_path, {"image": IMAGES, "id": [7, 8, 9]}), id_column="id")
    assert result.keys == ["7", "8", "9"]


DAY = datetime.date(2024, 2, 29)
METADATA = [
    pa.array([1, None, 3], pa.int16()),
    pa.array([0.5, None, float("inf")], pa.float32()),
    pa.array(["ü", None, ""], pa.string()),
    pa.array([True, None, False]),
    pa.array([DAY, None, DAY]),
    pa.array([decimal.Decimal("1.25"), None, decimal.Decimal("-3")], pa.decimal128(9, 3)),
    pa.array([1_700_000_000_123_456, None, 0], pa.timestamp("us", "UTC")),
    pa.array([1_700_000_000_123_456_789, None, 1], pa.timestamp("ns")),
    pa.array([[1, None], None, []], pa.list_(pa.int32())),
    pa.array([{"a": [{"b": "x"}]}, None, {"a": None}]),
    pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    pa.array(["x", None, "x"]).dictionary_encode(),
    pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float32(), 2)),
    pa.array([None, None, None], pa.null()),
]


@pytest.mark.parametrize("values", METADATA, ids=lambda values: str(values.type))
def test_metadata_keeps_its_type_and_values(tmp_path: Path, values: pa.Array) -> None:
    path = write(tmp_path, {"image": IMAGES, "m": values})
    field = pa.field("m", values.type)
    result = read(path, metadata=(field,), chunk_images=10)
    assert result.error is None
    from pipeline.schema import unpack

    rows = unpack(result.chunks[0].column("rows")[0])
    assert rows.schema.field("m") == field
    assert rows.column("m").combine_chunks().equals(pa.chunked_array([values]).combine_chunks())


def test_metadata_of_another_type_is_cast_or_fails_the_shard(tmp_path: Path) -> None:
    wanted = (pa.field("m", pa.int64()),)
    result = read(write(tmp_path, {"image": IMAGES, "m": pa.array([1, 2, 3], pa.int8())}), metadata=wanted)
    assert [row["m"] for row in result.rows] == [1, 2, 3]
    result = read(write(tmp_path, {"image": IMAGES, "m": ["x", "y", "z"]}), metadata=wanted)
    assert result.error


@pytest.mark.parametrize("kept", ["image", "id", "m"])
def test_a_file_that_lacks_a_column_fails_and_names_it(tmp_path: Path, kept: str) -> None:
    columns = {"image": IMAGES, "id": ["a", "b", "c"], "m": [1, 2, 3]}
    del columns[kept]
    result = read(
        write(tmp_path, columns),
        image_column="image",
        id_column="id",
        metadata=(pa.field("m", pa.int64()),),
    )
    assert f"no column {kept}" in (result.error or "")


def test_a_file_cut_or_damaged_anywhere_fails_or_gives_every_row(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = pa.array([rng.bytes(500) for _ in range(300)])
    path = write(tmp_path, {"image": images}, row_group_size=100, compression="zstd")
    whole = path.read_bytes()
    for cut in (0, 4, 8, 1000, len(whole) // 2, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert read(path).error, f"cut at {cut}: not noticed"
    for position in range(4, len(whole), len(whole) // 40):
        path.write_bytes(whole)
        edit_bytes(path, lambda data, at=position: data.__setitem__(at, data[at] ^ 0xFF))
        result = read(path)
        assert result.error or result.num_samples == 300


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no parquet" * 100])
def test_a_file_that_is_no_parquet_fails(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(data)
    assert read(tmp_path / "x.parquet").error


def test_an_empty_file_has_no_samples(tmp_path: Path) -> None:
    result = read(write(tmp_path, {"image": pa.array([], pa.binary())}))
    assert result.error is None
    assert result.num_samples == 0


@pytest.mark.parametrize(
    "values", [pa.array([1, 2, 3]), pa.array(["a", "b", "c"]), pa.array([[1], [2], [3]])], ids=str
)
def test_a_column_that_cannot_hold_images_fails_the_shard(tmp_path: Path, values: pa.Array) -> None:
    result = read(write(tmp_path, {"image": IMAGES, "m": values}), image_column="m")
    assert "m" in (result.error or "")


NOT_UTF8 = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff", b"c"]).buffers())


@pytest.mark.parametrize("place", ["id", "metadata", "path"])
def test_text_that_is_not_utf8_costs_no_more_than_its_shard(tmp_path: Path, place: str) -> None:
    images: pa.Array = IMAGES
    if place == "path":
        images = pa.StructArray.from_arrays([IMAGES, NOT_UTF8], ["bytes", "path"])
    path = write(tmp_path, {"image": images, "m": NOT_UTF8})
    changes = {"id": {"id_column": "m"}, "metadata": {"metadata": (pa.field("m", pa.string()),)}}
    result = read(path, **changes.get(place, {}))
    assert result.error or result.num_samples == 3


def test_a_date_that_python_does_not_know_costs_no_more_than_its_shard(tmp_path: Path) -> None:
    path = write(tmp_path, {"image": IMAGES, "m": pa.array([2**30, 0, 0], pa.date32())})
    result = read(path, metadata=(pa.field("m", pa.date32()),))
    assert result.error or result.num_samples == 3


def test_a_failing_file_whose_name_is_not_utf8_is_named_with_escapes(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.parquet")
    path = write(tmp_path, {"image": IMAGES}, name)
    result = read(path, id_column="id")
    assert "\\xff.parquet" in (result.error or "")


def test_the_image_column_is_image_or_the_only_one_that_can_be() -> None:
    one, two = pa.field("a", pa.binary()), pa.field("b", pa.struct([("bytes", pa.binary())]))
    text = pa.field("c", pa.string())
    assert find_image_column(pa.schema([text, one]), "x") == "a"
    assert find_image_column(pa.schema([text, two]), "x") == "b"
    assert find_image_column(pa.schema([one, two, pa.field("image", pa.binary())]), "x") == "image"
    with pytest.raises(InputError, match=r"input\.image_column: .*x.*a, b"):
        find_image_column(pa.schema([one, two]), "x")
    with pytest.raises(InputError, match="no column holds bytes"):
        find_image_column(pa.schema([text]), "x")


def test_a_large_row_group_passes_through_bounded_memory(tmp_path: Path) -> None:
    images = pa.array([os.urandom(1_000_000) for _ in range(150)])
    small_pages = {"compression": "none", "use_dictionary": False, "write_batch_size": 1}
    path = write(tmp_path, {"image": images}, row_group_size=1000, **small_pages)
    del images
    pool = pa.default_memory_pool()
    pool.release_unused()
    before, peak = pool.bytes_allocated(), 0
    for chunk in read_shard(file_work(path, "parquet"), options_for(chunk_images=8)):
        peak = max(peak, pool.bytes_allocated() - before)
        del chunk
    assert peak < 100_000_000, f"{peak:,} bytes of a file of {path.stat().st_size:,} were held at once"
    path.unlink()
