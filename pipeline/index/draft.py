"""The files of a version that is being made: all of its rows anew, or those of the last and what is new.

Enters: commits. Leaves: segments, index.faiss and ids.parquet in place, and a `Draft` that tells of them;
nothing refers to any of it until the version is published.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.commits import Commit
from pipeline.errors import OutputError
from pipeline.index import lists, whole
from pipeline.index.files import BUILD, INDEX, FileRef, fetch
from pipeline.index.kinds import Choice, make, part_rows
from pipeline.index.memory import give_back
from pipeline.index.record import IndexRecord
from pipeline.index.tasks import Runner, add_part
from pipeline.index.training import train
from pipeline.index.vectors import (
    Ids,
    Mask,
    Segment,
    ShardIds,
    VectorStore,
    Written,
    alive_flags,
    write_segment,
)
from pipeline.storage import Storage

_IDS_AT_ONCE = 65_536


@dataclass(frozen=True)
class Draft:
    """What a version consists of before it is measured. `new` are the ids that its parent has not."""

    choice: Choice
    index: FileRef
    ids: FileRef
    shards: tuple[ShardIds, ...]
    segments: tuple[Segment, ...]
    excluded: dict[str, int]
    next_id: int
    new: Ids
    imbalance: float | None

    @property
    def alive(self) -> Mask:
        """A flag for every id there has been."""
        return alive_flags(self.shards, self.next_id)

    @property
    def num_vectors(self) -> int:
        return sum(shard.num_vectors for shard in self.shards)

    @property
    def num_dead(self) -> int:
        return sum(segment.num_vectors for segment in self.segments) - self.num_vectors


@dataclass(frozen=True)
class Drafter:
    """Makes the files of one version. `scratch` holds what is needed only until it is there."""

    output: Storage
    scratch: Storage
    run: Runner
    version: str
    dim: int

    def anew(self, choice: Choice, commits: Sequence[Commit]) -> Draft:
        """Every row is read, and the index trained on a sample of all."""
        written = self._segments(commits)
        shards, segments = _numbered(written, 0)
        next_id = segments[-1].end if segments else 0
        if not next_id:
            raise self._nothing()
        store = self.store(segments)
        live = np.arange(next_id, dtype=np.int64)
        index, imbalance = self._index(choice, store, segments, live)
        ids = self._ids(np.empty(0, np.bool_), 0, written)
        return Draft(choice, index, ids, shards, segments, _excluded(written), next_id, live, imbalance)

    def following(
        self, record: IndexRecord, choice: Choice, live: set[str], new: Sequence[Commit]
    ) -> Draft:
        """The rows of `record` whose shards are in `live`, and those of new commits."""
        written = self._segments(new)
        kept = tuple(shard for shard in record.shards if shard.stem in live)
        new_shards, new_segments = _numbered(written, record.next_id)
        shards = kept + new_shards
        next_id = max([record.next_id, *(segment.end for segment in new_segments)])
        alive = alive_flags(shards, next_id)
        segments = tuple(
            segment for segment in record.segments if alive[segment.first_id : segment.end].any()
        )
        segments += new_segments
        if not segments:
            raise self._nothing()
        new_ids = np.arange(record.next_id, next_id, dtype=np.int64)
        index, imbalance = self._followed(record, choice, segments, new_segments, alive)
        ids = self._ids(alive, record.next_id, written, record)
        excluded = {stem: count for stem, count in record.excluded.items() if stem in live}
        excluded |= _excluded(written)
        return Draft(choice, index, ids, shards, segments, excluded, next_id, new_ids, imbalance)

    def _nothing(self) -> OutputError:
        return OutputError(
            f"{self.output.uri} has no embedding with a direction; there is nothing to index"
        )

    def store(self, segments: tuple[Segment, ...]) -> VectorStore:
        return VectorStore(segments, self.dim, lambda file: fetch(self.output, file))

    def _segments(self, commits: Sequence[Commit]) -> list[Written]:
        groups = list(_groups(commits, part_rows(self.dim)))
        items = [(self.output, self.version, f"{n:06d}", group) for n, group in enumerate(groups)]
        return list(self.run(write_segment, items))

    def _index(
        self, choice: Choice, store: VectorStore, segments: tuple[Segment, ...], live: Ids
    ) -> tuple[FileRef, float | None]:
        if choice.type == "exact":
            return self._exact(store, live), None
        trained = make(choice.factory, self.dim)
        train(trained, choice, store, live)
        give_back()
        if lists.ivf_of(trained) is not None:
            parts = self._parts(trained, segments)
            return self._merged(parts, np.ones(len(live), np.bool_))
        trained = whole.with_ids(trained)
        return self._whole(trained, store, live), None

    def _followed(
        self,
        record: IndexRecord,
        choice: Choice,
        segments: tuple[Segment, ...],
        new_segments: tuple[Segment, ...],
        alive: Mask,
    ) -> tuple[FileRef, float | None]:
        store = self.store(segments)
        if choice.type == "exact":
            return self._exact(store, np.flatnonzero(alive)), None
        served = fetch(self.output, record.faiss_file, check=True)
        mapped = faiss.read_index(str(served), faiss.IO_FLAG_MMAP)
        if lists.ivf_of(mapped) is not None:
            parts = self._parts(lists.empty_of(mapped), new_segments) if new_segments else []
            return self._merged([served, *parts], alive)
        index = faiss.read_index(str(served))
        before = alive_flags(record.shards, len(alive))
        whole.remove(index, np.flatnonzero(before & ~alive))
        return self._whole(index, store, np.arange(record.next_id, len(alive), dtype=np.int64)), None

    def _parts(self, trained: faiss.Index, segments: tuple[Segment, ...]) -> list[Path]:
        """Files of lists of all rows of `segments`, on this machine."""
        path = f"{BUILD}/{self.version}/trained.faiss"
        with self.scratch.replacing(path) as local:
            faiss.write_index(trained, str(local))
            file = FileRef.of(path, local)
        most = part_rows(self.dim)
        pieces = [
            (
                self.output,
                self.scratch,
                file,
                segment,
                first,
                min(most, segment.num_vectors - first),
                self.dim,
            )
            for segment in segments
            for first in range(0, segment.num_vectors, most)
        ]
        return [fetch(self.scratch, part) for part in self.run(add_part, pieces)]

    def _exact(self, store: VectorStore, live: Ids) -> FileRef:
        with self._replacing("index.faiss") as (path, local):
            whole.write_exact(store, live, local)
            return FileRef.of(path, local)

    def _merged(self, parts: Sequence[Path], alive: Mask) -> tuple[FileRef, float]:
        with self._replacing("index.faiss") as (path, local):
            _, imbalance = lists.merge(parts, local, alive)
            return FileRef.of(path, local), imbalance

    def _whole(self, index: faiss.Index, store: VectorStore, new: Ids) -> FileRef:
        whole.add(index, store, new)
        with self._replacing("index.faiss") as (path, local):
            faiss.write_index(index, str(local))
            return FileRef.of(path, local)

    def _ids(
        self, alive: Mask, first_id: int, written: Sequence[Written], record: IndexRecord | None = None
    ) -> FileRef:
        """ids.parquet: the rows of `record` that are alive, then the new ones from `first_id` on."""
        with (
            self._replacing("ids.parquet") as (path, local),
            pq.ParquetWriter(local, schema.INDEX_IDS, compression="zstd") as writer,
        ):
            if record is not None:
                old = pq.ParquetFile(fetch(self.output, record.ids, check=True))
                for batch in old.iter_batches(_IDS_AT_ONCE):
                    writer.write_batch(batch.filter(pa.array(alive[batch.column(0).to_numpy()])))
            for piece in written:
                for names in pq.ParquetFile(fetch(self.output, piece.ids)).iter_batches(_IDS_AT_ONCE):
                    faiss_ids = np.arange(first_id, first_id + len(names), dtype=np.int64)
                    columns = [pa.array(faiss_ids), names.column(0)]
                    writer.write_batch(pa.record_batch(columns, schema.INDEX_IDS))
                    first_id += len(names)
            writer.close()
            return FileRef.of(path, local)

    @contextlib.contextmanager
    def _replacing(self, name: str) -> Iterator[tuple[str, Path]]:
        """A file of the version: its path in the output, and where to write it."""
        path = f"{INDEX}/{self.version}/{name}"
        with self.output.replacing(path) as local:
            yield path, local


def _groups(commits: Sequence[Commit], most: int) -> Iterator[tuple[Commit, ...]]:
    """Commits in their order, together as long as they have at most so many rows."""
    group: list[Commit] = []
    rows = 0
    for commit in commits:
        if group and rows + commit.num_rows > most:
            yield tuple(group)
            group, rows = [], 0
        group.append(commit)
        rows += commit.num_rows
    if group:
        yield tuple(group)


def _numbered(written: Sequence[Written], next_id: int) -> tuple[tuple[ShardIds, ...], tuple[Segment, ...]]:
    """The ids of what was written, from `next_id` on; commits and files without a row have none."""
    shards, segments = [], []
    for piece in written:
        if piece.num_vectors:
            segments.append(Segment(next_id, piece.num_vectors, piece.vectors))
        for stem, count in piece.rows:
            if count:
                shards.append(ShardIds(stem, next_id, count))
            next_id += count
    return tuple(shards), tuple(segments)


def _excluded(written: Sequence[Written]) -> dict[str, int]:
    return {stem: count for piece in written for stem, count in piece.excluded if count}
