"""Times that can be compared: everything in turn, round after round, on one machine in one process.

Enters: calls by name. Leaves: seconds by name, and figures of them. Knows nothing of what is called.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

PAUSE_S = 0.05  # thread pools spin for a while after their work, on the cores of whoever comes next


@dataclass(frozen=True)
class Spread:
    """Median, least and most of a few figures."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


def interleave(
    calls: Mapping[str, Callable[[], object]],
    num_rounds: Mapping[str, int],
    *,
    pause_s: float = PAUSE_S,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every call, in each round each once in the same order.

    One that has fewer rounds than others takes part in the first ones, so that equal positions of two
    lists are of one round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(max(num_rounds.values(), default=0)):
        for name, call in calls.items():
            if number < num_rounds[name]:
                time.sleep(pause_s)
                began = clock()
                call()
                seconds[name].append(clock() - began)
    return seconds


def ratio(ours_s: Sequence[float], rival_s: Sequence[float]) -> float:
    """How many times as fast as the rival ours is: the median over the rounds that both were in.

    Both in seconds for the same work.
    """
    both = min(len(ours_s), len(rival_s))
    return statistics.median(
        rival / ours for ours, rival in zip(ours_s[:both], rival_s[:both], strict=True)
    )
