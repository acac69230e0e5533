"""Loose images: one that cannot be read is a reject, and costs no other."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.shards import Member, Shard, Work
from pipeline.storage import Storage
from tests.conftest import WriteImages
from tests.shard_files import Read, group_work, options_for, read_work


def read(work: Work, **changes: object) -> Read:
    return read_work(work, options_for(**changes))


def read_uris(folder: Path, *uris: str) -> Read:
    """A manifest's group that names these URIs; the manifest lies in `folder`."""
    repeats = [uris[:number].count(uri) for number, uri in enumerate(uris)]
    members = tuple(Member(uri, 0, "", repeat) for uri, repeat in zip(uris, repeats, strict=True))
    shard = Shard("images-1", Storage(str(folder)).url("list.csv"), "manifest", members=members)
    return read(Work(shard, shard.stem("f")))


def test_images_are_read_in_order_under_their_relative_paths(
    tmp_path: Path, write_images: WriteImages
) -> None:
    names = [f"deep/{name}" for name in write_images(tmp_path / "deep", 50)]
    result = read(group_work(tmp_path, names), chunk_images=7)
    assert result.rejects == []
    assert [row["image_id"] for row in result.rows] == names
    assert result.keys == names
    assert {row["shard"] for row in result.rows} == {"images-1"}
    assert [row["data"] for row in result.rows] == [(tmp_path / name).read_bytes() for name in names]


@pytest.mark.parametrize("name", ["a#b.png", "a?.png", "%41.png", "[1]*.png", "new\nline.png", "ü", " "])
def test_odd_names_are_ids_as_they_are(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    (row,) = read(group_work(tmp_path, [name])).rows
    assert (row["image_id"], row["data"]) == (name, b"x")


def test_a_name_that_is_not_utf8_is_written_with_escapes(tmp_path: Path) -> None:
    name = os.fsdecode(b"latin-\xe9.png")
    (tmp_path / name).write_bytes(b"x")
    (row,) = read(group_work(tmp_path, [name])).rows
    assert row["image_id"] == "latin-\\xe9.png"


def test_files_that_cannot_be_read_are_rejects_and_the_others_are_read(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "gone", "big"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "big").write_bytes(b"x" * 11)
    names = ["a", "gone", "b", "big", "dangling", "c"]
    members = tuple(Member(name, 1, "1") for name in names)
    shard = Shard("images-1", Storage(str(tmp_path)).url(""), "images", members=members)
    (tmp_path / "gone").unlink()
    (tmp_path / "b").unlink()
    (tmp_path / "b").mkdir()
    result = read(Work(shard, "s"), max_image_bytes=10)
    assert result.error is None
    assert result.keys == ["a", "c"]
    assert result.reasons == {
        "gone": "unreadable",
        "b": "unreadable",
        "dangling": "unreadable",
        "big": "too_large",
    }


def test_a_file_that_is_known_to_be_too_large_is_not_opened(tmp_path: Path) -> None:
    shard = Shard("images-1", f"file://{tmp_path}", "images", members=(Member("not-there", 11, "1"),))
    (reject,) = read(Work(shard, "s"), max_image_bytes=10).rejects
    assert (reject["reason"], reject["size_bytes"]) == ("too_large", 11)


def test_a_link_to_itself_is_a_reject_and_the_others_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "self").symlink_to("self")
    members = (Member("self", 1, "1"), Member("a", 1, "1"))
    shard = Shard("images-1", Storage(str(tmp_path)).url(""), "images", members=members)
    result = read(Work(shard, "s"))
    assert result.error is None
    assert (result.keys, result.reasons) == (["a"], {"self": "unreadable"})


def test_storage_that_fails_fails_the_shard_and_not_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"x")
    work = group_work(tmp_path, ["a"])

    def fail(self: Storage, relative: str) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Storage, "open", fail)
    result = read(work)
    assert "storage failed while a was read" in (result.error or "")


def test_members_that_the_commit_can_copy_are_not_read(tmp_path: Path, write_images: WriteImages) -> None:
    names = write_images(tmp_path, 4)
    work = group_work(tmp_path, names, carried=frozenset(names[:3]))
    assert read(work).keys == names[3:]


def test_a_manifest_names_images_relative_to_itself_and_by_full_uri(
    tmp_path: Path, write_images: WriteImages
) -> None:
    write_images(tmp_path / "in", 3)
    uris = ["in/000.png", str(tmp_path / "in" / "001.png"), f"file://{tmp_path}/in/002.png"]
    result = read_uris(tmp_path, *uris)
    assert result.rejects == []
    assert [row["image_id"] for row in result.rows] == uris


def test_a_uri_named_twice_is_one_row_and_one_duplicate(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    result = read_uris(tmp_path, "a", "a", "a")
    assert result.keys == ["a"]
    assert [row["reason"] for row in result.rejects] == ["duplicate_id", "duplicate_id"]


def test_every_row_without_a_uri_is_told_as_having_no_image(tmp_path: Path) -> None:
    result = read_uris(tmp_path, "", "", "")
    assert [row["reason"] for row in result.rejects] == ["no_image"] * 3


@pytest.mark.parametrize(
    "uri",
    [
        "gone.png",
        ".",
        "nul\0.png",
        "x" * 300 + ".png",
        "no-such-protocol://a/b.png",
        "memory://a/b.png",
        "reference://a/b.png",
        "data://nonsense",
        "zip://a.png",
    ],
)
def test_a_uri_that_cannot_be_opened_is_a_reject_and_costs_no_other(tmp_path: Path, uri: str) -> None:
    (tmp_path / "a").write_bytes(b"x")
    result = read_uris(tmp_path, uri, "a")
    assert result.error is None
    assert result.keys == ["a"]
    assert [row["reason"] for row in result.rejects] == ["unreadable"]


class _Answers(http.server.BaseHTTPRequestHandler):
    """Answers with the status that the path names; `/short` promises more bytes than it sends."""

    def do_GET(self) -> None:
        status = self.path.strip("/")
        if status == "drop":
            self.connection.close()
            return
        self.send_response(200 if status == "short" else int(status))
        self.send_header("Content-Length", "100" if status == "short" else "1")
        self.end_headers()
        self.wfile.write(b"x")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("path", ["404", "403", "429", "500", "drop", "short"])
def test_an_image_that_the_web_does_not_give_is_a_reject_and_costs_no_other(
    tmp_path: Path, web: str, path: str
) -> None:
    result = read_uris(tmp_path, f"{web}/{path}", f"{web}/200")
    assert result.error is None
    assert result.keys == [f"{web}/200"]
    assert result.reasons == {f"{web}/{path}": "unreadable"}
