"""Signals, two runs at once, a full disk: a clean end or words, and never a wrong output."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest

from pipeline.stop import GRACE_S
from tests.disturbed import (
    NUM_TARS,
    TAR_IMAGES,
    config_for,
    corpus,
    kill,
    num_commits,
    start,
    wait_for_commits,
)
from tests.running import cli, leftovers, make_config, rows_of, run

__all__ = ["corpus"]  # fixtures

# A busy machine may need longer to tidy up than the grace that a run has.
_SLOWLY = "import pipeline.stop; pipeline.stop.GRACE_S = 240; from jobs.cli import main; main()"
WITHOUT_HASTE = (sys.executable, "-c", _SLOWLY)


@pytest.mark.parametrize(
    ("signum", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_a_signal_ends_a_run_tidily_and_keeps_its_commits(corpus, tiny_model, tmp_path, signum, code):
    config = config_for(corpus, tiny_model, tmp_path)
    rng = random.Random(signum)
    process = start(config, WITHOUT_HASTE)
    try:
        wait_for_commits(process, tmp_path, rng.randrange(1, NUM_TARS - 4))
        time.sleep(rng.uniform(0, 0.3))
        before = num_commits(tmp_path)
        process.send_signal(signum)
        returned = process.wait(300)
    finally:
        kill(process)
    told = f"{before} commits before, {num_commits(tmp_path)} after\n"
    told += (tmp_path / "config.log").read_text()[-1500:]
    assert returned == code, told
    assert before <= num_commits(tmp_path) < NUM_TARS, told
    out = tmp_path / "out"
    assert leftovers(out) == [], told
    assert "Traceback" not in told
    assert len(rows_of(out)) == num_commits(tmp_path) * TAR_IMAGES
    (report,) = (out / "reports").glob("*.json")
    assert f"signal {signum.value}" in json.loads(report.read_text())["stopped"]
    verified = cli("verify", out)
    assert verified.returncode == 0, verified.stderr


@pytest.mark.parametrize("signum", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_during_start_up_ends_it_in_silence(corpus, tiny_model, tmp_path, signum):
    config = config_for(corpus, tiny_model, tmp_path)
    rng = random.Random(signum)
    for pause in (rng.uniform(0.2, 0.6), rng.uniform(1.5, 4)):
        process = start(config)
        time.sleep(pause)
        began = time.time()
        process.send_signal(signum)
        returned = process.wait(120)
        told = f"after {pause:.2f} s: {(tmp_path / 'config.log').read_text()[-3000:]}"
        seconds = time.time() - began
        # Ray's core has SIGTERM for a moment of its start; it ends the process then, as a kill does.
        assert returned in (128 + signum, -signum, 1, -signal.SIGALRM), told
        assert "Traceback" not in told
        if returned == 128 + signum and seconds < GRACE_S:  # else it was too early or too slow to tidy up
            assert leftovers(tmp_path / "out") == [], told


def assert_every_image_once(out):
    ids = [row["image_id"] for row in rows_of(out)]
    assert len(set(ids)) == len(ids) == NUM_TARS * TAR_IMAGES
    assert len(rows_of(out, "rejects")) == NUM_TARS


@pytest.mark.slow
def test_of_two_runs_at_the_same_instant_one_works_and_one_is_told_to_wait(corpus, tiny_model, tmp_path):
    config = config_for(corpus, tiny_model, tmp_path)
    processes = [start(config), start(config)]
    codes = sorted(process.wait(150) for process in processes)
    assert codes == [0, 4], (tmp_path / "config.log").read_text()[-3000:]
    log = (tmp_path / "config.log").read_text()
    assert "is held by run" in log
    assert "Traceback" not in log
    out = tmp_path / "out"
    assert_every_image_once(out)
    assert leftovers(out) == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 160 kB, which holds the first shards and no more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", folder], check=False).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_is_told_in_words_and_a_later_run_goes_on(ray_session, corpus, tiny_model, small_disk):
    config = config_for(corpus, tiny_model, small_disk)
    full = cli("extract", config)
    told = f"{num_commits(small_disk)} shards committed\n{full.stderr[-3000:]}"
    assert full.returncode == 1, told
    assert "No space left on device" in full.stderr, told
    assert "Traceback" not in full.stderr, told
    assert leftovers(small_disk / "out") == [], told
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    out = small_disk / "out"
    last = run(make_config(corpus, tiny_model, out, compute__batch_size=4))
    assert (last.stopped, last.failed_shards) == ("", {}), told
    assert_every_image_once(out)
    assert cli("verify", out).returncode == 0
