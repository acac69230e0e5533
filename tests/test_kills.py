"""The short form of tests/chaos.py: the driver and a worker are killed, and the rows are right.

CVT_TEST_KILLS sets how many kills (2); the moments are drawn from CVT_TEST_SEED (0).
"""

import os

from tests.chaos import KINDS, Storm
from tests.disturbed import corpus, undisturbed

__all__ = ["corpus", "undisturbed"]  # fixtures
KILLS = int(os.environ.get("CVT_TEST_KILLS", "2"))
SEED = int(os.environ.get("CVT_TEST_SEED", "0"))


def test_killed_runs_end_in_the_rows_of_an_undisturbed_one(corpus, tiny_model, undisturbed, tmp_path):
    storm = Storm(corpus, tiny_model, undisturbed, tmp_path, SEED)
    told = []
    for _ in range(10 * KILLS):  # a run may have ended before it is hit
        told += filter(None, [storm.strike(KINDS[len(told) % len(KINDS)])])
        if len(told) == KILLS:
            break
    assert len(told) == KILLS, f"seed {SEED}: every run had ended before it was hit"
    storm.finish("; ".join(told))
