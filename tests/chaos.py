"""Kill anything at any moment, run again: fifty times, the rows are those of an undisturbed run.

`python -m tests.chaos --kills 50` is the long form, a run and a comparison a kill; tests/test_kills.py has
the short one. Victims: the driver, an actor, a worker, a decoder's process, the raylet.
"""

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.conftest import encode, make_image
from tests.disturbed import assert_same_rows, command, descendants, is_alive, kill, num_commits, start
from tests.running import cli, leftovers, make_config, rows_of, write_config, write_tar

NUM_TARS, TAR_IMAGES = 60, 5
TITLES = {
    "actor": "ray::MapWorker",
    "worker": "ray::MapBatches",
    "decoder": "pipeline.decoder_process",
    "raylet": "/raylet/raylet ",
}
KINDS = ("driver", *TITLES)


def write_corpus(folder):
    """Sixty tars, each with a broken image."""
    for number in range(NUM_TARS):
        members = [
            (f"{n}.png", encode(make_image(100 * number + n, (300, 200)))) for n in range(TAR_IMAGES)
        ]
        write_tar(folder / f"{number:02d}.tar", [*members, ("bad.png", b"junk")])
    return folder


def config_for(corpus, model, folder):
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(corpus, model, folder / "out", compute__batch_size=2, compute__actors=2)
    return write_config(folder / "config.yaml", config)


def victims(process, kind):
    """The (pid, start time) of processes of a kind that this run has now; of workers those at work."""
    found = sorted(descendants(process.pid))
    return [one for one in found if TITLES[kind] in command(one[0])]


def kill_one(process, kind, rng, timeout_s=30):
    """kill -9 of one process of a kind, as soon as there is one; False where the run ended before."""
    if kind == "driver":
        kill(process)
        return True
    deadline = time.time() + timeout_s
    while process.poll() is None and time.time() < deadline:
        found = victims(process, kind)
        if found:
            pid, started = rng.choice(found)
            if is_alive(pid, started):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    return True
        time.sleep(0.02)
    return False


def finish(config, out, undisturbed, told):
    """Run again until nothing is left to do, and hold the output against an undisturbed run's."""
    last = cli("extract", config)
    assert last.returncode == 0, f"{told}\n{last.stderr[-3000:]}"
    assert_same_rows((rows_of(out), rows_of(out, "rejects")), undisturbed, told)
    assert leftovers(out) == [], told
    stems = {path.stem for path in (out / "commits").iterdir()}
    for folder in ("embeddings", "rejects"):
        assert {path.stem for path in (out / folder).iterdir()} == stems, told
    verified = cli("verify", out)
    assert verified.returncode == 0, f"{told}\n{verified.stderr}"


def disturb(config, folder, kind, rng):
    """Start a run, kill one process of a kind at a random moment; what happened, in words."""
    process = start(config)
    until, pause = rng.randrange(NUM_TARS), rng.uniform(0, 1)
    deadline = time.time() + 120
    while num_commits(folder) < until and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(pause)
    before = num_commits(folder)
    hit = process.poll() is None and kill_one(process, kind, rng)
    try:
        code = process.wait(180)
    finally:
        kill(process)
    return hit, f"{kind} at {before} commits{'' if hit else ' (missed)'}: exit {code}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", default="cvt-tiny-random")
    options = parser.parse_args()
    rng, hits = random.Random(options.seed), Counter()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        root = Path(name)
        corpus = write_corpus(root / "corpus")
        calm = config_for(corpus, options.checkpoint, root / "calm")
        assert cli("extract", calm).returncode == 0
        undisturbed = rows_of(root / "calm/out"), rows_of(root / "calm/out", "rejects")
        while sum(hits.values()) < options.kills:
            folder = root / f"kill-{sum(hits.values())}"
            kind = KINDS[sum(hits.values()) % len(KINDS)]
            config = config_for(corpus, options.checkpoint, folder)
            hit, told = disturb(config, folder, kind, rng)
            finish(config, folder / "out", undisturbed, told)
            hits[kind] += hit
            sys.stdout.write(f"{sum(hits.values())}: {told}; rows as undisturbed, verify 0\n")
            sys.stdout.flush()
    sys.stdout.write(f"{dict(hits)}: every output is that of an undisturbed run\n")


if __name__ == "__main__":
    main()
