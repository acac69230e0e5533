"""Poison: a shard that ends its readers, and among thousands of images one that crashes and one that hangs.

The readers' poison is a name in a tar: a hook in the workers, found through PYTHONPATH, ends the process
that reads its header, as a reader does that runs out of memory or meets a bug in C code.
"""

import json
from types import SimpleNamespace

import pytest

from jobs.common import FAILED, exit_code
from pipeline.errors import WorkersDiedError
from pipeline.extract import MAX_CULPRITS, _Run
from pipeline.shards import Shard, Work
from pipeline.stop import Stop
from pipeline.storage import Storage
from pipeline.tally import Tally
from tests.conftest import encode, make_image
from tests.disturbed import is_alive
from tests.running import cli, ids_of, leftovers, make_config, rows_of, write_config, write_tar
from tests.test_decoder import plugged, poison

__all__ = ["plugged"]  # a fixture

RETRIES = 5  # of a task whose worker died, as pipeline/run.py has it
TAR_IMAGES = 3
HOOK = """
import os, signal, tarfile
from pathlib import Path

honest = tarfile.TarInfo.frombuf.__func__

def frombuf(cls, *arguments):
    info = honest(cls, *arguments)
    if "ends-its-reader" in info.name:
        started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        with Path(os.environ["POISON_LOG"]).open("a") as log:
            print(os.getpid(), started, file=log)
        os.kill(os.getpid(), signal.SIGKILL)
    return info

tarfile.TarInfo.frombuf = classmethod(frombuf)
"""


class Poisoned:
    """A corpus of tars, some of which end their readers, and runs over it."""

    def __init__(self, folder, checkpoint):
        self.input, self.output = folder / "in", folder / "out"
        self._log, plug_in = folder / "log", folder / "plug-in"
        plug_in.mkdir()
        (plug_in / "sitecustomize.py").write_text(HOOK)
        self._env = {"PYTHONPATH": str(plug_in), "POISON_LOG": str(self._log)}
        config = make_config(self.input, checkpoint, self.output, compute__batch_size=2)
        self._config = write_config(folder / "config.yaml", config)

    def write(self, number, *, poisoned):
        """A tar; a poisoned one ends its reader when a chunk of it has been handed on."""
        images = [(f"{n}.png", encode(make_image(10 * number + n))) for n in range(TAR_IMAGES)]
        if poisoned:
            images[2:2] = [("ends-its-reader.png", b"")]
        write_tar(self.input / f"{number}.tar", images)

    def extract(self):
        return cli("extract", self._config, env=self._env, timeout_s=400)

    def report(self):
        return json.loads(max((self.output / "reports").glob("*.json")).read_text())

    def deaths(self):
        """(pid, start time) of every reader that met poison."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return [(int(pid), started) for pid, started in map(str.split, lines)]

    def assert_holds(self, *numbers):
        """Every image of these shards, once, and nothing else."""
        assert ids_of(self.output) == [f"{n}.tar#{m}" for n in numbers for m in range(TAR_IMAGES)]
        assert rows_of(self.output, "rejects") == []
        assert leftovers(self.output) == []
        verified = cli("verify", self.output)
        assert verified.returncode == 0, verified.stderr


@pytest.fixture
def poisoned(tiny_model, tmp_path):
    return Poisoned(tmp_path, tiny_model)


@pytest.mark.slow
def test_a_shard_that_ends_its_readers_is_left_out_by_name_and_the_others_are_committed(poisoned):
    for number in range(4):
        poisoned.write(number, poisoned=number == 1)
    done = poisoned.extract()
    assert done.returncode == 3, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    (failed,) = poisoned.report()["shards"]["failed"].items()
    assert failed[0] == "1.tar"
    assert f"left out: 1.tar: {failed[1]}" in done.stderr
    assert "died" in failed[1]
    poisoned.assert_holds(0, 2, 3)
    deaths = poisoned.deaths()
    halvings = 3  # four shards, two, one
    assert RETRIES < len(set(deaths)) == len(deaths) <= halvings * (RETRIES + 1)
    assert not any(is_alive(*reader) for reader in deaths)
    again = poisoned.extract()
    assert again.returncode == 3, again.stderr[-3000:]  # as long as it is there
    assert list(poisoned.report()["shards"]["failed"]) == ["1.tar"]
    assert len(poisoned.deaths()) == len(deaths) + RETRIES + 1  # nothing else was left to suspect
    poisoned.write(1, poisoned=False)
    mended = poisoned.extract()
    assert (mended.returncode, poisoned.report()["shards"]["failed"]) == (0, {}), mended.stderr[-3000:]
    poisoned.assert_holds(0, 1, 2, 3)


@pytest.mark.slow
def test_several_shards_that_end_their_readers_are_each_left_out_by_name(poisoned):
    bad = (1, 3, 5)
    for number in range(7):
        poisoned.write(number, poisoned=number in bad)
    done = poisoned.extract()
    assert done.returncode == 3, done.stderr[-3000:]
    assert sorted(poisoned.report()["shards"]["failed"]) == [f"{number}.tar" for number in bad]
    poisoned.assert_holds(0, 2, 4, 6)


class Script:
    """In the place of the cluster: bad shards end their workers, the others come through before or not."""

    def __init__(self, bad, *, first_of_all=False):
        self.bad, self.first_of_all, self.num_deaths, self.through = bad, first_of_all, 0, []

    def receipts(self, wave):
        doomed = [number for number, work in enumerate(wave) if int(work.stem) in self.bad]
        for number, work in enumerate(wave):
            if number not in doomed and (self.first_of_all or number < min(doomed, default=len(wave))):
                yield RECEIPT | {"stem": work.stem}
        if doomed:
            self.num_deaths += 1
            raise WorkersDiedError(RETRIES + 1, "killed")

    def assemble(self, work):
        self.through.append(int(work.stem))

    def assembled(self, *, wait):
        return iter(())

    def run(self, count, folder):
        """Carry out a wave of so many shards; the numbers of those that are left out."""
        config = make_config(folder, "cvt-tiny-random", folder)
        prepared = SimpleNamespace(config=config, output=Storage(str(folder)))
        self.tally = Tally("run", str(folder))
        lease = SimpleNamespace(still_held=lambda: None)
        wave = [Work(Shard(f"{n}.tar", "", "webdataset"), str(n)) for n in range(count)]
        _Run(prepared, self, lease, self.tally, Stop(), lambda tally: None)._run(wave)
        return self.failed

    @property
    def failed(self):
        return [int(name.removesuffix(".tar")) for name in self.tally.failed_shards]


RECEIPT = {
    **{"chunk": 0, "num_chunks": 1, "num_rows": 1, "error": None},
    **{"timings": "{}", "rejects_by_reason": "{}", "labels": "{}", "examples": "[]"},
}


@pytest.mark.parametrize("first_of_all", [False, True])
@pytest.mark.parametrize("bad", [{0}, {6}, {1, 3}, {0, 1, 2}, {4, 5, 6}, {1, 3, 5}, {0, 2, 4, 6}])
def test_halving_finds_the_shards_that_end_their_workers_and_no_others(tmp_path, bad, first_of_all):
    script = Script(bad, first_of_all=first_of_all)
    assert script.run(20, tmp_path) == sorted(bad)
    assert sorted(script.through) == sorted(set(range(20)) - bad)
    assert script.num_deaths <= len(bad) * 5  # of 20 shards, 10, 5, 3, 1


def test_halving_gives_up_where_no_shard_comes_through(tmp_path):
    script = Script(set(range(64)))
    with pytest.raises(WorkersDiedError, match="more memory") as told:
        script.run(64, tmp_path)
    assert exit_code(told.value) == FAILED
    assert len(script.failed) < MAX_CULPRITS
    assert script.num_deaths < 10 + 2 * MAX_CULPRITS


def test_halving_gives_up_where_the_machine_breaks_in_the_middle(tmp_path):
    script = Script(set(range(1000, 2000)))
    with pytest.raises(WorkersDiedError, match="more memory"):
        script.run(2000, tmp_path)
    assert sorted(script.through) == list(range(1000))
    assert script.num_deaths < 20 + 2 * MAX_CULPRITS


@pytest.mark.slow
def test_of_five_thousand_images_one_that_crashes_and_one_that_hangs_are_all_that_is_lost(
    plugged, tiny_model, tmp_path
):
    """The short form, with forty images, is in tests/test_decoder.py."""
    num_tars, per_tar = 5, 1000
    images = [encode(make_image(seed, (24, 20))) for seed in range(50)]
    bad = {(1, 333): "segfault", (3, 777): "sleep_in_c"}
    for tar in range(num_tars):
        members = [
            (f"{n:04d}.png", poison(bad[tar, n]) if (tar, n) in bad else images[n % len(images)])
            for n in range(per_tar)
        ]
        write_tar(tmp_path / "in" / f"{tar}.tar", members)
    out = tmp_path / "out"
    choices = {"limits__image_timeout_s": 2, "compute__batch_size": 64}
    config = write_config(
        tmp_path / "config.yaml", make_config(tmp_path / "in", tiny_model, out, **choices)
    )
    ended = cli("extract", config, timeout_s=900)
    assert ended.returncode == 0, ended.stderr[-3000:]
    everything = {f"{tar}.tar#{n:04d}" for tar in range(num_tars) for n in range(per_tar)}
    lost = {f"{tar}.tar#{n:04d}" for tar, n in bad}
    ids = ids_of(out)
    assert len(ids) == num_tars * per_tar - 2
    assert set(ids) == everything - lost
    rejects = {row["image_id"]: row["reason"] for row in rows_of(out, "rejects")}
    assert rejects == {"1.tar#0333": "crashed", "3.tar#0777": "timeout"}
    assert len(plugged.pids) == 3 + 2
    assert cli("verify", out).returncode == 0
