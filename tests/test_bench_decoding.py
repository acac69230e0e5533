"""Decoding alone: on which cores, how often. A file of its own, since its processes import it: no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.bench.decoding import NUM_PASSES, decode_seconds
from pipeline.bench.processes import on_cores, usable_cores


@dataclass(frozen=True)
class Witness:
    """Stands where a Decoding does, and tells where it was called."""

    folder: Path

    def __call__(self):
        with (self.folder / str(os.getpid())).open("a") as file:
            file.write(f"{sorted(os.sched_getaffinity(0))}\n")

    def warm_up(self):
        pass


@pytest.mark.skipif(len(usable_cores()) < 2, reason="needs two cores")
def test_decoding_has_a_process_on_a_core_of_its_own(tmp_path):
    cores = usable_cores()[:2]
    seconds = decode_seconds({"a": Witness(tmp_path), "b": Witness(tmp_path)}, cores)
    assert [list(each) for each in seconds] == [["a", "b"], ["a", "b"]]
    assert {len(passes) for each in seconds for passes in each.values()} == {NUM_PASSES}
    told = [path.read_text().splitlines() for path in tmp_path.iterdir()]
    assert sorted(map(set, told), key=str) == [{f"[{core}]"} for core in cores]
    assert {len(lines) for lines in told} == {2 * (NUM_PASSES + 1)}, "each once more to warm up"


def test_this_thread_has_its_cores_back_after_a_measurement():
    before = usable_cores()
    with on_cores(before[:1]):
        assert usable_cores() == before[:1]
    assert usable_cores() == before
