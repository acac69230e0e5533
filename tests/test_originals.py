"""The original bytes behind a row, from every layout, and what happens when they are gone."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import subprocess
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


def shard_at(path: Path, layout: str) -> Shard:
    facts = Storage(str(path.parent)).info(path.name)
    return Shard(path.name, str(path), layout, facts.size, facts.version)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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
    shard = shard_at(path, "webdataset")
    originals = originals_of(tmp_path, shard)

    assert originals.read("a.tar", "x/1") == ONE
    assert originals.read("a.tar", "x/2") == TWO
    path.write_bytes(path.read_bytes()[:1000])
    assert originals.read("a.tar", "x/2") is None


@pytest.mark.parametrize(("id_column", "key"), [(None, "1"), ("id", "second")])
def test_a_row_is_read_from_its_parquet_file(tmp_path: Path, id_column: str | None, key: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [ONE, TWO], "id": ["first", "second"]}), path)
    shard = shard_at(path, "parquet")
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


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Shard:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return shard_at(path, "webdataset")


@pytest.mark.parametrize("name", ["a.tar", "a.tgz"])
def test_keys_that_interleave_or_have_several_images_are_found_by_their_final_key(
    tmp_path: Path, name: str
) -> None:
    members = [("x.png", ONE), ("y.png", TWO), ("x.jpg", TWO), ("x.json", b"{}"), ("ü/z.png", ONE)]
    originals = originals_of(tmp_path, write_tar(tmp_path / name, members))

    assert originals.read(name, "x.png") == ONE
    assert originals.read(name, "x.jpg") == TWO
    assert originals.read(name, "y") == TWO
    assert originals.read(name, "ü/z") == ONE


def test_an_image_that_was_replaced_is_not_the_one_of_that_hash(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("x.png", ONE)])
    originals = originals_of(tmp_path, shard)
    assert originals.read("a.tar", "x") == ONE
    write_tar(tmp_path / "a.tar", [("w.png", ONE), ("x.png", TWO)])
    assert originals.read("a.tar", "x") == TWO
    assert originals.read("a.tar", "x", hashlib.sha256(ONE).digest()) is None
    assert originals.read("a.tar", "w", hashlib.sha256(ONE).digest()) == ONE


def test_a_member_costs_its_own_bytes_once_the_places_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_tar(tmp_path / "a.tar", [(f"{n}.png", ONE) for n in range(50)])
    assert originals_of(tmp_path, shard).read("a.tar", "7") == ONE
    monkeypatch.setattr(Storage, "open", None)  # going through the archive would need it
    assert originals_of(tmp_path / "again", shard).read("a.tar", "31") == ONE


def test_a_row_of_a_later_row_group_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    images = pa.array([{"bytes": ONE if n % 2 else TWO, "path": None} for n in range(20)])
    pq.write_table(pa.table({"image": images, "id": [None, *map(str, range(101, 120))]}), path, 3)
    originals = originals_of(tmp_path, shard_at(path, "parquet"), {"id_column": "id"})
    assert originals.read("a.parquet", "0") == TWO
    assert originals.read("a.parquet", "111") == ONE
    assert originals.read("a.parquet", "112") == TWO
    assert originals.read("a.parquet", "1") is None


def test_a_member_that_does_not_lie_in_one_piece_is_read_as_the_archive_has_it(tmp_path: Path) -> None:
    with (tmp_path / "x.png").open("wb") as file:
        file.write(ONE)
        file.truncate(2**20)  # a hole
    subprocess.run(["tar", "--sparse", "-cf", "a.tar", "x.png"], cwd=tmp_path, check=True)
    assert (tmp_path / "a.tar").stat().st_size < 2**20
    originals = originals_of(tmp_path, shard_at(tmp_path / "a.tar", "webdataset"))
    data = originals.read("a.tar", "x")
    assert data is not None
    assert (data[: len(ONE)], len(data)) == (ONE, 2**20)
