"""Kill anything at any moment, run again: the rows are those of an undisturbed run.

`python -m tests.chaos --kills 50` is the long form; tests/test_kills.py has the short one. Victims: the
driver, an actor, a worker, a decoder's process, the raylet. An output is disturbed again and again until
it is complete, and looked at after every kill; then the next one begins.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from cvt_model.presets import DEFAULT_MODEL
from tests.conftest import encode, make_image
from tests.disturbed import assert_same_rows, command, descendants, is_alive, kill, num_commits, start
from tests.running import cli, leftovers, make_config, rows_of, write_config, write_tar

NUM_TARS, TAR_IMAGES = 60, 5
TITLES = {
    "worker": "ray::MapBatches",
    "actor": "ray::MapWorker",
    "decoder": "pipeline.decoder_process",
    "raylet": "/raylet/raylet ",
}
KINDS = ("driver", *TITLES)
HEALING = ("worker", "actor", "decoder")  # a run goes on without them

Rows = list[dict[str, Any]]


class Storm:
    """Runs over one corpus, disturbed; `undisturbed` are its rows and rejects as they have to be."""

    def __init__(
        self, corpus: Path, checkpoint: object, undisturbed: tuple[Rows, Rows], root: Path, seed: int
    ) -> None:
        self._corpus, self._checkpoint, self._undisturbed = corpus, checkpoint, undisturbed
        self._root, self._rng = root, random.Random(seed)
        self._num_shards = len({row["shard"] for row in undisturbed[0]})
        self._num_outputs = 0
        self._folder = self._fresh()

    def _fresh(self) -> Path:
        self._num_outputs += 1
        folder = self._root / f"output-{self._num_outputs}"
        folder.mkdir(parents=True)
        # Two actors and small chunks, so that there is always something under way.
        config = make_config(
            self._corpus, self._checkpoint, folder / "out", compute__batch_size=2, compute__actors=2
        )
        write_config(folder / "config.yaml", config)
        return folder

    def strike(self, kind: str) -> str:
        """Kill one process of a kind in the middle of a run, and look at the output; "" where none was hit.

        Returns what happened, in words. A complete output is held against the undisturbed one's.
        """
        done = num_commits(self._folder)
        until, pause = self._rng.randrange(done, self._num_shards), self._rng.uniform(0, 1)
        process = start(self._folder / "config.yaml")
        deadline = time.time() + 600
        while num_commits(self._folder) < until and process.poll() is None and time.time() < deadline:
            time.sleep(0.01)
        time.sleep(pause)
        before = num_commits(self._folder)
        hit = process.poll() is None and self._hit(process, kind)
        try:
            code = process.wait(300)
        finally:
            kill(process)
        told = f"{kind} at {before} commits, {num_commits(self._folder)} at the end: exit {code}"
        log = (self._folder / "config.log").read_text()[-3000:]
        assert code == 0 or (hit and kind not in HEALING), f"{told}\n{log}"
        assert "Traceback" not in log or kind == "raylet", f"{told}\n{log}"
        self._look(told)
        if code == 0:
            self.finish(told)
        return told if hit else ""

    def _hit(self, process: subprocess.Popen[bytes], kind: str) -> bool:
        """kill -9, as soon as there is such a process; False where the run ended before."""
        if kind == "driver":
            kill(process)
            return True
        while process.poll() is None:
            found = sorted(one for one in descendants(process.pid) if TITLES[kind] in command(one[0]))
            if found:
                pid, started = self._rng.choice(found)
                if is_alive(pid, started):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        return True
            time.sleep(0.02)
        return False

    def _look(self, told: str) -> None:
        """What is committed by now is as it has to be, whatever else lies about."""
        out = self._folder / "out"
        commits = [json.loads(path.read_bytes()) for path in (out / "commits").glob("*.json")]
        shards = {commit["shard"]["name"] for commit in commits}
        wanted = [[row for row in rows if row["shard"] in shards] for rows in self._undisturbed]
        found = [
            [row for row in rows_of(out, folder) if row["shard"] in shards]
            for folder in ("embeddings", "rejects")
        ]
        if shards:
            assert_same_rows(found, wanted, told)

    def finish(self, told: str) -> None:
        """Run to the end, and hold the output against the undisturbed one's; then begin another."""
        out = self._folder / "out"
        if not out.exists():  # just begun, after one that was held against it
            return
        last = cli("extract", self._folder / "config.yaml", timeout_s=900)
        assert last.returncode == 0, f"{told}\n{last.stderr[-3000:]}"
        assert_same_rows((rows_of(out), rows_of(out, "rejects")), self._undisturbed, told)
        assert leftovers(out) == [], told
        stems = {path.stem for path in (out / "commits").iterdir()}
        for folder in ("embeddings", "rejects"):
            assert {path.stem for path in (out / folder).iterdir()} == stems, told
        verified = cli("verify", out)
        assert verified.returncode == 0, f"{told}\n{verified.stderr}"
        self._folder = self._fresh()


def write_corpus(folder: Path) -> Path:
    """Sixty tars, each with a broken image."""
    for number in range(NUM_TARS):
        members = [
            (f"{n}.png", encode(make_image(100 * number + n, (300, 200)))) for n in range(TAR_IMAGES)
        ]
        write_tar(folder / f"{number:02d}.tar", [*members, ("bad.png", b"junk")])
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", default=DEFAULT_MODEL)
    options = parser.parse_args()
    hits: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        root = Path(name)
        corpus = write_corpus(root / "corpus")
        calm = make_config(corpus, options.checkpoint, root / "calm/out", compute__batch_size=2)
        (root / "calm").mkdir()
        assert cli("extract", write_config(root / "calm/config.yaml", calm)).returncode == 0
        undisturbed = rows_of(root / "calm/out"), rows_of(root / "calm/out", "rejects")
        storm = Storm(corpus, options.checkpoint, undisturbed, root, options.seed)
        told = ""
        while hits.total() < options.kills:
            kind = KINDS[hits.total() % len(KINDS)]
            told = storm.strike(kind)
            hits[kind] += bool(told)
            sys.stdout.write(f"{hits.total()}: {told or kind + ' missed'}; what is committed is right\n")
            sys.stdout.flush()
        storm.finish(told)
    sys.stdout.write(f"{dict(hits)}: every output is that of an undisturbed run\n")


if __name__ == "__main__":
    main()
