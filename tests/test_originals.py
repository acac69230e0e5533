"""The original bytes behind a row, from every layout, and what happens when they are gone."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.commits import Commit, DataFile, write_commit
from pipeline.originals import Originals
from pipeline.shards import Member, Shard
from pipeline.storage import Storage
from tests.conftest import encode, make_image

ONE, TWO = encode(make_image(1)), encode(make_image(2), "JPEG")


def originals_of(folder: Path, shard: Shard, columns: dict[str, str | None] | None = None) -> Originals:
    output = Storage(str(folder / "out"))
    parts = {
        "source": "",
        "weights_sha256": "",
        "model_config": {},
        "preprocessing": {},
        "precision": "float32",
        "embedding": "pooled",
        "columns": columns or {},
    }
    output.write_bytes("fingerprint.json", json.dumps(parts).encode())
    file = DataFile("embeddings/x.parquet", 2, 0, "")
    commit = Commit(shard.stem("f"), shard, "f", 2, 2, 0, {}, file, None, (), "run", "2026-01-01")
    write_commit(output, commit)
    return Originals(output)


@pytest.fixture
def images(tmp_path: Path) -> Shard:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "one.png").write_bytes(ONE)
    (folder / "sub" / "two.jpg").write_bytes(TWO)
    members = (Member("one.png", len(ONE), ""), Member("sub/two.jpg", len(TWO), ""))
    return Shard("images-abc", str(folder), "images", members=members)


def test_a_loose_image_is_read_from_its_place(tmp_path: Path, images: Shard) -> None:
    originals = originals_of(tmp_path, images)

    assert originals.read("images-abc", "one.png") == ONE
    assert originals.read("images-abc", "sub/two.jpg") == TWO


def test_what_is_gone_or_unknown_is_none(tmp_path: Path, images: Shard) -> None:
    originals = originals_of(tmp_path, images)
    (tmp_path / "in" / "one.png").unlink()

    assert originals.read("images-abc", "one.png") is None
    assert originals.read("images-abc", "three.png") is None
    assert originals.read("other", "one.png") is None


def test_a_member_is_read_from_its_archive_and_none_comes_of_a_damaged_one(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in (("x/1.png", ONE), ("x/1.json", b"{}"), ("x/2.jpg", TWO)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    shard = Shard("a.tar", str(path), "webdataset", path.stat().st_size)
    originals = originals_of(tmp_path, shard)

    assert originals.read("a.tar", "x/1") == ONE
    assert originals.read("a.tar", "x/2") == TWO
    path.write_bytes(path.read_bytes()[:1000])
    assert originals.read("a.tar", "x/2") is None


@pytest.mark.parametrize(("id_column", "key"), [(None, "1"), ("id", "second")])
def test_a_row_is_read_from_its_parquet_file(tmp_path: Path, id_column: str | None, key: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [ONE, TWO], "id": ["first", "second"]}), path)
    shard = Shard("a.parquet", str(path), "parquet", path.stat().st_size)
    originals = originals_of(tmp_path, shard, {"image_column": "image", "id_column": id_column})

    assert originals.read("a.parquet", key) == TWO


def test_a_manifests_image_is_read_by_its_uri(tmp_path: Path, images: Shard) -> None:
    members = (Member("in/one.png", 0, ""), Member(f"file://{tmp_path}/in/sub/two.jpg", 0, ""))
    shard = dataclasses.replace(
        images, format="manifest", uri=str(tmp_path / "manifest.csv"), members=members
    )
    originals = originals_of(tmp_path, shard)

    assert originals.read("images-abc", "in/one.png") == ONE
    assert originals.read("images-abc", members[1].path) == TWO
