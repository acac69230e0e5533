"""Exact nearest neighbours by looking at every vector: what an index is measured against."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pipeline.index.vectors import Ids, Vectors, VectorStore

_GATHER_BYTES = 32_000_000
_QUERIES_AT_ONCE = 128


def nearest(blocks: Iterable[tuple[Ids, Vectors]], queries_QD: Vectors, k: int) -> tuple[Vectors, Ids]:
    """Cosines (Q, k) and ids (Q, k) of the best rows of `blocks`, best first; -inf and -1 beyond the last.

    Queries and rows are unit vectors.
    """
    scores = np.full((len(queries_QD), k), -np.inf, np.float32)
    ids = np.full((len(queries_QD), k), -1, np.int64)
    improve(scores, ids, blocks, queries_QD)
    return scores, ids


def improve(
    scores_QK: Vectors,
    ids_QK: Ids,
    blocks: Iterable[tuple[Ids, Vectors]],
    queries_QD: Vectors,
    floor_Q: Vectors | None = None,
) -> None:
    """Put the rows of `blocks` among the best so far, in place; but none that is not above its floor."""
    for block_ids, vectors in blocks:
        for start in range(0, len(queries_QD), _QUERIES_AT_ONCE):
            some = slice(start, start + _QUERIES_AT_ONCE)
            found = queries_QD[some] @ vectors.T
            if floor_Q is not None:
                found[found <= floor_Q[some, None]] = -np.inf
            scores_QK[some], ids_QK[some] = keep_best((scores_QK[some], ids_QK[some]), found, block_ids)


def keep_best(best: tuple[Vectors, Ids], scores_QN: Vectors, ids_N: Ids) -> tuple[Vectors, Ids]:
    """The k best (Q, k), sorted, of those known so far and of new rows.

    Only rows that beat the worst of the best are sorted: few, once the first blocks have been seen.
    """
    known, known_ids = best
    k, num_rows = known.shape[1], scores_QN.shape[1]
    width = int((scores_QN > known[:, -1:]).sum(axis=1).max(initial=0))
    if not width:
        return best
    width = min(width, k)
    if width < num_rows:
        top = np.argpartition(-scores_QN, width - 1, axis=1)[:, :width]
    else:
        top = np.broadcast_to(np.arange(num_rows), scores_QN.shape)
    merged = np.concatenate([known, np.take_along_axis(scores_QN, top, axis=1)], axis=1)
    merged_ids = np.concatenate([known_ids, ids_N[top]], axis=1)
    order = np.argsort(-merged, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(merged, order, axis=1), np.take_along_axis(merged_ids, order, axis=1)


def cosines(store: VectorStore, queries_QD: Vectors, ids_QC: Ids) -> Vectors:
    """Exact cosines (Q, C) of each query and its own candidates; of -1 some number."""
    width = ids_QC.shape[1]
    if len(ids_QC) == 1:
        return queries_QD @ store.take(np.maximum(ids_QC[0], 0)).T
    scores = np.empty(ids_QC.shape, np.float32)
    step = max(1, _GATHER_BYTES // (4 * store.dim * max(width, 1)))
    for start in range(0, len(scores), step):
        some = slice(start, start + step)
        ids = np.maximum(ids_QC[some], 0)
        vectors = store.take(ids.ravel()).reshape(*ids.shape, store.dim)
        scores[some] = np.matmul(vectors, queries_QD[some, :, None])[:, :, 0]
    return scores
