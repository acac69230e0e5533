"""Vectors that resemble embeddings, committed as extract does it, with queries and their true neighbours.

Enters: a number of rows and a dimension D. Leaves: an output (Parquet, commits, fingerprint), 1,000 queries
that are not in it, and their nearest rows by brute force in float32. Knows no index.

How they are made: 2,000 centres, N(0, 1) in 48 dimensions; a vector is a centre drawn at random plus noise
of N(0, 0.5²), mapped by one random layer of weights N(0, 1) / sqrt(48) to D dimensions and cut at zero
(ReLU). Nothing is L2-normalised. So they have what a network's embeddings have: clusters, far fewer degrees
of freedom (48) than numbers (D), and coordinates that depend on one another. Uniform noise has none of it:
there all rows are about equally far away, the nearest is hardly nearer than any other, and whatever skips
rows loses neighbours at random, so that a figure on it says nothing about images.

A corpus lies in a folder named by its size and is made once; several runs may share it.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

# The pipeline is imported where it is needed: autofaiss's environment, which reads this file, has none.

NUM_CENTRES, LATENT_DIM, NOISE = 2000, 48, 0.5
NUM_SHARDS, NUM_QUERIES, K = 20, 1000, 10
BLOCK_ROWS = 65_536  # drawn, written and searched at once
GROUP_ROWS = 4096  # of a row group, as extract writes them
KEPT = 64  # true neighbours kept of a query, so that those that tie with the last of K are known
TIE = 1e-6  # cosines so close are equal
SEED = 20_260_101

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Corpus:
    """A corpus on disk. A row's position counts over all shards in the order of their names."""

    folder: Path
    num_rows: int
    dim: int

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def shard_rows(self) -> int:
        """Rows of a shard, of the last one at most."""
        return math.ceil(self.num_rows / NUM_SHARDS)

    @cached_property
    def queries(self) -> Vectors:
        """(Q, D), not normalised."""
        return np.load(self.folder / "queries.npy")  # type: ignore[no-any-return]

    def vectors(self) -> Vectors:
        """All rows as they were committed, normalised, (N, D)."""
        vectors, filled = np.empty((self.num_rows, self.dim), np.float32), 0
        for path in sorted((self.output / "embeddings").iterdir()):
            for block in _read(path, self.dim):
                vectors[filled : filled + len(block)] = normalized(block)
                filled += len(block)
        return vectors

    def npy_folder(self) -> Path:
        """Normalised copies as .npy, a file a shard, made when first asked for: what autofaiss reads."""
        folder = self.folder / "npy"
        if not folder.exists():
            made = _beside(folder)
            for number, path in enumerate(sorted((self.output / "embeddings").iterdir())):
                np.save(made / f"{number:03d}.npy", normalized(np.concatenate(list(_read(path, self.dim)))))
            _put_in_place(made, folder)
        return folder

    def position(self, image_id: str) -> int:
        """The position of the row with this id."""
        shard, _, number = image_id.partition("#")
        return int(shard.removeprefix("shard-").removesuffix(".tar")) * self.shard_rows + int(number)

    def recall_at_10(self, found: Sequence[Iterable[int]]) -> float:
        """Share of the true neighbours found, by position; a row that ties with the last of them counts."""
        positions = np.load(self.folder / "true_positions.npy")
        cosines = np.load(self.folder / "true_cosines.npy")
        num_hits = 0
        for row, candidates, values in zip(found, positions, cosines, strict=True):
            right = candidates[values >= values[K - 1] - TIE]
            num_hits += min(K, len(set(right.tolist()).intersection(list(row)[:K])))
        return num_hits / (K * len(positions))


class Mixture:
    """What vectors are drawn from; equal seeds draw equal vectors."""

    def __init__(self, dim: int) -> None:
        rng = np.random.default_rng(SEED)
        self._centres = rng.standard_normal((NUM_CENTRES, LATENT_DIM), np.float32)
        self._weights = rng.standard_normal((LATENT_DIM, dim), np.float32) / np.float32(LATENT_DIM**0.5)

    def draw(self, count: int, *seed: int) -> Vectors:
        """(count, D), not normalised."""
        rng = np.random.default_rng([SEED, *seed])
        latent = self._centres[rng.integers(NUM_CENTRES, size=count)]
        latent += np.float32(NOISE) * rng.standard_normal(latent.shape, np.float32)
        vectors: Vectors = np.maximum(latent @ self._weights, 0)
        return vectors


class Nearest:
    """The best rows so far of every query: `cosines` (Q, KEPT), falling, and `positions` (Q, KEPT)."""

    def __init__(self, queries_QD: Vectors) -> None:
        self._queries = normalized(queries_QD)
        self.cosines = np.full((len(queries_QD), KEPT), -np.inf, np.float32)
        self.positions = np.full((len(queries_QD), KEPT), -1, np.int64)

    def add(self, first_position: int, vectors_ND: Vectors) -> None:
        """Hold rows, with positions from `first_position` on, against the best so far."""
        for start in range(0, len(vectors_ND), GROUP_ROWS):
            new = self._queries @ normalized(vectors_ND[start : start + GROUP_ROWS]).T
            positions = np.broadcast_to(first_position + start + np.arange(new.shape[1]), new.shape)
            cosines = np.concatenate([self.cosines, new], axis=1)
            best = np.argpartition(cosines, -KEPT, axis=1)[:, -KEPT:]
            best = np.take_along_axis(best, np.argsort(-np.take_along_axis(cosines, best, 1), axis=1), 1)
            self.cosines = np.take_along_axis(cosines, best, 1)
            self.positions = np.take_along_axis(np.concatenate([self.positions, positions], 1), best, 1)


def corpus_in(work: Path, num_rows: int, dim: int) -> Corpus:
    """The corpus of this size in the folder `work`, made where it is not there yet."""
    corpus = Corpus(work / f"corpus-{num_rows}x{dim}", num_rows, dim)
    if not corpus.folder.exists():
        made = Corpus(_beside(corpus.folder), num_rows, dim)
        _make(made)
        _put_in_place(made.folder, corpus.folder)
    return corpus


def normalized(vectors: Vectors) -> Vectors:
    """Rows (N, D) scaled to length 1."""
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    scaled: Vectors = vectors / lengths[:, None].astype(np.float32)
    return scaled


def _make(corpus: Corpus) -> None:
    """Write shards, queries and truth; a shard's rows are drawn, written and searched block by block."""
    from pipeline.storage import Storage
    from tests.made_output import claimed

    mixture = Mixture(corpus.dim)
    queries = mixture.draw(NUM_QUERIES, 1)
    nearest = Nearest(queries)
    output: Storage = claimed(corpus.output)
    for number, first in enumerate(range(0, corpus.num_rows, corpus.shard_rows)):
        num_rows = min(corpus.shard_rows, corpus.num_rows - first)
        _commit(output, f"shard-{number:03d}.tar", _watched(mixture, nearest, number, first, num_rows))
    np.save(corpus.folder / "queries.npy", queries)
    np.save(corpus.folder / "true_positions.npy", nearest.positions)
    np.save(corpus.folder / "true_cosines.npy", nearest.cosines)


def _watched(
    mixture: Mixture, nearest: Nearest, shard: int, first: int, num_rows: int
) -> Iterator[Vectors]:
    """The blocks of a shard, each of them held against the queries on its way."""
    for start in range(0, num_rows, BLOCK_ROWS):
        block = mixture.draw(min(BLOCK_ROWS, num_rows - start), 2, shard, start)
        nearest.add(first + start, block)
        yield block


def _commit(output: Any, name: str, blocks: Iterable[Vectors]) -> None:
    """Commit vectors as the shard `name`, with the ids `name#0`, `name#1` and so on."""
    from pipeline.commits import Commit, DataFile, write_commit
    from pipeline.shards import Shard
    from pipeline.storage import sha256_of
    from tests.made_output import COMMITTED_AT, FINGERPRINT

    shard = Shard(name, f"file:///nowhere/{name}", "webdataset", size=1, version="1")
    stem = shard.stem(FINGERPRINT.digest)
    path = f"embeddings/{stem}.parquet"
    with output.replacing(path) as local:
        num_rows = _write(local, name, blocks)
        file = DataFile(path, num_rows, local.stat().st_size, sha256_of(local))
    counts = (num_rows, num_rows, 0)
    write_commit(
        output,
        Commit(stem, shard, FINGERPRINT.digest, *counts, {}, file, None, (), "bench", COMMITTED_AT),
    )


def _write(path: Path, name: str, blocks: Iterable[Vectors]) -> int:
    """A Parquet file with the columns of a model without a head; returns its rows."""
    from pipeline import schema

    writer, num_rows = None, 0
    for vectors in blocks:
        count, dim = vectors.shape
        columns = schema.embeddings_schema(dim=dim, num_labels=0, logits="none", dtype="float32")
        keys = [str(number) for number in range(num_rows, num_rows + count)]
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim)
        sides = pa.array(np.full(count, 224, np.int32))
        values = [[f"{name}#{key}" for key in keys], [name] * count, keys, embedding, sides, sides]
        table = pa.table([*values, ["JPEG"] * count, pa.array([bytes(32)] * count, pa.binary(32))], columns)
        writer = writer or pq.ParquetWriter(path, columns, compression="zstd")
        writer.write_table(table, row_group_size=GROUP_ROWS)
        num_rows += count
    assert writer is not None
    writer.close()
    return num_rows


def _read(path: Path, dim: int) -> Iterator[Vectors]:
    """The vectors of a committed file, (n, D) at a time."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(GROUP_ROWS, columns=["embedding"]):
            yield batch.column(0).flatten().to_numpy().reshape(-1, dim)


def _beside(folder: Path) -> Path:
    """A new folder that becomes `folder` when it is whole."""
    made = folder.with_name(f"{folder.name}.{os.getpid()}")
    made.mkdir(parents=True)
    return made


def _put_in_place(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(made)  # another run was faster, and made the same
