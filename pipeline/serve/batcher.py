"""Searches that come at the same time, asked of FAISS together: one product of matrices for many visitors.

While one lot is searched the next gathers, so that nobody waits for a clock. Knows vectors and faiss ids.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np

from pipeline.index.vectors import Ids, Vectors

_MOST = 64

Found = tuple[Vectors, Ids]
Search = Callable[[Vectors, int], Found]


@dataclass
class _Lot:
    """Searches that are asked together; `found` is the answer to all of them."""

    vectors: list[Vectors] = field(default_factory=list)
    k: int = 0
    found: asyncio.Task[Found] | None = None


class Batcher:
    """`search(vectors (Q, D), k)` for one vector after the other, from one event loop."""

    def __init__(self, search: Search, pool: Executor) -> None:
        self._search, self._pool = search, pool
        self._gathering: _Lot | None = None
        self._turn = asyncio.Lock()

    async def __call__(self, vector: Vectors, k: int) -> Found:
        """Cosines (k,) and faiss ids (k,) of the nearest, best first."""
        lot = self._gathering
        if lot is None or len(lot.vectors) == _MOST:
            lot = self._gathering = _Lot()
            lot.found = asyncio.create_task(self._ask(lot))
        place = len(lot.vectors)
        lot.vectors.append(vector)
        lot.k = max(lot.k, k)
        assert lot.found is not None
        scores, ids = await asyncio.shield(lot.found)  # a visitor who leaves takes nobody along
        return scores[place, :k], ids[place, :k]

    async def _ask(self, lot: _Lot) -> Found:
        async with self._turn:
            if self._gathering is lot:
                self._gathering = None
            vectors = np.stack(lot.vectors)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, self._search, vectors, lot.k)
