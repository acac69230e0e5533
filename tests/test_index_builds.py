"""Builds over several workers, and builds that are killed: the same index as one made undisturbed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.index import draft as draft_module
from pipeline.index.build import build_index
from pipeline.index.kinds import choose
from pipeline.index.record import read_record, versions
from pipeline.search import Searcher
from pipeline.storage import Storage
from tests.disturbed import command, descendants
from tests.test_index import DIM, assert_of_committed_rows, clustered, config
from tests.vector_output import commit_vectors, empty_output

ROOT = Path(__file__).parent.parent
COUNT = 8


@pytest.fixture
def output(tmp_path: Path) -> Storage:
    storage = empty_output(tmp_path / "out")
    for number in range(COUNT):
        commit_vectors(storage, f"{number}.tar", clustered(number, 300))
    return storage


def test_four_workers_build_the_very_files_that_one_process_builds(
    output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft_module, "part_rows", lambda dim: 500)  # eight parts
    alone = build_index(output, config("ivf_rabitq"))
    output.delete_folder("index")

    together = build_index(output, config("ivf_rabitq", workers=4))

    assert len(together.segments) == len(alone.segments) == COUNT
    assert together.sha256 == alone.sha256
    assert together.ids.sha256 == alone.ids.sha256
    assert [s.file.sha256 for s in together.segments] == [s.file.sha256 for s in alone.segments]
    assert_of_committed_rows(output)
    assert not output.exists("index/_build")


BUILD_IN_SMALL_PARTS = """
import sys
from pipeline.config import IndexConfig
from pipeline.index import draft
from pipeline.index.build import build_index
from pipeline.storage import Storage
draft.part_rows = lambda dim: 500
build_index(Storage(sys.argv[1]), IndexConfig(type="ivf_sq8", target_recall=0.9, workers=4))
"""


@pytest.mark.slow
def test_workers_killed_in_the_middle_of_a_build_change_nothing(
    output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(COUNT, 60):
        commit_vectors(output, f"{number}.tar", clustered(number, 300))
    monkeypatch.setattr(draft_module, "part_rows", lambda dim: 500)
    undisturbed = build_index(output, config("ivf_sq8"))
    output.delete_folder("index")
    process = subprocess.Popen([sys.executable, "-c", BUILD_IN_SMALL_PARTS, output.root], cwd=ROOT)
    struck: set[str] = set()
    while process.poll() is None and len(struck) < 2:
        for pid, _ in descendants(process.pid):
            task = command(pid).partition(" ")[0].rstrip("()")
            if task in ("ray::write_segment", "ray::add_part") and task not in struck:
                os.kill(pid, signal.SIGKILL)
                struck.add(task)

    assert process.wait(timeout=120) == 0
    assert struck == {"ray::write_segment", "ray::add_part"}
    assert read_record(output).sha256 == undisturbed.sha256
    assert_of_committed_rows(output)


def start(output: Storage, *settings: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "jobs.index", output.root, *settings]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)


def test_a_build_killed_at_any_moment_leaves_the_served_version_and_the_next_one_ends(
    output: Storage,
) -> None:
    served = build_index(output, config("ivf_sq8"))
    commit_vectors(output, "new.tar", clustered(77, 300))
    undisturbed = _seconds_to_end(output)
    output.delete_folder("index")
    build_index(output, config("ivf_sq8", keep_versions=1))
    served = read_record(output)
    for number in range(4):
        commit_vectors(output, f"later{number}.tar", clustered(100 + number, 300))
        process = start(output, "index.type=ivf_sq8", "index.target_recall=0.9")
        time.sleep(undisturbed * (0.55 + 0.12 * number))  # the first half is the interpreter's start
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

        record = read_record(output)
        assert record.version in versions(output)
        searcher = Searcher(output)
        assert len(searcher.image_ids) == record.num_vectors
        if record.version != served.version:  # it had ended before the kill came
            assert record.num_vectors == (COUNT + 1 + number + 1) * 300
            served = record
        assert_can_search(searcher)

    process = start(output, "index.type=ivf_sq8", "index.target_recall=0.9")
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert_of_committed_rows(output)
    assert not output.exists("index/_build")
    live = {
        segment.file.path for name in versions(output) for segment in read_record(output, name).segments
    }
    assert {info.path for info in output.find("index/_vectors")} == live


def assert_can_search(searcher: Searcher) -> None:
    name = searcher.image_ids[0]
    assert searcher.by_id(name, 3)[0].image_id == name


def _seconds_to_end(output: Storage) -> float:
    began = time.monotonic()
    process = start(output, "index.type=ivf_sq8", "index.target_recall=0.9")
    _, said = process.communicate()
    assert process.returncode == 0, said
    return time.monotonic() - began


def test_an_index_on_disk_answers_like_one_in_memory(output: Storage) -> None:
    in_memory = build_index(output, config("ivf_sq8"))
    found = Searcher(output).nearest(clustered(55, 20), 10)
    output.delete_folder("index")
    too_little = choose(config("ivf_sq8"), COUNT * 300, DIM).peak_bytes - 1

    on_disk = build_index(output, config("ivf_sq8", memory_budget=too_little))

    assert (in_memory.in_memory, on_disk.in_memory) == (True, False)
    assert on_disk.sha256 == in_memory.sha256
    assert Searcher(output).nearest(clustered(55, 20), 10) == found
