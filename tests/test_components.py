"""Connected components against a search through the whole graph."""

from __future__ import annotations

import time
from collections import defaultdict

import numpy as np
import pytest

from pipeline.components import Components, Numbers


def numbers(*values: int) -> Numbers:
    return np.array(values, np.int64)


def smallest_reachable(size: int, left: Numbers, right: Numbers) -> list[int]:
    """The smallest number that can be reached from each one, by walking along the edges."""
    beside = defaultdict(list)
    for one, other in zip(left.tolist(), right.tolist(), strict=True):
        beside[one].append(other)
        beside[other].append(one)
    found = [-1] * size
    for start in range(size):
        left_to_visit = [start] if found[start] < 0 else []
        while left_to_visit:
            number = left_to_visit.pop()
            if found[number] < 0:
                found[number] = start
                left_to_visit += beside[number]
    return found


@pytest.mark.parametrize("num_batches", [1, 7])
@pytest.mark.parametrize("num_edges", [0, 50, 400, 600, 3000])
def test_random_graphs_fall_into_what_hangs_together(num_edges: int, num_batches: int) -> None:
    rng = np.random.default_rng(num_edges)
    left, right = rng.integers(1000, size=(2, num_edges))
    components = Components(1000)

    for batch in np.array_split(np.arange(num_edges), num_batches):
        components.join(left[batch], right[batch])

    assert components.roots(np.arange(1000)).tolist() == smallest_reachable(1000, left, right)


def test_a_star_and_a_ring_are_one_component_each() -> None:
    components = Components(200)
    components.join(np.full(99, 99), np.arange(99))
    components.join(np.arange(100, 200), np.roll(np.arange(100, 200), 1))

    assert components.roots(np.arange(200)).tolist() == [0] * 100 + [100] * 100


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_chain_of_ten_thousand_is_one_component_edge_by_edge_or_at_once(shuffled: bool) -> None:
    order = np.random.default_rng(1).permutation(9_999) if shuffled else np.arange(9_999)
    at_once, in_turn = Components(10_000), Components(10_000)

    at_once.join(order, order + 1)
    for edges in np.array_split(order, 300):
        in_turn.join(edges + 1, edges)

    assert not at_once.roots(np.arange(10_000)).any()
    assert not in_turn.roots(np.arange(10_000)).any()


@pytest.mark.parametrize("step", [1, -1])
def test_a_chain_takes_no_step_for_each_of_its_links(step: int) -> None:
    components, links = Components(300_000), np.arange(299_999)[::step]
    started = time.perf_counter()

    components.join(links, links + 1)

    assert not components.roots(np.arange(300_000)).any()
    assert time.perf_counter() - started < 60  # link by link it takes minutes


def test_an_edge_to_itself_or_twice_changes_nothing_and_a_root_may_be_asked_of_a_few() -> None:
    components = Components(5)
    components.join(numbers(2, 4, 4, 2), numbers(2, 1, 1, 2))
    components.join(numbers(), numbers())

    assert components.roots(numbers(4, 2, 4)).tolist() == [1, 2, 1]
    assert Components(0).roots(numbers()).tolist() == []
