"""Searches that come at the same time, asked of FAISS together: one product of matrices for many visitors.

While one lot is searched the next gathers, so that nobody waits for a clock. Knows vectors and faiss ids.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor

import numpy as np

from pipeline.index.vectors import Ids, Vectors

_MOST = 64

Found = tuple[Vectors, Ids]
Search = Callable[[Vectors, int], Found]


class Batcher:
    """`search(vectors (Q, D), k)` for one vector after the other, from one event loop."""

    def __init__(self, search: Search, pool: Executor) -> None:
        self._search, self._pool = search, pool
        self._waiting: list[tuple[Vectors, int, asyncio.Future[Found]]] = []
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, vector: Vectors, k: int) -> Found:
        """Cosines (k,) and faiss ids (k,) of the nearest, best first."""
        future: asyncio.Future[Found] = asyncio.get_running_loop().create_future()
        self._waiting.append((vector, k, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            lot, self._waiting = self._waiting[:_MOST], self._waiting[_MOST:]
            vectors = np.stack([vector for vector, _, _ in lot])
            try:
                scores, ids = await loop.run_in_executor(
                    self._pool, self._search, vectors, max(k for _, k, _ in lot)
                )
            except Exception as error:  # each who waits is told; none is left waiting
                for _, _, future in lot:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, k, future), row, found in zip(lot, scores, ids, strict=True):
                if not future.done():
                    future.set_result((row[:k], found[:k]))
