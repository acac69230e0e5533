"""The ground truth of a version: for held-out rows, the nearest others, by exact cosines.

Held-out rows are indexed like any other, and never trained on (a hash of their id tells which they are).
The truth follows the corpus: dead neighbours leave, new rows are compared, so that a night costs what
changed. `floor` tells how deep a query's list can be trusted: every live row above it is in the list.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.index.brute_force import cosines, improve, nearest
from pipeline.index.vectors import Ids, Mask, Vectors, VectorStore

NUM_QUERIES = 512
RECALL_AT = (1, 10, 100)
# Neighbours kept, so that a hundred are left after many nights.
DEPTH: int = schema.TRUTH.field("neighbours").type.list_size
_HELD_OUT = 8  # one row of so many
_TIE = 1e-6


@dataclass(frozen=True)
class Truth:
    """Ids of the queries (Q,), of their neighbours (Q, DEPTH; -1 beyond the last) and their cosines."""

    queries: Ids
    ids: Ids
    scores: Vectors
    floor: Vectors

    def depth(self, num_live: int) -> int:
        """How many neighbours every query must have among `num_live` rows."""
        return min(RECALL_AT[-1], num_live - 1)

    def followed(self, store: VectorStore, alive: Mask, new: Ids) -> Truth:
        """The truth after rows died and the rows `new` (ascending) came; spent queries are retired."""
        kept = alive[self.queries]
        queries, ids, scores, floor = (
            self.queries[kept],
            self.ids[kept],
            self.scores[kept],
            self.floor[kept],
        )
        dead = (ids < 0) | ~alive[np.maximum(ids, 0)]
        ids, scores = np.where(dead, -1, ids), np.where(dead, np.float32(-np.inf), scores)
        order = np.argsort(-scores, axis=1, kind="stable")
        scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
        improve(scores, ids, store.blocks(new), store.take(queries), floor)
        floor = np.where(ids[:, -1] >= 0, np.maximum(floor, scores[:, -1]), floor)
        deep = (ids >= 0).sum(axis=1) >= self.depth(int(alive.sum()))
        return Truth(queries[deep], ids[deep], scores[deep], floor[deep])

    def write(self, path: Path) -> None:
        """One row a query, as Parquet."""
        columns = [self.queries, *(_lists(array) for array in (self.ids, self.scores)), self.floor]
        pq.write_table(pa.table([pa.array(column) for column in columns], schema.TRUTH), path)

    @classmethod
    def read(cls, path: Path) -> Truth:
        table = pq.read_table(path, schema=schema.TRUTH, use_threads=False).combine_chunks()
        queries, ids, scores, floor = table.columns
        rows = len(table)
        return cls(
            queries.to_numpy(),
            ids.combine_chunks().flatten().to_numpy().reshape(rows, -1),
            scores.combine_chunks().flatten().to_numpy().reshape(rows, -1),
            floor.to_numpy(),
        )


def is_held_out(ids: Ids) -> Mask:
    """Which rows are never trained on: one of eight, by a hash of the id."""
    mixed = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return np.asarray((mixed >> np.uint64(40)) % np.uint64(_HELD_OUT) == 0)


def make_truth(store: VectorStore, alive: Mask) -> Truth:
    """The truth of up to 512 held-out rows, from a look at every live row."""
    live = np.flatnonzero(alive)
    eligible = live[is_held_out(live)]
    if not len(eligible):
        eligible = live
    rng = np.random.default_rng(len(live))
    queries = np.sort(rng.choice(eligible, min(NUM_QUERIES, len(eligible)), replace=False))
    scores, ids = nearest(
        store.blocks(None if len(live) == len(alive) else live), store.take(queries), DEPTH + 1
    )
    scores, ids = without_self(queries, scores, ids)
    floor = np.where(ids[:, -1] >= 0, scores[:, -1], np.float32(-np.inf))
    return Truth(queries, ids, scores, floor)


def without_self(queries: Ids, scores: Vectors, ids: Ids) -> tuple[Vectors, Ids]:
    """Each row's answers (Q, k + 1) without the query itself, or without the last: (Q, k)."""
    own = ids == queries[:, None]
    own[:, -1] |= ~own.any(axis=1)
    shape = (len(ids), ids.shape[1] - 1)
    return scores[~own].reshape(shape), ids[~own].reshape(shape)


def share_found(truth: Truth, store: VectorStore, found: Ids, k: int) -> float:
    """Recall@k of answers (Q, >= k; without the query itself), by exact cosines.

    An answer counts if it is as near as the true k-th neighbour, so that equal vectors may stand for one
    another.
    """
    if not len(found):
        return 1.0
    hits = is_hit(truth, store, found[:, :k], k)
    possible = np.minimum(k, (truth.ids >= 0).sum(axis=1))
    return float(np.where(possible, hits.sum(axis=1) / np.maximum(possible, 1), 1.0).mean())


def is_hit(truth: Truth, store: VectorStore, found: Ids, k: int) -> Mask:
    """Which of the answers (Q, n) are as near to their query as its true k-th neighbour."""
    count = len(found)
    scores = cosines(store, store.take(truth.queries), found)
    possible = np.minimum(k, (truth.ids >= 0).sum(axis=1))
    last = truth.scores[np.arange(count), np.maximum(possible - 1, 0)]
    return (scores >= last[:, None] - _TIE) & (found >= 0)  # type: ignore[no-any-return]


def _lists(array: Ids | Vectors) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), array.shape[1])
