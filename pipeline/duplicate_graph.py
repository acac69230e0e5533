"""Which images are the same or nearly so: edges between rows, joined into components.

Rows are numbered as the committed files are read. Equal bytes (SHA-256) are joined first; then one row of
each such set is looked up in the index, and joined with every neighbour whose cosine reaches the threshold.
Vectors stay on disk; memory is some 60 bytes an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.commits import Commit
from pipeline.components import Components
from pipeline.errors import SearchError
from pipeline.index.engine import Engine
from pipeline.index.vectors import Ids, Mask
from pipeline.search import Searcher
from pipeline.storage import Storage

NEIGHBOURS, MANY_NEIGHBOURS = 32, 256
_QUERIES_AT_ONCE = 2048
_WIDER = 4  # times what a search reads: a pair on the border of two lists must be found too
_ROUNDING = 1e-6  # by which the cosine of equal vectors may fall short of 1
_COLUMNS = [schema.IMAGE_ID, "sha256", "width", "height"]


@dataclass(frozen=True)
class Rows:
    """Of every committed row its digest, pixels and faiss id (or -1); where each commit's rows begin."""

    commits: tuple[Commit, ...]
    starts: Ids
    digests: npt.NDArray[np.uint64]
    num_pixels: Ids
    faiss_ids: Ids

    def __len__(self) -> int:
        return len(self.faiss_ids)


def read_rows(output: Storage, commits: tuple[Commit, ...], searcher: Searcher) -> Rows:
    """Every row of these commits, in their order."""
    starts = np.cumsum([0, *(commit.num_rows for commit in commits)], dtype=np.int64)
    total = int(starts[-1])
    digests = np.zeros((total, 2), np.uint64)
    num_pixels, faiss_ids = np.zeros(total, np.int64), np.full(total, -1, np.int64)
    for commit, start in zip(commits, starts[:-1].tolist(), strict=True):
        names, of_names = searcher.ids_of_shard(commit.stem)
        for batch in batches(output, commit, _COLUMNS):
            some = slice(start, start + len(batch))
            digest = b"".join(value.as_py()[:16] for value in batch.column("sha256"))
            digests[some] = np.frombuffer(digest, np.uint64).reshape(-1, 2)
            sides = (batch.column(name).to_numpy().astype(np.int64) for name in ("width", "height"))
            num_pixels[some] = np.multiply(*sides)
            places = pc.fill_null(pc.index_in(batch.column(schema.IMAGE_ID), value_set=names), -1)
            faiss_ids[some] = np.append(of_names, -1)[places.to_numpy()]
            start += len(batch)
    return Rows(commits, starts, digests, num_pixels, faiss_ids)


def batches(output: Storage, commit: Commit, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a committed file, in batches. SearchError where it has gone."""
    try:
        with output.open(commit.embeddings.path) as file:
            yield from pq.ParquetFile(file).iter_batches(columns=columns)
    except FileNotFoundError as error:
        raise SearchError(
            f"{output.url(commit.embeddings.path)} went away meanwhile, since its shard was redone; "
            f"run: cvt-pipeline index {output.uri}, then dedup again"
        ) from error


def join_same_bytes(rows: Rows, components: Components) -> None:
    """Join rows whose originals have the same SHA-256 (its first 128 bits)."""
    order = np.lexsort((rows.digests[:, 1], rows.digests[:, 0]))
    same = (rows.digests[order[1:]] == rows.digests[order[:-1]]).all(axis=1)
    components.join(order[:-1][same], order[1:][same])


def join_near(rows: Rows, components: Components, engine: Engine, threshold: float) -> None:
    """Join rows whose embeddings' cosine is at least `threshold`, as far as the index finds them.

    A row whose every neighbour is that near may have more of them: it is asked again, for more, and then
    for those that are not joined with it yet, until none is left. In a component that is larger than any
    answer asking for more is spared.
    """
    firsts = _with_vector(rows, components)
    row_of = np.full(int(rows.faiss_ids.max(initial=-1)) + 1, -1, np.int64)
    row_of[rows.faiss_ids[firsts]] = firsts
    mask = np.zeros(_num_ids(engine, row_of), np.bool_)
    mask[rows.faiss_ids[firsts]] = True
    graph = _Graph(rows, row_of, components, _thorough(engine), min(threshold, 1 - _ROUNDING))
    left = graph.ask(firsts, NEIGHBOURS, mask)
    names, sizes = np.unique(components.roots(firsts), return_counts=True)
    seen = sizes[np.searchsorted(names, components.roots(left))] <= MANY_NEIGHBOURS
    left = np.concatenate([left[~seen], graph.ask(left[seen], MANY_NEIGHBOURS, mask)])
    while len(left):
        left = graph.ask_outside(left, mask)


@dataclass(frozen=True)
class _Graph:
    rows: Rows
    row_of: Ids
    components: Components
    engine: Engine
    threshold: float

    def ask(self, asked: Ids, k: int, mask: Mask) -> Ids:
        """Join rows with their near neighbours among `mask`; returns those that may have more."""
        saturated = []
        for start in range(0, len(asked), _QUERIES_AT_ONCE):
            some = asked[start : start + _QUERIES_AT_ONCE]
            queries = self.engine.store.take(self.rows.faiss_ids[some])
            scores, ids = self.engine.search(queries, min(k + 1, len(mask)), only=mask, widen=False)
            near = (ids >= 0) & (scores >= self.threshold)
            others = self.row_of[ids[near]]
            self.components.join(np.repeat(some, near.sum(axis=1)), others)
            saturated.append(some[near.all(axis=1)] if near.shape[1] > k else some[:0])
        return np.concatenate(saturated) if saturated else asked[:0]

    def ask_outside(self, asked: Ids, mask: Mask) -> Ids:
        """`ask`, each row among those outside its own component alone."""
        roots, left = self.components.roots(asked), []
        members = self.components.roots(np.arange(len(self.rows)))
        for root in np.unique(roots):
            outside = mask.copy()
            inside = self.rows.faiss_ids[members == root]
            outside[inside[inside >= 0]] = False
            left.append(self.ask(asked[roots == root], NEIGHBOURS, outside))
        return np.concatenate(left)


def _with_vector(rows: Rows, components: Components) -> Ids:
    """For each set of same bytes a row that has a vector; sets without one are left out."""
    having = np.flatnonzero(rows.faiss_ids >= 0)
    _, places = np.unique(components.roots(having), return_index=True)
    return having[places]


def _num_ids(engine: Engine, row_of: Ids) -> int:
    ends = [segment.end for segment in engine.store.segments]
    return max([len(row_of), *ends])


def _thorough(engine: Engine) -> Engine:
    effort = engine.settings.nprobe or engine.settings.ef_search
    if effort is None:
        return engine
    return engine.with_settings(engine.settings.with_effort(min(engine.most_effort, _WIDER * effort)))
