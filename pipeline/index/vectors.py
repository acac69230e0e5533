"""Embeddings on their way into the index and out of it again: unit vectors in plain files.

A segment is a file `index/_vectors/<name>.f32`: the usable rows of some commits in their order, float32,
row-major (N, D), scaled to length 1. It is written once and never changed; versions share it. The faiss id
of a row is the segment's `first_id` plus its number, so that ids are dense and no table is needed to find a
vector. What re-ranks, measures, filters and compares reads exact vectors here, through the page cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.commits import Commit
from pipeline.errors import OutputError
from pipeline.index.files import BUILD, VECTORS, FileRef
from pipeline.index.memory import give_back
from pipeline.storage import Storage

_BATCH_ROWS, _READ_BYTES = 4096, 1 << 20
BLOCK_ROWS = 16_384
_FEW = 128

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ShardIds:
    """The ids of one commit: `num_vectors` from `first_id` on."""

    stem: str
    first_id: int
    num_vectors: int


def alive_flags(shards: Sequence[ShardIds], next_id: int) -> Mask:
    """A flag for every id there has been: whether it is of one of these shards."""
    alive = np.zeros(next_id, np.bool_)
    for shard in shards:
        alive[shard.first_id : shard.first_id + shard.num_vectors] = True
    return alive


@dataclass(frozen=True)
class Segment:
    """A file of `num_vectors` unit vectors, whose ids begin at `first_id`."""

    first_id: int
    num_vectors: int
    file: FileRef

    @property
    def end(self) -> int:
        return self.first_id + self.num_vectors


@dataclass(frozen=True)
class Written:
    """What `write_segment` leaves: the vectors, the ids beside them, and the rows of each commit."""

    vectors: FileRef
    ids: FileRef
    rows: tuple[tuple[str, int], ...]
    excluded: tuple[tuple[str, int], ...]

    @property
    def num_vectors(self) -> int:
        return sum(count for _, count in self.rows)


def normalize(vectors: Vectors) -> Vectors:
    """Rows (N, D) scaled to length 1 in float32, so that inner products are cosines."""
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64, casting="safe"))
    return np.ascontiguousarray(vectors / lengths[:, None].astype(np.float32), dtype=np.float32)


def usable(vectors: Vectors) -> Mask:
    """Which rows have a direction: finite, and not all zeros."""
    return np.logical_and(np.isfinite(vectors).all(axis=1), vectors.any(axis=1))


def read_vectors(output: Storage, commit_file: str) -> Iterator[tuple[pa.Array, Vectors]]:
    """The ids and embeddings (N, D) of a committed file, in batches."""
    with output.open(commit_file) as stream:
        parquet = pq.ParquetFile(stream, buffer_size=_READ_BYTES)  # else whole row groups are in memory
        columns = [schema.IMAGE_ID, "embedding"]
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
            column = batch.column("embedding")
            flat = column.flatten().to_numpy(zero_copy_only=False)
            vectors = flat.reshape(len(column), column.type.list_size).astype(np.float32)
            yield batch.column(schema.IMAGE_ID), vectors


def write_segment(output: Storage, build: str, name: str, commits: tuple[Commit, ...]) -> Written:
    """Copy the usable embeddings of some commits into a segment, and their image ids beside it.

    The ids go to the build's own folder. Raises OutputError where a committed file
    has gone: another run redid its shard meanwhile.
    """
    vectors_path, ids_path = f"{VECTORS}/{build}-{name}.f32", f"{BUILD}/{build}/{name}.ids.parquet"
    names_schema = pa.schema([schema.INDEX_IDS.field(schema.IMAGE_ID)])
    digest, rows, excluded = hashlib.sha256(), [], []
    with (
        output.replacing(vectors_path) as vectors_file,
        output.replacing(ids_path) as ids_file,
        vectors_file.open("wb") as target,
        pq.ParquetWriter(ids_file, names_schema) as writer,
    ):
        for commit in commits:
            names = []
            try:
                for batch, vectors in read_vectors(output, commit.embeddings.path):
                    good = usable(vectors)
                    data = normalize(vectors[good]).data
                    digest.update(data)
                    target.write(data)
                    names.append(batch.filter(pa.array(good)))
            except FileNotFoundError as error:
                raise OutputError(
                    f"{output.url(commit.embeddings.path)} went away during the build, since its shard was "
                    "redone; run index again"
                ) from error
            count = sum(map(len, names))
            rows.append((commit.stem, count))
            excluded.append((commit.stem, commit.num_rows - count))
            if count:
                image_ids = pa.chunked_array(names, pa.string()).combine_chunks()
                writer.write_table(pa.table([image_ids], names_schema))
        target.flush()
        size = target.tell()
        writer.close()
        ids = FileRef.of(ids_path, ids_file)
    give_back()
    return Written(FileRef(vectors_path, size, digest.hexdigest()), ids, tuple(rows), tuple(excluded))


class VectorStore:
    """The unit vectors of a version by faiss id, memory-mapped where they are first asked for."""

    def __init__(self, segments: tuple[Segment, ...], dim: int, fetch: Callable[[FileRef], Path]) -> None:
        self.segments = tuple(sorted(segments, key=lambda segment: segment.first_id))
        self.dim = dim
        self._fetch = fetch
        self._starts = np.array([segment.first_id for segment in self.segments], np.int64)
        self._open: dict[int, Vectors] = {}

    def open_all(self) -> None:
        """Map every segment now, so that it can be read even when its file is deleted."""
        for number in range(len(self.segments)):
            self.rows(number)

    def take(self, ids: Ids) -> Vectors:
        """The vectors (N, D) of these ids, in their order."""
        if len(self.segments) == 1:
            return np.asarray(self.rows(0)[ids - self._starts[0]])
        places = np.searchsorted(self._starts, ids, side="right") - 1
        taken = np.empty((len(ids), self.dim), np.float32)
        if len(ids) <= _FEW:  # the candidates of one query: quicker one by one
            for row, (number, faiss_id) in enumerate(zip(places.tolist(), ids.tolist(), strict=True)):
                taken[row] = self.rows(number)[faiss_id - self.segments[number].first_id]
            return taken
        for number in np.unique(places):
            here = places == number
            taken[here] = self.rows(int(number))[ids[here] - self._starts[number]]
        return taken

    def blocks(self, ids: Ids | None = None) -> Iterator[tuple[Ids, Vectors]]:
        """Ids and vectors in blocks: all there are, dead ones too, or those of `ids` (ascending)."""
        if ids is not None:
            for start in range(0, len(ids), BLOCK_ROWS):
                some = ids[start : start + BLOCK_ROWS]
                yield some, self.take(some)
            return
        for number, segment in enumerate(self.segments):
            yield from self.cut(self.rows(number), segment.first_id)

    @staticmethod
    def cut(rows: Vectors, first_id: int) -> Iterator[tuple[Ids, Vectors]]:
        """Rows (N, D) whose ids begin at `first_id`, in blocks."""
        for start in range(0, len(rows), BLOCK_ROWS):
            block = rows[start : start + BLOCK_ROWS]
            yield np.arange(first_id + start, first_id + start + len(block), dtype=np.int64), block

    def rows(self, number: int) -> Vectors:
        """The vectors of one segment."""
        if number not in self._open:
            segment = self.segments[number]
            path = self._fetch(segment.file)
            mapped = np.memmap(path, np.float32, "r", shape=(segment.num_vectors, self.dim))
            self._open[number] = np.asarray(mapped)
        return self._open[number]
