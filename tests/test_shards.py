"""Shards: the input is listed and judged, and every identity has a name of its own."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import InputConfig
from pipeline.errors import InputError
from pipeline.shards import Member, Shard, Work, escape, list_input, name_part

SHARD = Shard("a.tar", "file:///in/a.tar", "webdataset", 10, "1")


def listed(uri: Path | str, layout: str = "auto") -> tuple[str, list[str]]:
    listing = list_input(InputConfig(uri=str(uri), format=layout))
    return listing.format, [file.path for file in listing.files]


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def test_a_folder_is_listed_recursively(tmp_path: Path) -> None:
    fill(tmp_path, "b/2.jpg", "a.jpg", "b/c/1.jpg")
    assert listed(tmp_path) == ("images", ["a.jpg", "b/2.jpg", "b/c/1.jpg"])


def test_a_glob_lists_what_matches_relative_to_its_fixed_folder(tmp_path: Path) -> None:
    fill(tmp_path, "x/1.tar", "x/2.tar", "x/3.txt", "y/1.tar")
    assert listed(tmp_path / "x" / "*.tar") == ("webdataset", ["1.tar", "2.tar"])
    assert listed(tmp_path / "?" / "1.tar") == ("webdataset", ["x/1.tar", "y/1.tar"])


def test_a_glob_of_folders_lists_what_is_in_them(tmp_path: Path) -> None:
    fill(tmp_path, "2024-1/a/1.png", "2024-2/1.png", "2025-1/1.png")
    assert listed(tmp_path / "2024-*")[1] == ["2024-1/a/1.png", "2024-2/1.png"]


def test_a_double_star_crosses_folders_and_a_single_one_does_not(tmp_path: Path) -> None:
    fill(tmp_path, "1.png", "a/2.png", "a/b/3.png")
    assert listed(f"{tmp_path}/**/*.png")[1] == ["1.png", "a/2.png", "a/b/3.png"]
    assert listed(f"{tmp_path}/*.png")[1] == ["1.png"]


def test_a_glob_in_a_relative_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "1.tar", "in/2.tar")
    monkeypatch.chdir(tmp_path)
    assert listed("*.tar")[1] == ["1.tar"]
    assert listed("in/*.tar")[1] == ["2.tar"]


def test_a_single_file_is_listed_under_its_name(tmp_path: Path) -> None:
    fill(tmp_path, "x/1.tar", "x/2.tar")
    assert listed(tmp_path / "x" / "1.tar") == ("webdataset", ["1.tar"])


@pytest.mark.parametrize("name", ["a#b.png", "what?.png", "50%.png", "x[1].png", "new\nline.png"])
def test_a_file_whose_name_looks_like_a_glob_or_url_is_itself(tmp_path: Path, name: str) -> None:
    fill(tmp_path / "in[1]", name, "other.png")
    assert listed(tmp_path / "in[1]" / name)[1] == [name]
    assert listed(tmp_path / "in[1]")[1] == sorted([name, "other.png"])


def test_missing_and_empty_inputs_say_so(tmp_path: Path) -> None:
    for uri in (tmp_path / "gone", tmp_path / "gone" / "x.tar"):
        with pytest.raises(InputError, match=r"input\.uri: .*gone.* does not exist"):
            listed(uri)
    for uri in (tmp_path, tmp_path / "*.tar", tmp_path / "no" / "*.tar"):
        with pytest.raises(InputError, match=r"input\.uri: .* matches no file"):
            listed(uri)


def test_a_folder_without_a_file_of_the_wanted_layout_says_so(tmp_path: Path) -> None:
    fill(tmp_path, "1.jpg", "2.jpg")
    with pytest.raises(InputError, match=r"no file that ends in \.tar"):
        listed(tmp_path, "webdataset")


@pytest.mark.parametrize(
    ("names", "layout", "files"),
    [
        (["a.tar", "b.TAR.GZ", "c.tgz", "notes.txt"], "webdataset", ["a.tar", "b.TAR.GZ", "c.tgz"]),
        (["a.parquet", "b.pq", "README.md"], "parquet", ["a.parquet", "b.pq"]),
        (["list.csv"], "manifest", ["list.csv"]),
        (["list.JSONL"], "manifest", ["list.JSONL"]),
        (["a.jpg", "b.heic", "noext"], "images", ["a.jpg", "b.heic", "noext"]),
        (["list.csv", "a.jpg"], "images", ["a.jpg", "list.csv"]),
    ],
)
def test_the_layout_is_judged_by_the_names(
    tmp_path: Path, names: list[str], layout: str, files: list[str]
) -> None:
    assert listed(fill(tmp_path, *names)) == (layout, files)


@pytest.mark.parametrize(
    "names", [["a.tar", "b.parquet"], ["a.tar", "b.jpg"], ["a.tar", "b.PNG"], ["a.parquet", "b.webp"]]
)
def test_files_of_several_layouts_are_refused_and_taken_when_one_is_named(
    tmp_path: Path, names: list[str]
) -> None:
    fill(tmp_path, *names)
    with pytest.raises(InputError, match=r"input\.format: .*several layouts.*images, webdataset or parq"):
        listed(tmp_path)
    assert listed(tmp_path, "images")[1] == names


def test_a_manifest_is_one_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a manifest is one file"):
        listed(fill(tmp_path, "a.csv", "b.csv"), "manifest")


@pytest.mark.parametrize(
    ("name", "escaped"),
    [
        ("a.tar", "a.tar"),
        ("train/00-1.tar", "train_2f00-1.tar"),
        ("a_b", "a_5fb"),
        ("a b\n", "a_20b_0a"),
        ("é", "_c3_a9"),
        (os.fsdecode(b"\xff"), "_ff"),
        ("a%#?[]*", "a_25_23_3f_5b_5d_2a"),
        ("x" * 200, "x" * 150),
        ("/" * 60, "_2f" * 50),
    ],
)
def test_names_are_escaped_byte_by_byte_and_cut_to_150(name: str, escaped: str) -> None:
    assert escape(name) == escaped


def test_names_that_are_cut_alike_differ_by_their_digest() -> None:
    one, two = (dataclasses.replace(SHARD, name="x" * 160 + end).stem("f") for end in "ab")
    assert one != two
    assert name_part(one) == name_part(two) == "x" * 150


def test_a_stem_is_the_escaped_name_and_a_digest() -> None:
    assert re.fullmatch(r"a\.tar-[0-9a-f]{16}", SHARD.stem("f"))


@pytest.mark.parametrize(
    "change", [{"size": 11}, {"version": "2"}, {"uri": "file:///other/a.tar"}, {"name": "b.tar"}]
)
def test_the_digest_changes_with_the_identity(change: dict[str, object]) -> None:
    changed = dataclasses.replace(SHARD, **change)
    assert changed.stem("f")[-16:] != SHARD.stem("f")[-16:]


def test_the_digest_changes_with_the_fingerprint_and_with_nothing_else() -> None:
    assert SHARD.stem("f") != SHARD.stem("g")
    assert SHARD.stem("f") == dataclasses.replace(SHARD).stem("f")


def test_the_digest_of_a_group_changes_with_any_member() -> None:
    def stem(**change: object) -> str:
        members = (Member("a", 1, "1"), Member(**{"path": "b", "size": 1, "version": "1", **change}))
        return Shard("images-1", "file:///in", "images", members=members).stem("f")

    stems = {stem(), stem(size=2), stem(version="2"), stem(path="c"), stem(repeat=1)}
    assert len(stems) == 5


def test_a_work_survives_its_journey_as_json() -> None:
    odd = os.fsdecode(b"\xff#\n.png")
    shard = Shard("images-1", "file:///in", "images", members=(Member(odd, 1, "2", 3), Member("b", 0, "")))
    work = Work(shard, shard.stem("f"), ("old",), frozenset({"b", odd}), "bWV0YQ==")
    assert Work.from_json(work.to_json()) == work


@pytest.mark.parametrize("name", ["_train/0.tar", "(1).tar", "été.tar", ".hidden.tar"])
def test_any_parquet_reader_sees_the_file_of_a_shard_whatever_its_name(tmp_path: Path, name: str) -> None:
    """Readers such as pyarrow's and Spark's pass over files that begin with `_` or `.`."""
    stem = dataclasses.replace(SHARD, name=name).stem("f")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "plain.parquet")
    pq.write_table(pa.table({"x": [1]}), tmp_path / f"{stem}.parquet")
    assert pq.read_table(tmp_path).num_rows == 2
