"""What the tests of the read stage share: archives written member by member, and shards read whole."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import schema
from pipeline.readers import read_shard
from pipeline.samples import ReadOptions
from pipeline.shards import Member, Shard, Work
from pipeline.storage import Storage


@dataclass
class Read:
    """All that the read stage told of a shard."""

    chunks: list[pa.Table]
    rows: list[dict[str, Any]]
    rejects: list[dict[str, Any]]
    amendments: list[dict[str, Any]]
    error: str | None

    @property
    def keys(self) -> list[str]:
        return [row["key"] for row in self.rows]

    @property
    def reasons(self) -> dict[str, str]:
        return {row["key"]: row["reason"] for row in self.rejects}

    @property
    def num_samples(self) -> int:
        return len(self.rows) + len(self.rejects)


def read_work(work: Work, options: ReadOptions) -> Read:
    """Read a shard to its end, as the run does."""
    chunks = list(read_shard(work, options))
    unpacked: dict[str, list[dict[str, Any]]] = {"rows": [], "rejects": [], "amendments": []}
    for chunk in chunks:
        assert chunk.schema == schema.CHUNKS
        for name, rows in unpacked.items():
            table = schema.unpack(chunk.column(name)[0])
            rows += table.to_pylist() if table is not None else []
    error = chunks[-1].column("error")[0].as_py()
    return Read(chunks, **unpacked, error=error)


def options_for(**changes: Any) -> ReadOptions:
    values: dict[str, Any] = {"chunk_images": 4, "max_image_bytes": 10_000_000}
    return ReadOptions(**{**values, **changes})


def file_work(path: Path, layout: str) -> Work:
    """The work for one archive or Parquet file."""
    root = Storage(str(path.parent))
    shard = Shard(path.name, root.url(path.name), layout, path.stat().st_size, "1")
    return Work(shard, shard.stem("f"))


def read_file(path: Path, layout: str, **changes: Any) -> Read:
    return read_work(file_work(path, layout), options_for(**changes))


def group_work(folder: Path, names: Iterable[str], layout: str = "images", **changes: Any) -> Work:
    """The work for a group of loose images."""
    root = Storage(str(folder))
    members = tuple(Member(name, root.info(name).size, root.info(name).version) for name in names)
    shard = Shard("images-1", root.url(""), layout, members=members)
    return Work(shard, shard.stem("f"), **changes)


TarEntry = tuple[str, bytes]


def write_tar(path: Path, entries: Iterable[TarEntry], mode: str = "w", **options: Any) -> Path:
    """A tar of these members, in this order."""
    with tarfile.open(path, mode, **options) as archive:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def edit_bytes(path: Path, change: Callable[[bytearray], None]) -> Path:
    """Damage a file in place."""
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(bytes(data))
    return path
