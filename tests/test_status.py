"""Status: totals that are right, cheaply, and what can be known of a run from outside."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import totals
from pipeline.config import Config, InputConfig, ModelConfig, OutputConfig
from pipeline.errors import OutputError
from pipeline.lease import _encode, acquire, read_holder
from pipeline.progress import progress_values, write_progress
from pipeline.report import write_report
from pipeline.status import status
from pipeline.storage import Storage
from pipeline.tally import Tally
from tests.made_output import COMMITTED_AT, archive, claimed, put_shard
from tests.running import cli

CONFIG = Config(
    input=InputConfig(uri="in"), model=ModelConfig(checkpoint="m"), output=OutputConfig(uri="out")
)


@pytest.fixture
def output(tmp_path: Path) -> Storage:
    return claimed(tmp_path / "out")


def do(output: Storage, tmp_path: Path, tally: Tally, *names: str) -> None:
    """Commit shards of three images and a reject each, as a run does."""
    for name in names:
        commit = put_shard(
            output, archive(tmp_path / "in", name), [f"{name}{n}" for n in "abc"], [f"{name}x"]
        )
        assert commit.rejects
        written = commit.embeddings.size_bytes + commit.rejects.size_bytes
        reasons = Counter(commit.rejects_by_reason)
        tally.note_commit(name, 3, reasons, 6, stem=commit.stem, written_bytes=written)


def run(output: Storage, tmp_path: Path, *names: str, **changes: Any) -> None:
    """A run that ends with a report."""
    tally = Tally(f"2026-{time.time_ns()}", output.uri)
    do(output, tmp_path, tally, *names)
    for name, value in changes.items():
        setattr(tally, name, value)
    write_report(output, tally, CONFIG)


class Refusing:
    """A reader of records that must not be called."""

    def __init__(self, output: Storage) -> None:
        raise AssertionError("records are read")


def test_totals_are_those_of_the_records(output: Storage, tmp_path: Path) -> None:
    do(output, tmp_path, Tally("r", "out"), "a.tar", "b.tar")
    values = status(output)
    assert (values["shards"], values["images"], values["rejects"]) == (2, 6, 2)
    assert values["rejects_by_reason"] == {"truncated": 2}
    files = [*Path(output.root).glob("embeddings/*"), *Path(output.root).glob("rejects/*")]
    assert values["size_bytes"] == sum(path.stat().st_size for path in files)
    assert values["last_commit_at"] == COMMITTED_AT
    assert (values["run"], values["last_run"], values["index"]) == (None, None, None)
    assert (values["unfinished_runs"], values["staging"]) == ([], {"files": 0, "size_bytes": 0})


def test_a_report_that_stands_for_the_commits_spares_reading_them(
    output: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(output, tmp_path, "a.tar", "b.tar")
    from_records = status(output)
    monkeypatch.setattr(totals, "CommitLog", Refusing)
    run(output, tmp_path, "c.tar")
    run(output, tmp_path)  # nothing to do
    from_report = status(output)
    assert (from_report["shards"], from_report["images"], from_report["rejects"]) == (3, 9, 3)
    assert from_report["size_bytes"] == pytest.approx(1.5 * from_records["size_bytes"], rel=0.01)


def test_a_report_that_does_not_stand_for_the_commits_is_not_believed(
    output: Storage, tmp_path: Path
) -> None:
    run(output, tmp_path, "a.tar", "b.tar")
    put_shard(output, archive(tmp_path / "in", "c.tar"), list("12345"))  # by a run that left no report
    assert status(output)["images"] == 11
    gone = next(path for path in Path(output.root).glob("commits/*") if path.name.startswith("a.tar"))
    gone.unlink()  # now as many as in the report, and others
    assert (status(output)["shards"], status(output)["images"]) == (2, 8)
    run(output, tmp_path, "d.tar")
    report = json.loads(max(Path(output.root).glob("reports/*.json")).read_text())
    assert (report["totals"]["shards"], report["totals"]["images"]) == (3, 11)


def test_a_stopped_run_reads_no_records_for_its_report(
    output: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    do(output, tmp_path, Tally("killed", "out"), "a.tar")
    monkeypatch.setattr(totals, "CommitLog", Refusing)
    run(output, tmp_path, "b.tar", stopped="stopped by signal 15")
    monkeypatch.undo()
    assert status(output)["images"] == 6


def test_a_damaged_record_costs_the_report_its_totals_alone(output: Storage, tmp_path: Path) -> None:
    do(output, tmp_path, Tally("r", "out"), "a.tar")
    next(Path(output.root).glob("commits/*")).write_bytes(b"{")
    run(output, tmp_path, "b.tar")
    assert json.loads(max(Path(output.root).glob("reports/*.json")).read_text())["totals"] is None
    with pytest.raises(OutputError, match="not a commit record"):
        status(output)


@pytest.fixture
def tally() -> Tally:
    under_way = Tally("20260102T000000Z-abc", "out", lease_s=120)
    under_way.planned_shards, under_way.planned_bytes, under_way.committed_shards = 10, 1000, 4
    under_way.committed_bytes, under_way.images, under_way.images_seen = 250, 40, 70
    under_way.rejects_seen = Counter(empty=2)
    under_way.first_receipt = time.time() - 30
    under_way.last_receipt = time.time()
    under_way.stage_slots, under_way.stage_s = {"model": 1.0, "read": 2.0}, {"model": 25.0, "read": 3.0}
    return under_way


def test_a_live_run_is_told_with_its_progress(output: Storage, tally: Tally) -> None:
    lease = acquire(output, tally.run, 120)
    assert status(output)["run"]["state"] == "starting"
    write_progress(output, tally)
    values = status(output)
    assert (values["run"]["state"], values["run"]["run"]) == ("running", tally.run)
    holder = read_holder(output)
    assert holder
    assert (values["run"]["host"], values["run"]["pid"]) == (holder.host, holder.pid)
    progress = values["run"]["progress"]
    assert progress == progress_values(tally) | {
        name: progress[name] for name in ("updated_at", "seconds_left", "images_per_s_last_minute")
    }
    assert (progress["shards_committed"], progress["shards_planned"]) == (4, 10)
    assert (progress["images_seen"], progress["limiting_stage"]) == (70, "model")
    assert 90 <= progress["seconds_left"] < 400  # three more with each second
    assert values["unfinished_runs"] == []
    assert values["staging"]["files"] == 1
    lease.release()


def rewrite_lease(output: Storage, **changes: Any) -> None:
    holder = read_holder(output)
    assert holder
    (path,) = (info.path for info in output.find("lease"))
    output.write_bytes(path, _encode(replace(holder, **changes)))


def test_a_run_whose_process_is_gone_is_dead_at_once(output: Storage, tally: Tally) -> None:
    acquire(output, tally.run, 120)
    write_progress(output, tally)
    rewrite_lease(output, pid_started="1")
    values = status(output)
    assert values["run"]["state"] == "dead"
    assert values["run"]["progress"]["images_seen"] == 70
    assert values["unfinished_runs"] == [tally.run]


def test_a_lease_that_has_expired_on_another_machine_means_stalled_or_killed(
    output: Storage, tally: Tally
) -> None:
    acquire(output, tally.run, 120)
    write_progress(output, tally)
    rewrite_lease(output, host="elsewhere", renewed=time.time() - 110)
    assert status(output)["run"]["state"] == "running"
    rewrite_lease(output, host="elsewhere", renewed=time.time() - 130)
    assert status(output)["run"]["state"] == "stalled"


def test_a_renewed_lease_without_progress_means_stalled(output: Storage, tally: Tally) -> None:
    acquire(output, tally.run, 120)
    write_progress(output, tally)
    path = output.path(f"_staging/{tally.run}/progress.json")
    values = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps(values | {"updated_at": "2026-01-01T00:00:00+00:00"}))
    assert status(output)["run"]["state"] == "stalled"


def test_a_runs_own_lease_time_counts(output: Storage, tally: Tally) -> None:
    acquire(output, tally.run, 600)
    write_progress(output, replace(tally, lease_s=600))
    rewrite_lease(output, host="elsewhere", renewed=time.time() - 500)
    assert status(output)["run"]["state"] == "running"


def test_the_last_run_is_told_without_its_bulk(output: Storage, tmp_path: Path) -> None:
    run(output, tmp_path, "a.tar", failed_shards={"b.tar": "cut off"}, stopped="why")
    last = status(output)["last_run"]
    assert (last["images"], last["stopped"], last["shards"]["failed"]) == (3, "why", {"b.tar": "cut off"})
    assert not {"timeline", "config", "labels"} & last.keys()


def test_the_command_tells_people_and_programs_the_same(
    output: Storage, tally: Tally, tmp_path: Path
) -> None:
    run(output, tmp_path, "a.tar", failed_shards={"[b].tar": "cut off"})
    acquire(output, tally.run, 120)
    write_progress(output, tally)
    values = json.loads(cli("status", output.root, "--json").stdout)
    assert values["run"]["state"] == "running"
    people = cli("status", output.root)
    assert (people.returncode, people.stdout) == (0, "")
    for part in (
        "running",
        "4 of 10",
        "70",
        "2: 2 empty",
        "min",
        "limited by",
        "[b].tar",
        "cvt-pipeline index",
    ):
        assert part in people.stderr, part
