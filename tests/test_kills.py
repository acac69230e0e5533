"""Kill the driver at any moment, run again: the output has the rows of an undisturbed run.

CVT_TEST_KILLS sets how many kills (2); the moments are drawn from CVT_TEST_SEED (0).
"""

import os
import random
import time

from tests.disturbed import (
    NUM_TARS,
    assert_same_rows,
    config_for,
    corpus,
    kill,
    num_commits,
    start,
    undisturbed,
    wait_for_commits,
)
from tests.running import cli, leftovers, rows_of

__all__ = ["corpus", "undisturbed"]  # fixtures
KILLS = int(os.environ.get("CVT_TEST_KILLS", "2"))
SEED = int(os.environ.get("CVT_TEST_SEED", "0"))


def test_killed_runs_end_in_the_rows_of_an_undisturbed_one(corpus, tiny_model, undisturbed, tmp_path):
    config = config_for(corpus, tiny_model, tmp_path)
    rng = random.Random(SEED)
    landed = []
    for _ in range(KILLS):
        done = num_commits(tmp_path)
        until = rng.randrange(done, NUM_TARS) if done < NUM_TARS else done
        pause = rng.uniform(0, 6) if until == done else rng.uniform(0, 0.3)
        process = start(config)
        wait_for_commits(process, tmp_path, until)
        time.sleep(pause)
        ended = process.poll() is not None
        kill(process)
        staged = len(list((tmp_path / "out/_staging").glob("**/*.arrow")))
        landed.append({"before": done, "after": num_commits(tmp_path), "staged": staged, "ended": ended})
    told = f"seed {SEED}, kills landed at {landed}"
    assert any(not one["ended"] for one in landed), told
    last = cli("extract", config)
    assert last.returncode == 0, f"{told}\n{last.stderr}"
    out = tmp_path / "out"
    assert_same_rows((rows_of(out), rows_of(out, "rejects")), undisturbed, told)
    assert leftovers(out) == [], told
    verified = cli("verify", out)
    assert verified.returncode == 0, f"{told}\n{verified.stderr}"
    began = time.time()
    again = cli("extract", config)
    assert (again.returncode, "nothing to do" in again.stderr) == (0, True), f"{told}\n{again.stderr}"
    assert time.time() - began < 20
