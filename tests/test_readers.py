"""Readers: samples are packed into bounded chunks, and every one of them is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import schema
from pipeline.readers import read_shard
from tests.conftest import WriteImages
from tests.shard_files import file_work, group_work, options_for, read_work, write_tar


@pytest.mark.parametrize(
    ("count", "chunk_images", "sizes"), [(0, 4, [0]), (3, 4, [3]), (4, 4, [4]), (9, 4, [4, 4, 1])]
)
def test_chunks_are_numbered_and_the_last_one_knows_their_number(
    tmp_path: Path, count: int, chunk_images: int, sizes: list[int]
) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"{n}.jpg", b"x") for n in range(count)])
    work = file_work(path, "webdataset")
    chunks = pa.concat_tables(read_shard(work, options_for(chunk_images=chunk_images))).to_pylist()
    assert [chunk["chunk"] for chunk in chunks] == list(range(len(sizes)))
    assert [chunk["num_chunks"] for chunk in chunks] == [None] * (len(sizes) - 1) + [len(sizes)]
    assert {chunk["stem"] for chunk in chunks} == {work.stem}
    assert [chunk["error"] for chunk in chunks] == [None] * len(sizes)
    for chunk in chunks:
        timings = json.loads(chunk["timings"])
        assert timings["read"] >= 0
        assert timings["read_started"] > 1e9


def test_the_first_chunk_is_as_small_as_is_asked_for(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"{n}.jpg", b"x") for n in range(9)])
    options = options_for(chunk_images=4, first_images=2)
    chunks = pa.concat_tables(read_shard(file_work(path, "webdataset"), options)).to_pylist()
    assert [schema.unpack(pa.scalar(chunk["rows"])).num_rows for chunk in chunks] == [2, 4, 3]


def test_rejects_count_towards_a_chunk_too(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"{n}.txt", b"x") for n in range(10)])
    result = read_work(file_work(path, "webdataset"), options_for(chunk_images=4))
    assert [schema.unpack(chunk.column("rejects")[0]).num_rows for chunk in result.chunks] == [4, 4, 2]


def test_the_chunks_of_a_shard_are_the_same_each_time_it_is_read(
    tmp_path: Path, write_images: WriteImages
) -> None:
    names = write_images(tmp_path, 10)
    work = group_work(tmp_path, names)
    one, two = (read_work(work, options_for()) for _ in range(2))
    assert one.rows == two.rows
    for left, right in zip(one.chunks, two.chunks, strict=True):
        assert left.column("rows") == right.column("rows")


def test_a_shard_that_fails_ends_with_its_error_and_no_number_of_chunks(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"{n}.jpg", b"x" * 600) for n in range(6)])
    path.write_bytes(path.read_bytes()[: 10 * 512])
    result = read_work(file_work(path, "webdataset"), options_for(chunk_images=2))
    assert result.error
    assert [chunk.column("num_chunks")[0].as_py() for chunk in result.chunks] == [None] * len(result.chunks)


def test_a_second_sample_with_an_id_is_a_reject_wherever_it_stands(tmp_path: Path) -> None:
    entries = [("a.jpg", b"1"), *((f"{n}.jpg", b"x") for n in range(10)), ("a.jpg", b"22")]
    path = write_tar(tmp_path / "x.tar", entries)
    result = read_work(file_work(path, "webdataset"), options_for(chunk_images=3))
    assert result.num_samples == 12
    (reject,) = result.rejects
    assert (reject["image_id"], reject["reason"], reject["size_bytes"]) == ("x.tar#a", "duplicate_id", 2)


def test_amendments_travel_with_the_last_chunk_alone(tmp_path: Path) -> None:
    entries = [(f"{n}.jpg", b"x") for n in range(5)] + [(f"{n}.txt", b"t") for n in range(5)]
    path = write_tar(tmp_path / "x.tar", entries)
    options = options_for(chunk_images=2, metadata=(pa.field("txt", pa.string()),))
    result = read_work(file_work(path, "webdataset"), options)
    present = [chunk.column("amendments")[0].is_valid for chunk in result.chunks]
    assert present == [False] * (len(present) - 1) + [True]
    assert {row["amended_key"]: row["txt"] for row in result.amendments} == dict.fromkeys("01234", "t")
