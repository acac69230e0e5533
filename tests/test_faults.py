"""Kill anything at any moment, run again: the output has the rows of an undisturbed run.

CVT_TEST_KILLS sets how many kills (3); the moments are drawn from CVT_TEST_SEED (0).
"""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import encode, make_image
from tests.running import CLI, cli, leftovers, make_config, rows_of, write_config, write_tar

KILLS = int(os.environ.get("CVT_TEST_KILLS", "3"))
SEED = int(os.environ.get("CVT_TEST_SEED", "0"))
RAY_AGENTS = ("ray::RuntimeEnvAgent", "ray::DashboardAgent", "gone")
NUM_TARS, TAR_IMAGES = 12, 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twelve tars, each with a broken image; pictures large enough that a tar takes a while."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(NUM_TARS):
        members = [
            (f"{n}.png", encode(make_image(100 * number + n, (400, 300)))) for n in range(TAR_IMAGES)
        ]
        write_tar(folder / f"{number:02d}.tar", [*members, ("bad.png", b"junk")])
    return folder


def config_for(corpus, tiny_model, folder):
    config = make_config(corpus, tiny_model, folder / "out", compute__batch_size=4)
    return write_config(folder / "config.yaml", config)


@pytest.fixture(scope="module")
def undisturbed(corpus, tiny_model, tmp_path_factory):
    """The rows and the rejects of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = cli("extract", config_for(corpus, tiny_model, folder))
    assert done.returncode == 0, done.stderr
    return rows_of(folder / "out"), rows_of(folder / "out", "rejects")


def start(config):
    """An extract in a process of its own, whose output goes to files beside its config."""
    log = config.with_suffix(".log").open("ab")
    with log:
        return subprocess.Popen([str(CLI), "extract", str(config)], stdout=log, stderr=log)


def num_commits(folder):
    return len(list((folder / "out/commits").glob("*.json")))


def wait_for_commits(process, folder, count, timeout_s=90):
    """Until so many shards are committed, or the run has ended."""
    deadline = time.time() + timeout_s
    while num_commits(folder) < count and process.poll() is None:
        assert time.time() < deadline, (folder / "config.log").read_text()[-2000:]
        time.sleep(0.01)


def descendants(pid):
    """(pid, start time) of every process below `pid`."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = (int(fields[1]), fields[19])
    found, frontier = set(), {pid}
    while frontier:
        frontier = {child for child, (parent, _) in parents.items() if parent in frontier}
        found |= {(child, parents[child][1]) for child in frontier}
    return found


def is_alive(pid, started):
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[19] == started and fields[0] != "Z"


def kill(process):
    """kill -9 of the driver, and a wait until what it had started is gone too.

    Ray's own agents may outlive it for a minute; they know nothing of the output.
    """
    orphans = descendants(process.pid)
    process.kill()
    process.wait()
    deadline = time.time() + 60
    while alive := [command(orphan) for orphan, started in orphans if is_alive(orphan, started)]:
        working = [words for words in alive if not words.startswith(RAY_AGENTS)]
        if not working:
            return
        assert time.time() < deadline, f"a killed run's processes live on: {working}"
        time.sleep(0.1)


def command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:150]
    except OSError:
        return "gone"


def assert_same_rows(found, wanted, told):
    rows, rejects = found
    wanted_rows, wanted_rejects = wanted
    assert rejects == wanted_rejects, told
    exact = ("image_id", "shard", "key", "sha256", "width", "height", "format", "label")
    assert [[row[name] for name in exact] for row in rows] == [
        [row[name] for name in exact] for row in wanted_rows
    ], told
    for name in ("embedding", "logits", "score"):
        mine, theirs = (np.array([row[name] for row in either]) for either in (rows, wanted_rows))
        assert np.abs(mine - theirs).max() < 1e-5, told


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
        staged = len(list((tmp_path / "out/_staging").glob("**/*.parquet")))
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


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_within_ten_seconds_and_keeps_its_commits(
    corpus, tiny_model, tmp_path, signum, code
):
    config = config_for(corpus, tiny_model, tmp_path)
    rng = random.Random(SEED + signum)
    process = start(config)
    wait_for_commits(process, tmp_path, rng.randrange(1, NUM_TARS - 4))
    time.sleep(rng.uniform(0, 0.3))
    before = num_commits(tmp_path)
    began = time.time()
    process.send_signal(signum)
    returned = process.wait(60)
    seconds = time.time() - began
    told = f"{before} commits before, {num_commits(tmp_path)} after, {seconds:.1f} s\n"
    told += (tmp_path / "config.log").read_text()[-1500:]
    assert (returned, seconds < 10) == (code, True), told
    assert before <= num_commits(tmp_path) < NUM_TARS, told
    out = tmp_path / "out"
    assert leftovers(out) == [], told
    assert "Traceback" not in told
    assert len(rows_of(out)) == num_commits(tmp_path) * TAR_IMAGES
    (report,) = (out / "reports").glob("*.json")
    assert f"signal {signum.value}" in json.loads(report.read_text())["stopped"]
    verified = cli("verify", out)
    assert verified.returncode == 0, verified.stderr


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_start_up_ends_it_in_silence(corpus, tiny_model, tmp_path, signum):
    config = config_for(corpus, tiny_model, tmp_path)
    rng = random.Random(SEED + signum)
    for pause in (rng.uniform(0.2, 0.6), rng.uniform(1.5, 4)):
        process = start(config)
        time.sleep(pause)
        began = time.time()
        process.send_signal(signum)
        returned = process.wait(60)
        told = f"after {pause:.2f} s: {(tmp_path / 'config.log').read_text()[-3000:]}"
        assert returned in (128 + signum, -signum), told
        assert time.time() - began < 10, told
        assert "Traceback" not in told
        assert leftovers(tmp_path / "out") == [], told


def test_of_two_runs_at_the_same_instant_one_works_and_one_is_told_to_wait(
    corpus, tiny_model, undisturbed, tmp_path
):
    config = config_for(corpus, tiny_model, tmp_path)
    processes = [start(config), start(config)]
    codes = sorted(process.wait(150) for process in processes)
    assert codes == [0, 4], (tmp_path / "config.log").read_text()[-3000:]
    log = (tmp_path / "config.log").read_text()
    assert "is held by run" in log
    assert "Traceback" not in log
    out = tmp_path / "out"
    assert_same_rows((rows_of(out), rows_of(out, "rejects")), undisturbed, log)
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


def test_a_full_disk_is_told_in_words_and_a_later_run_goes_on(corpus, tiny_model, undisturbed, small_disk):
    config = config_for(corpus, tiny_model, small_disk)
    full = cli("extract", config)
    told = f"{num_commits(small_disk)} shards committed\n{full.stderr[-3000:]}"
    assert full.returncode == 1, told
    assert "No space left on device" in full.stderr, told
    assert "Traceback" not in full.stderr, told
    assert leftovers(small_disk / "out") == [], told
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    last = cli("extract", config)
    assert last.returncode == 0, last.stderr
    out = small_disk / "out"
    assert_same_rows((rows_of(out), rows_of(out, "rejects")), undisturbed, told)
    assert cli("verify", out).returncode == 0
