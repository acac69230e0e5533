"""Storage: listings see every file and nothing else, and writes are whole or not at all."""

from __future__ import annotations

import itertools
import os
import pickle
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, OutputError
from pipeline.local_folder import walk
from pipeline.storage import (
    STAGING,
    Storage,
    open_filesystem,
    parent_and_name,
    split_glob,
)

ODD_NAMES = [
    "a#b.png",
    "a?b.png",
    "a%20b.png",
    "a[1].png",
    "a*.png",
    "new\nline.png",
    " space ",
    "ü.png",
    os.fsdecode(b"latin-\xe9.png"),
    "back\\slash.png",
    "colon:.png",
]


def paths(storage: Storage, folder: str = "") -> list[str]:
    return [info.path for info in storage.find(folder)]


def test_find_lists_files_of_all_depths_sorted_with_their_sizes(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "deep" / "2").write_bytes(b"xx")
    (tmp_path / "b" / "1").write_bytes(b"x")
    (tmp_path / "a").write_bytes(b"")
    found = Storage(str(tmp_path)).find()
    assert [(info.path, info.size) for info in found] == [("a", 0), ("b/1", 1), ("b/deep/2", 2)]
    assert paths(Storage(str(tmp_path)), "b") == ["b/1", "b/deep/2"]


def test_a_folder_that_is_not_there_has_no_files(tmp_path: Path) -> None:
    assert Storage(str(tmp_path)).find("nothing/here") == []


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_listed_opened_and_addressed(tmp_path: Path, name: str) -> None:
    (tmp_path / "odd dir#?%[1]").mkdir()
    (tmp_path / "odd dir#?%[1]" / name).write_bytes(b"content")
    storage = Storage(str(tmp_path / "odd dir#?%[1]"))
    assert paths(storage) == [name]
    assert storage.read_bytes(name) == b"content"
    folder, last = parent_and_name(storage.url(name))
    with Storage(folder).open(last) as file:
        assert file.read() == b"content"


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_bytes(b"123")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").symlink_to(tmp_path / "real" / "x")
    (tmp_path / "in" / "folder").symlink_to(tmp_path / "real")
    found = Storage(str(tmp_path / "in")).find()
    assert [(info.path, info.size) for info in found] == [("file", 3), ("folder/x", 3)]


def test_a_link_that_leads_nowhere_is_listed_and_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone")
    storage = Storage(str(tmp_path))
    assert paths(storage) == ["dangling.png"]
    with pytest.raises(FileNotFoundError):
        storage.open("dangling.png")


def test_links_back_up_do_not_make_the_listing_endless(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "x").write_bytes(b"")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    assert paths(Storage(str(tmp_path / "a"))) == ["x"]


def test_a_link_to_itself_does_not_end_the_listing(tmp_path: Path) -> None:
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "x.png").write_bytes(b"")
    assert paths(Storage(str(tmp_path))) == ["self", "x.png"]


def test_a_file_that_goes_away_meanwhile_does_not_end_the_listing(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(b"")
    listing = walk(tmp_path, tmp_path, frozenset())
    first = next(listing).path
    gone = next(name for name in "abc" if name != first)
    (tmp_path / gone).unlink()
    assert {first, *(info.path for info in listing)} == set("abc") - {gone}


def test_pipes_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "x").write_bytes(b"")
    assert paths(Storage(str(tmp_path))) == ["x"]


def test_the_version_of_a_file_changes_with_its_modification_time(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    storage = Storage(str(tmp_path))
    os.utime(tmp_path / "x", ns=(1, 1_000_000_001))
    before = storage.info("x")
    os.utime(tmp_path / "x", ns=(1, 1_000_000_002))
    assert storage.info("x") != before
    assert storage.find() == [storage.info("x")]


def test_replacing_puts_the_file_in_place_whole_or_not_at_all(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes("deep/x", b"old")

    def write_half() -> None:
        with storage.replacing("deep/x") as path:
            path.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert storage.read_bytes("deep/x") == b"old"
    storage.write_bytes("deep/x", b"new")
    assert storage.read_bytes("deep/x") == b"new"
    assert storage.find(STAGING) == []


def test_create_refuses_a_file_that_exists_and_leaves_it_alone(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.create("commits/x.json", b"first")
    with pytest.raises(FileExistsError):
        storage.create("commits/x.json", b"second")
    assert storage.read_bytes("commits/x.json") == b"first"
    assert storage.find(STAGING) == []


def test_move_and_delete(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes("a", b"1")
    storage.write_bytes("b/c", b"2")
    storage.move("a", "b/c")
    assert paths(storage) == ["b/c"]
    assert storage.read_bytes("b/c") == b"1"
    storage.delete("b/c")
    storage.delete("b/c")
    storage.write_bytes("b/d", b"")
    storage.delete_folder("b")
    storage.delete_folder("b")
    assert paths(storage) == []


def test_a_folder_into_which_a_dying_process_still_writes_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/early").touch()
    late, rmdir = iter([tmp_path / "parts/late", tmp_path / "parts/later"]), os.rmdir

    def write_and_remove(path: str, **options: int) -> None:
        for file in itertools.islice(late, 1):
            file.touch()
        rmdir(path, **options)

    monkeypatch.setattr(os, "rmdir", write_and_remove)
    Storage(str(tmp_path)).delete_folder("parts")
    assert not (tmp_path / "parts").exists()
    assert next(late, None) is None, "each was written while the folder was being deleted"


def test_a_storage_travels_to_processes_that_work_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    storage = Storage("in")
    assert storage.is_local
    packed, root = pickle.dumps(storage), storage.root
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pickle.loads(packed).root == root == str(tmp_path / "in")


def test_a_place_that_cannot_be_written_is_told_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=r"output\.uri: cannot write to .*file"):
        Storage(str(tmp_path / "file")).check_writable()
    Storage(str(tmp_path / "new")).check_writable()
    assert Storage(str(tmp_path / "new")).find() == []


@pytest.mark.parametrize("uri", ["memory://x", "no-such-protocol://x"])
def test_a_uri_that_workers_cannot_open_is_a_config_error(uri: str) -> None:
    with pytest.raises(ConfigError, match="x"):
        open_filesystem(uri)


def test_relative_and_file_uris_are_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in ("in", "./in/", str(tmp_path / "in"), f"file://{tmp_path}/in"):
        assert open_filesystem(uri)[1] == str(tmp_path / "in")


@pytest.mark.parametrize(
    ("uri", "folder", "pattern"),
    [
        ("/data/*.tar", "/data", "*.tar"),
        ("/data/a[12]/x/*.tar", "/data", "a[12]/x/*.tar"),
        ("data/?.tar", "data", "?.tar"),
        ("s3://bucket/a/**/*.jpg", "s3://bucket/a", "**/*.jpg"),
        ("/data/plain", "/data/plain", ""),
        ("*.tar", "", "*.tar"),
    ],
)
def test_a_glob_is_split_at_its_longest_fixed_folder(uri: str, folder: str, pattern: str) -> None:
    assert split_glob(uri) == (folder, pattern)


@pytest.mark.parametrize("uri", ["/data*/x.tar", "file:///data*/x.tar"])
def test_a_glob_in_the_topmost_folder_starts_there_and_not_in_the_working_folder(uri: str) -> None:
    folder, pattern = split_glob(uri)
    assert pattern == "data*/x.tar"
    assert open_filesystem(folder)[1] == "/"
