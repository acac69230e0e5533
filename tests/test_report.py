"""What a run tells: the report's names and figures, the page, the last words on the terminal."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.config import Config, InputConfig, ModelConfig, OutputConfig
from pipeline.progress import describe, format_duration
from pipeline.report import summarize, write_report
from pipeline.storage import Storage
from pipeline.tally import Tally


@pytest.fixture
def tally() -> Tally:
    done = Tally(run="20260101T000000Z-abc", output="out", fingerprint="f" * 64, started=1000.0)
    done.planned_shards, done.committed_shards, done.done_before = 4, 3, 2
    done.failed_shards = {"<b>.tar": "cut off & gone"}
    done.stage_slots = {"read": 2.0, "decode": 2.0, "model": 1.0, "write": 2.0}
    done.stage_s = {"read": 1.0, "decode": 30.0, "model": 20.0, "write": 1.0}
    done.images, done.images_seen = 90, 110
    done.rejects = Counter(truncated=7, empty=3)
    done.rejects_seen = Counter(truncated=8, empty=3)
    done.first_receipt, done.last_receipt, done.images_in_first = 1012.0, 1022.0, 10
    done.ended = 1025.5
    return done


CONFIG = Config(
    input=InputConfig(uri="in"), model=ModelConfig(checkpoint="m"), output=OutputConfig(uri="out")
)


def test_the_report_has_the_figures_under_the_contracts_names(tally: Tally, tmp_path: Path) -> None:
    output = Storage(str(tmp_path))

    write_report(output, tally, CONFIG)

    values = json.loads(output.read_bytes(f"reports/{tally.run}.json"))
    assert (values["images"], values["rejects"]) == (90, 10)
    assert (values["seconds"], values["startup_s"]) == (25.5, 12.0)
    assert values["images_per_s"] == 10.0
    assert values["limiting_stage"] == "model"
    assert values["fingerprint"] == "f" * 64


def test_the_page_escapes_what_it_shows(tally: Tally, tmp_path: Path) -> None:
    output = Storage(str(tmp_path))

    write_report(output, tally, CONFIG)

    page = output.read_bytes(f"reports/{tally.run}.html").decode()
    assert "&lt;b&gt;.tar" in page
    assert "cut off &amp; gone" in page
    assert "<b>.tar" not in page


def test_the_summary_names_reasons_failed_shards_and_the_next_step(tally: Tally) -> None:
    stream = io.StringIO()

    summarize(tally, Console(file=stream, width=200), next_step="index")

    text = stream.getvalue()
    for part in ("3 of 4 committed", "2 were done before", "7 truncated", "3 empty", "10.0, limited by"):
        assert part in text
    assert "left out: <b>.tar: cut off & gone" in text
    assert "next: cvt-pipeline index out" in text


def test_progress_tells_shards_images_rate_rejects_and_time_left(tally: Tally) -> None:
    tally.planned_bytes, tally.committed_bytes = 100, 25

    assert describe(tally).startswith("4/4 shards, 110 images, 10.0 images/s, 11 rejects, ")
    assert describe(tally).endswith(" left")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations_are_written_as_people_say_them(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_a_run_that_received_nothing_has_no_rate_and_no_start_up(tmp_path: Path) -> None:
    output, idle = Storage(str(tmp_path)), Tally("run", "out", started=1.0, ended=2.0)

    write_report(output, idle, CONFIG)

    values = json.loads(output.read_bytes("reports/run.json"))
    assert values["images_per_s"] == 0
    assert values["startup_s"] is None
    assert values["limiting_stage"] is None
