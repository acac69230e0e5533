"""The local cache of an index's files: right or absent, within its limit, shared by processes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import BinaryIO

import pytest

from pipeline.errors import SearchError
from pipeline.index import files
from pipeline.index.files import CACHE_VARIABLE, FileRef, fetch


class Elsewhere:
    """An output that is not on this machine's disk, as far as the cache asks."""

    is_local = False
    uri = "s3://bucket/output"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def open(self, path: str) -> BinaryIO:
        return (self.folder / path).open("rb")

    def url(self, path: str) -> str:
        return f"{self.uri}/{path}"

    def put(self, name: str, data: bytes) -> FileRef:
        (self.folder / name).write_bytes(data)
        return FileRef.of(name, self.folder / name)


@pytest.fixture
def output(tmp_path):
    return Elsewhere(tmp_path / "elsewhere")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_file_is_fetched_once_and_a_damaged_one_is_refused(output, cache):
    file = output.put("a", b"vectors")
    assert fetch(output, file).read_bytes() == b"vectors"
    output.put("a", b"changed")
    assert fetch(output, file).read_bytes() == b"vectors"
    with pytest.raises(SearchError, match="missing or damaged"):
        fetch(output, FileRef("a", 7, "0" * 64))
    assert [entry.name for entry in cache.iterdir()] == [file.sha256]


def test_the_cache_keeps_its_limit_and_leaves_downloads_of_others_alone(output, cache, monkeypatch):
    monkeypatch.setattr(files, "CACHE_BYTES", 250)
    old, new = (output.put(name, name.encode() * 100) for name in "ab")
    path = fetch(output, old)
    os.utime(path, (1e9, 1e9))
    under_way, abandoned = cache / ".tmp-another", cache / ".tmp-dead"
    under_way.write_bytes(b"x" * 1000)
    abandoned.write_bytes(b"x" * 100)
    os.utime(abandoned, (time.time() - 1e6,) * 2)
    assert fetch(output, new).exists()
    assert under_way.exists()
    assert not path.exists()
    fetch(output, output.put("c", b"c" * 100))
    assert not abandoned.exists()


def test_a_file_that_another_process_deletes_meanwhile_is_no_damage(output, cache, monkeypatch):
    file = output.put("a", b"vectors")
    cache.mkdir()
    honest = Path.iterdir

    def with_a_ghost(self):
        yield from honest(self)
        if self == cache:
            yield cache / "gone"

    monkeypatch.setattr(Path, "iterdir", with_a_ghost)
    assert fetch(output, file).read_bytes() == b"vectors"
