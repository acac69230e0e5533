"""What is done, and the proof of it.

A shard is done when its commit record exists; the record is created last, create-only, and names the
files, their rows, sizes and checksums. A record may supersede others (a changed shard); until those are
cleaned away, readers leave them out by what the newer record says. Knows no Ray.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

from pipeline.errors import OutputError
from pipeline.local_cache import PARTIAL
from pipeline.shards import Shard, name_part, shard_from_json
from pipeline.storage import STAGING, Storage

COMMITS, EMBEDDINGS, REJECTS = "commits", "embeddings", "rejects"
_READ_THREADS = 16
_STREAMED = 64  # records at once


@dataclass(frozen=True)
class DataFile:
    """A committed file: path relative to the output, rows, bytes and SHA-256."""

    path: str
    num_rows: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Commit:
    """The record of a finished shard. `num_samples` = `num_rows` + `num_rejects`, always."""

    stem: str
    shard: Shard
    fingerprint: str
    num_samples: int
    num_rows: int
    num_rejects: int
    rejects_by_reason: dict[str, int]
    embeddings: DataFile
    rejects: DataFile | None
    supersedes: tuple[str, ...]
    run: str
    committed_at: str

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Commit:
        values = json.loads(data)
        rejects = values["rejects"]
        changed = {
            "shard": shard_from_json(values["shard"]),
            "embeddings": DataFile(**values["embeddings"]),
            "rejects": DataFile(**rejects) if rejects else None,
            "supersedes": tuple(values["supersedes"]),
        }
        return cls(**{**values, **changed})


class CommitLog:
    """The commits of an output, from one listing; records are read only where they are needed."""

    def __init__(self, output: Storage) -> None:
        self.output = output
        self._records: dict[str, Commit] = {}

    @cached_property
    def _names(self) -> list[str]:
        return [info.path.removeprefix(f"{COMMITS}/") for info in self.output.find(COMMITS)]

    @cached_property
    def listed(self) -> frozenset[str]:
        """Every file stem that has a record, superseded or not."""
        return frozenset(name.removesuffix(".json") for name in self._names if name.endswith(".json"))

    @property
    def unfinished(self) -> list[str]:
        """Paths of records that a killed run was writing."""
        return [f"{COMMITS}/{name}" for name in self._names if name.startswith(PARTIAL)]

    @cached_property
    def superseded(self) -> frozenset[str]:
        """Stems that a newer record replaces. Only shards with several records are looked into."""
        by_name: dict[str, list[str]] = defaultdict(list)
        for stem in self.listed:
            by_name[name_part(stem)].append(stem)
        several = [stem for stems in by_name.values() if len(stems) > 1 for stem in stems]
        return frozenset(old for commit in self.read(several) for old in commit.supersedes)

    @cached_property
    def live(self) -> frozenset[str]:
        """The stems whose rows are the output."""
        return self.listed - self.superseded

    def read(self, stems: Iterable[str]) -> list[Commit]:
        """The records of `stems`, in sorted order."""
        wanted = sorted(stems)
        missing = [stem for stem in wanted if stem not in self._records]
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            self._records.update(zip(missing, pool.map(self._read_one, missing), strict=True))
        return [self._records[stem] for stem in wanted]

    def stream(self, stems: Iterable[str]) -> Iterator[Commit]:
        """The records of `stems`, in sorted order, a few at a time: none is kept, so any number fits."""
        wanted = sorted(stems)
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            for start in range(0, len(wanted), _STREAMED):
                yield from pool.map(self._read_one, wanted[start : start + _STREAMED])

    def _read_one(self, stem: str) -> Commit:
        path = f"{COMMITS}/{stem}.json"
        try:
            return Commit.from_json(self.output.read_bytes(path))
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{self.output.url(path)}: not a commit record ({error!r}); "
                "delete it to have its shard done again"
            ) from error


def write_commit(output: Storage, commit: Commit) -> None:
    """Create the record, then delete what it supersedes. FileExistsError if another run was faster."""
    output.create(f"{COMMITS}/{commit.stem}.json", commit.to_json())
    remove_commits(output, commit.supersedes)


def remove_commits(output: Storage, stems: Iterable[str]) -> None:
    """Take shards out of the output: their records, then their files."""
    for stem in stems:
        output.delete(f"{COMMITS}/{stem}.json")
        output.delete(f"{EMBEDDINGS}/{stem}.parquet")
        output.delete(f"{REJECTS}/{stem}.parquet")


def clean(output: Storage, log: CommitLog, removed: Iterable[str] = ()) -> int:
    """Delete what no live commit stands for; returns how many files that were.

    `removed` are stems whose records have gone since the log was listed.

    Superseded records go before their files, so that no record ever names a file that is gone.
    """
    live, num_deleted = log.live.difference(removed), 0
    for stem in log.superseded & log.listed:
        output.delete(f"{COMMITS}/{stem}.json")
        num_deleted += 1
    for folder in (EMBEDDINGS, REJECTS):
        for info in output.find(folder):
            stem = info.path.removeprefix(f"{folder}/").removesuffix(".parquet")
            if stem not in live:
                output.delete(info.path)
                num_deleted += 1
    for path in log.unfinished:
        output.delete(path)
        num_deleted += 1
    num_deleted += len(output.find(STAGING))
    output.delete_folder(STAGING)
    return num_deleted
