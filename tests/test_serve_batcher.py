"""Many visitors at once get what each alone would get."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipeline.serve.batcher import Batcher

ROWS = np.random.default_rng(0).standard_normal((500, 8)).astype(np.float32)


def brute_force(vectors, k):
    time.sleep(0.01)
    scores = vectors @ ROWS.T
    ids = np.argsort(-scores, axis=1)[:, :k]
    return np.take_along_axis(scores, ids, 1), ids


def test_each_gets_its_own_answer_and_few_searches_are_made():
    calls = []

    def search(vectors, k):
        calls.append(len(vectors))
        return brute_force(vectors, k)

    async def ask():
        with ThreadPoolExecutor(1) as pool:
            batcher = Batcher(search, pool)
            return await asyncio.gather(*(batcher(ROWS[n], 1 + n % 7) for n in range(200)))

    for n, (scores, ids) in enumerate(asyncio.run(ask())):
        expected = brute_force(ROWS[n : n + 1], 1 + n % 7)
        assert ids.tolist() == expected[1][0].tolist()
        assert scores == pytest.approx(expected[0][0])
    assert sum(calls) == 200
    assert max(calls) <= 64
    assert len(calls) <= 8


def test_a_search_that_fails_is_told_to_each_and_the_next_one_goes_on():
    def search(vectors, k):
        if not vectors.any():
            raise RuntimeError("no direction")
        return brute_force(vectors, k)

    async def ask():
        with ThreadPoolExecutor(1) as pool:
            batcher = Batcher(search, pool)
            failed = await asyncio.gather(
                *(batcher(0 * ROWS[0], 3) for _ in range(5)), return_exceptions=True
            )
            return failed, await batcher(ROWS[3], 1)

    failed, (_, ids) = asyncio.run(ask())
    assert [type(error) for error in failed] == [RuntimeError] * 5
    assert len(ids) == 1


def test_a_visitor_who_leaves_takes_nobody_along():
    async def ask():
        with ThreadPoolExecutor(1) as pool:
            batcher = Batcher(brute_force, pool)
            tasks = [asyncio.create_task(batcher(ROWS[n], 2)) for n in range(3)]
            await asyncio.sleep(0)
            tasks[0].cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    gone, second, third = asyncio.run(ask())
    assert isinstance(gone, asyncio.CancelledError)
    assert len(second[1]) == len(third[1]) == 2
