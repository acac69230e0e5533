"""Decoding: a bad image becomes a reject, and every other keeps its own pixels and metadata."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import pyarrow as pa
import pytest

from cvt_model.image_processor import CvtImageProcessor
from pipeline import schema
from pipeline.decode import DecodeOptions, decode_chunk
from tests.conftest import encode, make_image

PROCESSOR = CvtImageProcessor(size=32, crop_pct=0.875)
BAD = {"empty": b"", "not_an_image": b"hello, world" * 9, "truncated": encode(make_image(1))[:400]}


METADATA = [pa.field("txt", pa.string()), pa.field("tags", pa.list_(pa.int8()))]


def samples_of(images: list[bytes]) -> pa.Table:
    rows = [
        {"image_id": f"x#{n}", "shard": "x", "key": str(n), "data": data, "txt": f"text {n}", "tags": [n]}
        for n, data in enumerate(images)
    ]
    return pa.Table.from_pylist(rows, pa.schema([*schema.SAMPLES, *METADATA]))


def decode(images: list[bytes], max_pixels: int = 10**6) -> tuple[pa.Table, pa.Table, dict[str, Any]]:
    samples = samples_of(images)
    earlier = {"image_id": "x#r", "shard": "x", "key": "r", "reason": "unreadable", "message": "m"}
    row = {
        "stem": "s",
        "chunk": 4,
        "num_chunks": 5,
        "rows": schema.pack(samples),
        "rejects": schema.pack(pa.Table.from_pylist([earlier], schema.REJECTS)),
        "timings": '{"read": 1.5}',
    }
    result = decode_chunk(schema.chunk_row(row), PROCESSOR, DecodeOptions(max_pixels))
    assert result.schema == schema.CHUNKS
    (values,) = result.to_pylist()
    assert (values["stem"], values["chunk"], values["num_chunks"]) == ("s", 4, 5)
    rows, rejects = (schema.unpack(result.column(name)[0]) for name in ("rows", "rejects"))
    assert rows.schema == pa.schema([*schema.PIXELS, *METADATA])
    assert rejects.schema == schema.REJECTS
    assert rejects.to_pylist()[0] == {**earlier, "size_bytes": None}
    return rows, rejects.slice(1), values


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_pixels_are_the_processors_own_with_the_originals_size_format_and_hash(kind: str) -> None:
    data = encode(make_image(3, (60, 40)), kind)
    rows, rejects, _ = decode([data])
    assert rejects.num_rows == 0
    (row,) = rows.to_pylist()
    assert (row["width"], row["height"], row["format"]) == (60, 40, kind)
    assert row["sha256"] == hashlib.sha256(data).digest()
    assert len(row["pixels"]) == 32 * 32 * 3
    if kind == "PNG":
        assert row["pixels"] == PROCESSOR.to_pixels(make_image(3, (60, 40))).tobytes()


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [3, 0, 4, 1, 5, 2], [5, 4, 3, 2, 1, 0]])
def test_metadata_and_pixels_stay_with_their_image_among_bad_ones(order: list[int]) -> None:
    good = [encode(make_image(seed)) for seed in range(3)]
    images = [[*good, *BAD.values()][number] for number in order]
    rows, rejects, _ = decode(images)
    assert rows.num_rows == rejects.num_rows == 3
    for row in rows.to_pylist():
        number = int(row["key"])
        assert row["image_id"] == f"x#{number}"
        assert (row["txt"], row["tags"]) == (f"text {number}", [number])
        assert row["sha256"] == hashlib.sha256(images[number]).digest()
        seed = good.index(images[number])
        assert row["pixels"] == PROCESSOR.to_pixels(make_image(seed)).tobytes()
    reasons = list(BAD)
    for row in rejects.to_pylist():
        data = images[int(row["key"])]
        assert row["reason"] == reasons[list(BAD.values()).index(data)]
        assert row["size_bytes"] == len(data)
        assert row["message"]


def test_samples_that_come_in_several_pieces_keep_their_order() -> None:
    images = [encode(make_image(seed)) for seed in range(5)]
    whole = samples_of([*images[:2], b"", *images[2:]])
    pieces = pa.concat_tables([whole.slice(4), whole.slice(0, 1), whole.slice(1, 3)])
    row = {
        "rows": schema.pack(pieces),
        "rejects": schema.pack(schema.REJECTS.empty_table()),
        "timings": "{}",
    }
    result = decode_chunk(
        schema.chunk_row({**row, "stem": "s", "chunk": 0}), PROCESSOR, DecodeOptions(10**6)
    )
    rows, rejects = (schema.unpack(result.column(name)[0]) for name in ("rows", "rejects"))
    assert rows.column("key").to_pylist() == ["4", "5", "0", "1", "3"]
    assert rejects.column("key").to_pylist() == ["2"]
    for row, seed in zip(rows.to_pylist(), [3, 4, 0, 1, 2], strict=True):
        assert row["pixels"] == PROCESSOR.to_pixels(make_image(seed)).tobytes()
        assert row["txt"] == f"text {row['key']}"


def test_a_chunk_of_bad_images_alone_and_an_empty_one_have_no_rows() -> None:
    rows, rejects, _ = decode(list(BAD.values()))
    assert (rows.num_rows, rejects.num_rows) == (0, 3)
    rows, rejects, _ = decode([])
    assert (rows.num_rows, rejects.num_rows) == (0, 0)


def test_an_image_over_the_limit_of_pixels_is_a_reject() -> None:
    images = [encode(make_image(1, (40, 40))), encode(make_image(1, (40, 41)))]
    rows, rejects, _ = decode(images, max_pixels=1600)
    assert rows.column("key").to_pylist() == ["0"]
    assert rejects.column("reason").to_pylist() == ["too_many_pixels"]


def test_an_image_of_one_line_is_decoded() -> None:
    rows, rejects, _ = decode([encode(make_image(1, (20_000, 9)).crop((0, 0, 20_000, 1)))])
    assert (rows.num_rows, rejects.num_rows) == (1, 0)


def test_the_stages_time_is_noted_beside_the_earlier_ones() -> None:
    timings = json.loads(decode([])[2]["timings"])
    assert timings["read"] == 1.5
    assert timings["decode"] >= 0
    assert timings["decode_started"] == pytest.approx(time.time(), abs=60)
