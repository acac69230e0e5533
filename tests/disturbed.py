"""What the tests that disturb runs share: a corpus that takes a while, processes, and how to end them."""

import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import encode, make_image
from tests.running import CLI, made_once, make_config, rows_of, run, write_config, write_tar

RAY_AGENTS = ("ray::RuntimeEnvAgent", "ray::DashboardAgent", "gone")
NUM_TARS, TAR_IMAGES = 12, 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twelve tars, each with a broken image; pictures large enough that a tar takes a while."""

    def make(folder):
        for number in range(NUM_TARS):
            members = [
                (f"{n}.png", encode(make_image(100 * number + n, (400, 300)))) for n in range(TAR_IMAGES)
            ]
            write_tar(folder / f"{number:02d}.tar", [*members, ("bad.png", b"junk")])

    return made_once(tmp_path_factory, "disturbed-corpus", make)


def config_for(corpus, tiny_model, folder):
    config = make_config(corpus, tiny_model, folder / "out", compute__batch_size=4)
    return write_config(folder / "config.yaml", config)


@pytest.fixture(scope="module")
def undisturbed(ray_session, corpus, tiny_model, tmp_path_factory):
    """The rows and the rejects of a run that nothing disturbed."""

    def make(folder):
        tally = run(make_config(corpus, tiny_model, folder / "out", compute__batch_size=4))
        assert (tally.stopped, tally.failed_shards) == ("", {})

    out = made_once(tmp_path_factory, "undisturbed", make) / "out"
    return rows_of(out), rows_of(out, "rejects")


def start(config, program=(str(CLI),)):
    """An extract in a process of its own, whose output goes to files beside its config."""
    log = config.with_suffix(".log").open("ab")
    with log:
        return subprocess.Popen([*program, "extract", str(config)], stdout=log, stderr=log)


def num_commits(folder):
    return len(list((folder / "out/commits").glob("*.json")))


def wait_for_commits(process, folder, count, timeout_s=600):
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
    deadline = time.time() + 300
    while alive := [command(orphan) for orphan, started in orphans if is_alive(orphan, started)]:
        working = [words for words in alive if not words.startswith(RAY_AGENTS)]
        if not working:
            return
        assert time.time() < deadline, f"a killed run's processes live on: {working}"
        time.sleep(0.1)


def command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:400]
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
