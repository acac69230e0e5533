"""One FAISS index open for queries, whatever its type: cosines of unit vectors, best first.

Candidates come from FAISS, by what it keeps of each vector; where that is less than the vector itself they
are ranked again by the exact ones. Rows that were deleted and are still inside, and rows that a filter
leaves out, are kept away by an id selector inside FAISS. Knows faiss ids alone, no images.
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from pipeline.index.brute_force import cosines, nearest
from pipeline.index.record import Settings
from pipeline.index.vectors import Ids, Mask, Vectors, VectorStore

BRUTE_FORCE_ROWS = 50_000  # a filter that leaves no more is answered by looking at each of them
MIN_NEIGHBOURS = 10  # k_factor counts for this many at least
_QUERIES_AT_ONCE = 1024  # fewer, and a product of matrices has too little to do


class Engine:
    """An index, the exact vectors of its ids and how it is searched.

    `alive` flags, for every id there has been, those that are to be found; None where FAISS holds no other.
    """

    def __init__(
        self, index: Any, store: VectorStore, settings: Settings, alive: Mask | None = None
    ) -> None:
        self.index, self.store, self.settings, self.alive = index, store, settings, alive
        self._live = None if alive is None else _selector(alive)
        self._usual = _parameters(index, settings, self._live)
        inner = searching(index)
        self.most_effort = inner.nlist if isinstance(inner, faiss.IndexIVF) else int(index.ntotal)
        lists = faiss.downcast_InvertedLists(inner.invlists) if isinstance(inner, faiss.IndexIVF) else None
        if isinstance(lists, faiss.OnDiskInvertedLists):
            lists.prefetch_nthread = 0  # else every search starts threads of its own

    def search(
        self, queries_QD: Vectors, k: int, *, only: Mask | None = None, widen: bool = True
    ) -> tuple[Vectors, Ids]:
        """Cosines (Q, k) and ids (Q, k) of the nearest rows, of those that `only` flags where it is given.

        `queries_QD` are unit vectors; `only` flags live ids. Where there are fewer than k rows, the rest is
        -inf and -1. Without `widen` a filter does not make the search read more lists.
        """
        selector, share = self._live, 1.0
        if only is not None:
            chosen = np.flatnonzero(only)
            if len(chosen) <= max(BRUTE_FORCE_ROWS, k) or not self.takes_selector:
                return nearest(self.store.blocks(chosen), queries_QD, k)
            selector, share = _selector(only), len(chosen) / len(only)
        answers = []
        for start in range(0, max(len(queries_QD), 1), _QUERIES_AT_ONCE):
            queries = queries_QD[start : start + _QUERIES_AT_ONCE]
            answers.append(self._widening(queries, k, selector, share, filtered=only is not None and widen))
        if len(answers) == 1:
            return answers[0]
        return np.concatenate([scores for scores, _ in answers]), np.concatenate(
            [ids for _, ids in answers]
        )

    def with_settings(self, settings: Settings) -> Engine:
        """The same index, searched otherwise."""
        return Engine(self.index, self.store, settings, self.alive)

    @cached_property
    def takes_selector(self) -> bool:
        """Whether FAISS can leave out rows of this type while it searches."""
        probe, nothing = np.ones((1, self.store.dim), np.float32), _selector(np.zeros(1, np.bool_))
        try:
            self._faiss(probe, 1, self.settings, nothing)
        except RuntimeError:
            return False
        return True

    @property
    def ranks_again(self) -> bool:
        """Whether exact vectors rank candidates here; FAISS's Refine types do so themselves."""
        return self.settings.k_factor > 0 and not isinstance(_bare(self.index), faiss.IndexRefine)

    def candidates(self, queries_QD: Vectors, number: int) -> tuple[Vectors, Ids]:
        """What FAISS finds by what it keeps: scores and ids (Q, number)."""
        return self._faiss(queries_QD, number, self.settings, self._live)

    def _widening(
        self, queries: Vectors, k: int, allowed: Any, share: float, *, filtered: bool
    ) -> tuple[Vectors, Ids]:
        """Search, and look at twice as much (lists, or nodes of a graph) while an answer is incomplete.

        Under a filter, which a `share` of the rows pass, the lists near a query may hold few of those: then
        an answer must also stay the same when twice as much is looked at.
        """
        settings = self.settings
        effort = settings.nprobe or settings.ef_search
        if effort is None:
            return self._ranked(queries, k, settings, allowed)
        if filtered:
            effort = min(self.most_effort, math.ceil(effort / share))
            settings = settings.with_effort(effort)
        scores, ids = self._ranked(queries, k, settings, allowed)
        left = np.arange(len(ids)) if filtered else np.flatnonzero(ids[:, -1] < 0)
        while len(left) and effort < self.most_effort:
            effort = min(self.most_effort, 2 * effort)
            wider = self._ranked(queries[left], k, settings.with_effort(effort), allowed)
            incomplete = wider[1][:, -1] < 0
            if filtered:
                incomplete |= (wider[1] != ids[left]).any(axis=1)
            scores[left], ids[left] = wider
            left = left[incomplete]
        return scores, ids

    def _ranked(
        self, queries: Vectors, k: int, settings: Settings, allowed: Any | None
    ) -> tuple[Vectors, Ids]:
        if not self.ranks_again:
            return self._faiss(queries, k, settings, allowed)
        number = min(num_candidates(settings, k), max(self.index.ntotal, k))
        _, ids = self._faiss(queries, number, settings, allowed)
        scores = cosines(self.store, queries, ids)
        scores[ids < 0] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        rows = np.arange(len(order))[:, None]
        return scores[rows, order], ids[rows, order]

    def _faiss(
        self, queries: Vectors, k: int, settings: Settings, allowed: Any | None
    ) -> tuple[Vectors, Ids]:
        if settings is self.settings and allowed is self._live:
            parameters = self._usual
        else:
            parameters = _parameters(self.index, settings, allowed)
        scores, ids = self.index.search(np.ascontiguousarray(queries), k, params=parameters)
        scores[ids < 0] = -np.inf
        return scores, ids


def leave_threads() -> None:
    """Have searches of the calling thread take half of the cores: FAISS's threads spin while they wait."""
    faiss.omp_set_num_threads(max(1, faiss.omp_get_max_threads() // 2))


def open_faiss(path: Path, *, in_memory: bool) -> Any:
    """The index of a file whose checksum was compared; its lists stay on disk unless `in_memory`."""
    return faiss.read_index(str(path), 0 if in_memory else faiss.IO_FLAG_MMAP)


def num_candidates(settings: Settings, k: int) -> int:
    """How many candidates are ranked again for k neighbours."""
    return math.ceil(settings.k_factor * max(k, MIN_NEIGHBOURS))


def _parameters(index: Any, settings: Settings, selector: Any | None) -> Any:
    """FAISS's parameters of one search of `index`, through whatever wraps its inner index."""
    outer = faiss.downcast_index(index)
    chosen = {} if selector is None else {"sel": selector}
    if isinstance(outer, faiss.IndexIDMap):
        return _parameters(outer.index, settings, selector)
    if isinstance(outer, faiss.IndexPreTransform):
        below = _parameters(outer.index, settings, selector)
        return faiss.SearchParametersPreTransform(index_params=below)
    if isinstance(outer, faiss.IndexRefine):
        below = _parameters(outer.base_index, settings, selector)
        return faiss.IndexRefineSearchParameters(
            k_factor=settings.k_factor or outer.k_factor, base_index_params=below
        )
    if isinstance(outer, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=settings.nprobe or outer.nprobe, **chosen)
    if isinstance(outer, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=settings.ef_search or outer.hnsw.efSearch, **chosen)
    return faiss.SearchParameters(**chosen) if chosen else None


def _selector(flags: Mask) -> Any:
    return faiss.IDSelectorBitmap(np.packbits(flags, bitorder="little"))


def searching(index: Any) -> Any:
    """The index that does the searching, without what wraps it."""
    outer = faiss.downcast_index(index)
    if isinstance(outer, faiss.IndexIDMap | faiss.IndexPreTransform):
        return searching(outer.index)
    return searching(outer.base_index) if isinstance(outer, faiss.IndexRefine) else outer


def _bare(index: Any) -> Any:
    outer = faiss.downcast_index(index)
    return _bare(outer.index) if isinstance(outer, faiss.IndexIDMap) else outer
