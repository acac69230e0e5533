"""The nightly job: which steps run, what stays when one fails, one exit code, one report."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

import jobs.extract
import jobs.run
import pipeline.extract
import pipeline.index.build
from pipeline.config import Config
from pipeline.errors import (
    BusyError,
    FingerprintError,
    LimitError,
    OutputError,
    PipelineError,
    StorageError,
)
from pipeline.report import write_report
from pipeline.stop import Stop
from pipeline.storage import Storage
from pipeline.tally import Tally
from tests.conftest import encode, make_image
from tests.made_output import archive, claimed, put_shard
from tests.running import cli, ids_of, make_config, write_config, write_tar

FOUND = {
    "version": "v1",
    "images": 3,
    "groups": 1,
    "images_in_groups": 2,
    "removable": 1,
    "share_removable": 0.3333,
    "threshold": 0.9,
    "seconds": 77.0,
}


@dataclass(frozen=True)
class Found:
    """A summary of duplicates."""

    def to_json(self) -> dict[str, Any]:
        return dict(FOUND)


class Night:
    """The command `run` in this process, over an output whose extract is made up; all else is real.

    The extract finds the images that are in `images`, by shard, and ends as the attributes say.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.images = {"a.tar": ["a", "b", "c"]}
        self.stop, self.tally = Stop(), Tally("20260101T000000Z-abc", str(folder / "out"))
        self.tally.planned_shards = self.tally.committed_shards = 1
        self.error: PipelineError | None = None
        self.called: list[str] = []
        self.extracts_report: dict[str, Any] = {}
        self.said = io.StringIO()
        self.console = Console(file=self.said, width=500)
        monkeypatch.setattr(pipeline.extract, "extract", self._extract)
        for module in (jobs.run, jobs.extract):
            monkeypatch.setattr(module, "console", self.console)
        monkeypatch.setattr(jobs.run, "stop_on_signals", lambda: self.stop)
        monkeypatch.setattr(jobs.run, "set_up_logging", lambda **choices: None)
        build = pipeline.index.build.build_index
        self.index_is(build)
        self.dedup_is(lambda output, config: Found())

    def index_is(self, function: Callable[..., Any]) -> None:
        self.monkeypatch.setattr(pipeline.index.build, "build_index", self._noting("index", function))

    def dedup_is(self, function: Callable[..., Any]) -> None:
        module = ModuleType("pipeline.dedup")
        module.find_duplicates = self._noting("dedup", function)  # type: ignore[attr-defined]
        self.monkeypatch.setitem(sys.modules, "pipeline.dedup", module)

    def _noting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noting(output: Storage, config: Any) -> Any:
            self.called.append(name)
            return function(output, config)

        return noting

    def _extract(self, config: Config, **rest: Any) -> Tally:
        output = claimed(self.folder / "out")
        for name, ids in self.images.items():
            put_shard(output, archive(self.folder / "in", name), ids)
        if self.error:
            raise self.error
        self.tally.ended = self.tally.started + 12.5
        write_report(output, self.tally, config)
        self.extracts_report = self.report
        return self.tally

    def run(self, sections: str = "index: {}\ndedup: {threshold: 0.9}\n", *overrides: str) -> int:
        """The exit code of `run` with these sections in the config."""
        places = f"input: {{uri: {self.folder}/in}}\noutput: {{uri: {self.folder}/out}}\n"
        (self.folder / "c.yaml").write_text(places + "model: {checkpoint: m}\n" + sections)
        app = typer.Typer()
        app.command()(jobs.run.run)
        done = CliRunner().invoke(app, [str(self.folder / "c.yaml"), *overrides])
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code

    @property
    def report(self) -> dict[str, Any]:
        (path,) = (self.folder / "out/reports").glob("*.json")
        values: dict[str, Any] = json.loads(path.read_text())
        return values

    @property
    def page(self) -> str:
        (path,) = (self.folder / "out/reports").glob("*.html")
        return path.read_text()

    @property
    def ended(self) -> dict[str, str]:
        """How each step ended, by the report."""
        return {step["step"]: step["status"] for step in self.report["steps"]}

    def message(self, name: str) -> str:
        (step,) = (step for step in self.report["steps"] if step["step"] == name)
        return str(step["message"])


@pytest.fixture
def night(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Night:
    return Night(tmp_path, monkeypatch)


def failing(error: PipelineError) -> Callable[..., Any]:
    def fail(output: Storage, config: Any) -> Any:
        raise error

    return fail


def test_every_step_runs_in_turn_and_the_one_report_has_them_all(night: Night) -> None:
    assert night.run() == 0
    assert night.called == ["index", "dedup"]
    extract, index, dedup = night.report["steps"]
    assert extract == {"step": "extract", "status": "done", "seconds": 12.5, "message": None}
    version = (night.folder / "out/index/CURRENT").read_text()
    assert (index["version"], index["type"], index["num_vectors"]) == (version, "exact", 3)
    assert (index["recall_at_10"], index["status"], index["message"]) == (1.0, "done", None)
    assert index["latency_ms"] > 0
    assert {name: dedup[name] for name in FOUND if name != "seconds"} == {
        name: value for name, value in FOUND.items() if name != "seconds"
    }
    assert 0 <= dedup["seconds"] < 60, "the step's own, not its summary's"


def test_labels_come_between_and_need_the_index_for_neighbours_alone(night: Night) -> None:
    (night.folder / "labels.csv").write_text("image_id,label\na,cat\nb,dog\n")
    sections = (
        f"index: {{}}\ndedup: {{}}\nlabel: {{method: neighbours, labels: {night.folder}/labels.csv}}\n"
    )
    assert night.run(sections) == 0
    assert list(night.ended) == ["extract", "index", "label", "dedup"]
    label = night.report["steps"][2]
    assert label["version"] == (night.folder / "out/labels/CURRENT").read_text()
    assert (label["images"], label["method"], label["unknown"]) == (3, "neighbours", 0)
    assert "3 images by neighbours" in night.page

    night.index_is(failing(OutputError("no index today")))
    assert night.run(sections) == 2
    assert night.ended == {"extract": "done", "index": "failed", "label": "skipped", "dedup": "skipped"}
    assert night.message("label") == "needs the index, which failed"


def test_labels_that_cannot_be_made_keep_no_other_step_from_its_work(night: Night) -> None:
    assert night.run("index: {}\ndedup: {}\nlabel: {method: head}\n") == 2
    assert night.ended == {"extract": "done", "index": "done", "label": "failed", "dedup": "done"}
    assert "has no classifier; use neighbours or probe" in night.message("label")


def test_the_report_keeps_all_that_extract_wrote(night: Night) -> None:
    night.run()
    assert "steps" not in night.extracts_report
    assert night.extracts_report["totals"]["images"] == 3
    assert night.report == {**night.extracts_report, "steps": night.report["steps"]}


def test_the_page_shows_the_steps_and_what_came_of_them(night: Night) -> None:
    night.dedup_is(failing(OutputError("<b>no</b> duplicates & more")))
    night.run()
    page = night.page
    for part in (
        "<h2>Steps<",
        "cvt-pipeline · run",
        "exact, 3 vectors, recall@10 1.000",
        "finished, dedup failed",
    ):
        assert part in page
    assert "&lt;b&gt;no&lt;/b&gt; duplicates &amp; more" in page
    assert "<b>no</b>" not in page


def test_the_page_of_an_extract_alone_has_no_steps(night: Night) -> None:
    night._extract(make_config("in", "m", night.folder / "out"))
    assert "cvt-pipeline · extract" in night.page
    assert "Steps" not in night.page


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [
        ("", ["extract"]),
        ("index: {}\n", ["extract", "index"]),
        ("index:\n", ["extract", "index"]),
        ("dedup: {}\n", ["extract", "dedup"]),
        ("dedup: {}\nindex: {}\n", ["extract", "index", "dedup"]),
    ],
)
def test_a_step_whose_section_the_config_lacks_is_none(
    night: Night, sections: str, wanted: list[str]
) -> None:
    assert night.run(sections) == 0
    assert list(night.ended) == wanted
    assert night.called == wanted[1:]


def test_a_step_is_left_out_for_once_on_the_command_line(night: Night) -> None:
    assert night.run("index: {}\ndedup: {}\n", "dedup=null") == 0
    assert list(night.ended) == ["extract", "index"]


def test_each_step_gets_its_own_section(night: Night) -> None:
    given: list[Any] = []
    build = pipeline.index.build.build_index

    def index(output: Storage, config: Any) -> Any:
        given.append(config)
        return build(output, config)

    def dedup(output: Storage, config: Any) -> Any:
        given.append(config)
        return Found()

    night.index_is(index)
    night.dedup_is(dedup)
    night.run("index: {keep_versions: 7}\ndedup: {threshold: 0.5}\n")
    assert [section.model_dump(exclude_unset=True) for section in given] == [
        {"keep_versions": 7},
        {"threshold": 0.5},
    ]


def test_a_line_for_each_later_step_follows_the_extracts_summary(night: Night) -> None:
    night.dedup_is(failing(OutputError("no [bold] room")))
    night.run()
    *summary, index, dedup = night.said.getvalue().splitlines()
    assert any("committed" in line for line in summary)
    assert "next:" not in night.said.getvalue()
    assert index.startswith("index done: ")
    assert "3 vectors" in index
    assert dedup == "dedup failed: no [bold] room"


@pytest.mark.parametrize(
    ("error", "code"),
    [(StorageError("x"), 1), (OutputError("x"), 2), (LimitError("x"), 3), (BusyError("x"), 4)],
)
def test_an_index_that_fails_leaves_the_extract_skips_what_needs_it_and_gives_its_exit_code(
    night: Night, error: PipelineError, code: int
) -> None:
    night.index_is(failing(error))
    assert night.run() == code
    assert night.called == ["index"]
    assert night.ended == {"extract": "done", "index": "failed", "dedup": "skipped"}
    assert night.message("index") == "x"
    assert night.message("dedup") == "needs the index, which failed"
    assert ids_of(night.folder / "out") == ["a", "b", "c"]


def test_a_dedup_that_fails_leaves_the_index_served(night: Night) -> None:
    night.dedup_is(failing(StorageError("the disk is full")))
    assert night.run() == 1
    assert night.ended == {"extract": "done", "index": "done", "dedup": "failed"}
    version = (night.folder / "out/index/CURRENT").read_text()
    assert night.report["steps"][1]["version"] == version
    assert (night.folder / "out/index" / version / "index.faiss").exists()


def test_an_extract_with_failed_shards_is_followed_and_the_exit_code_is_3(night: Night) -> None:
    night.tally.failed_shards = {"bad.tar": "cut off"}
    assert night.run() == 3
    assert night.ended == {"extract": "failed", "index": "done", "dedup": "done"}
    assert night.message("extract") == "1 failed shard, left out"


def test_the_first_failure_decides_the_exit_code(night: Night) -> None:
    night.tally.failed_shards = {"bad.tar": "cut off"}
    night.index_is(failing(StorageError("x")))
    assert night.run() == 3


def test_nothing_follows_an_extract_that_a_limit_stopped(night: Night) -> None:
    night.tally.stopped = "too many rejects"
    assert night.run() == 3
    assert night.called == []
    assert night.ended == {"extract": "failed", "index": "skipped", "dedup": "skipped"}
    assert night.message("extract") == "too many rejects"
    assert "Stopped: too many rejects" in night.page


def test_nothing_follows_an_extract_that_a_signal_stopped(night: Night) -> None:
    night.stop.signum, night.tally.stopped = signal.SIGTERM, "stopped by signal 15"
    assert night.run() == 143
    assert night.called == []
    assert set(night.ended.values()) == {"failed", "skipped"}


def test_a_signal_between_steps_keeps_the_rest_from_running(night: Night) -> None:
    build = pipeline.index.build.build_index

    def interrupted(output: Storage, config: Any) -> Any:
        night.stop.signum = signal.SIGINT
        return build(output, config)

    night.index_is(interrupted)
    assert night.run() == 130
    assert night.ended == {"extract": "done", "index": "done", "dedup": "skipped"}
    assert "signal 2" in night.message("dedup")


def test_an_extract_that_cannot_begin_ends_the_night_as_it_would_end_alone(night: Night) -> None:
    night.error = FingerprintError("another model")
    with pytest.raises(FingerprintError):
        night.run()
    assert night.called == []


@pytest.mark.parametrize("images", [{}, {"a.tar": []}], ids=["no shard", "a shard of rejects alone"])
def test_an_output_without_images_yet_is_no_failure(night: Night, images: dict[str, list[str]]) -> None:
    night.images = images
    assert night.run() == 0
    assert night.called == []
    assert night.ended == {"extract": "done", "index": "skipped", "dedup": "skipped"}
    assert night.message("index") == "the output has no committed images yet"
    assert night.run("dedup: {}\n") == 0
    assert night.message("dedup") == "the output has no committed images yet"


def test_a_bug_in_a_step_leaves_the_report_with_what_ended_before(night: Night) -> None:
    def broken(output: Storage, config: Any) -> Any:
        raise KeyError("our own bug")

    night.dedup_is(broken)
    with pytest.raises(KeyError):
        night.run()
    assert night.ended == {"extract": "done", "index": "done"}


@pytest.mark.slow
def test_a_night_on_real_images_ends_with_an_index_that_answers_and_groups(
    tiny_model: Path, tmp_path: Path
) -> None:
    images = [(f"{n}.png", encode(make_image(n))) for n in range(4)]
    write_tar(tmp_path / "in/good.tar", [*images, ("twin.png", images[2][1])])
    (tmp_path / "in/bad.tar").write_bytes(b"x" * 2000)
    config = make_config(tmp_path / "in", tiny_model, tmp_path / "out")
    write_config(tmp_path / "c.yaml", config)
    env = {"CVT_PIPELINE__RUN__LOG_FORMAT": "json"}
    words = ["index.type=exact", "dedup.threshold=1", "--into", "new"]
    done = cli("run", tmp_path / "c.yaml", *words, env=env)
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    (path,) = (tmp_path / "new/reports").glob("*.json")
    report = json.loads(path.read_text())
    assert list(report["shards"]["failed"]) == ["bad.tar"]
    extract, index, dedup = report["steps"]
    assert (extract["status"], index["status"], index["num_vectors"]) == ("failed", "done", 5)
    assert (dedup["status"], dedup["groups"], dedup["removable"]) == ("done", 1, 1)
    assert (tmp_path / "new/index/CURRENT").read_text() == index["version"]
    last = json.loads(done.stderr.splitlines()[-1])
    assert (last["logger"], last["values"]) == ("jobs", dedup)
    found = cli("search", tmp_path / "new", "--id", "good.tar#3", "-k", "1", "--json")
    assert json.loads(found.stdout)[0]["hits"][0]["image_id"] == "good.tar#3"
