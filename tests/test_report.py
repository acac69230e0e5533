"""What a run tells: the report's names and figures, the page, the last words on the terminal."""

from __future__ import annotations

import html.parser
import io
import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.config import Config, InputConfig, ModelConfig, OutputConfig
from pipeline.progress import describe, format_duration
from pipeline.report import report_values, summarize, write_report
from pipeline.report_page import report_page
from pipeline.report_parts import clock, count, rate, safe, size
from pipeline.storage import Storage
from pipeline.tally import Tally

HOSTILE = "<script>alert('x')</script> \"q\" &amp; \u202egpj.exe \x00\x1b[1m \udc80"


@pytest.fixture
def tally() -> Tally:
    done = Tally(run="20260101T000000Z-abc", output="out", fingerprint="f" * 64, started=1000.0)
    done.planned_shards, done.committed_shards, done.done_before = 4, 3, 2
    done.failed_shards = {"<b>.tar": "cut off & gone"}
    done.stage_slots = {"read": 2.0, "decode": 2.0, "model": 1.0, "write": 2.0}
    done.stage_s = {"read": 1.0, "decode": 30.0, "wait": 4.0, "model": 20.0, "write": 1.0}
    done.list_s = 4.0
    done.images, done.images_seen = 90, 110
    done.rejects = Counter(truncated=7, empty=3)
    done.rejects_seen = Counter(truncated=8, empty=3)
    done.first_receipt, done.last_receipt, done.images_in_first = 1012.0, 1022.0, 10
    done.work_started = 1000.0
    for second in range(12, 23):
        done.timeline.add(second, 10, 1)
    done.ended = 1025.5
    return done


CONFIG = Config(
    input=InputConfig(uri="in", storage_options={"key": "AKIA-very-secret"}),
    model=ModelConfig(checkpoint="m"),
    output=OutputConfig(uri="out"),
)


class Page(html.parser.HTMLParser):
    """What a page holds: its text, its elements, and whether every element is closed in its place."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.tags, self.attributes, self.open = "", Counter[str](), [], []  # type: ignore[var-annotated]
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID and not self.get_starttag_text().endswith("/>"):  # type: ignore[union-attr]
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "path":
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


def page_of(tally: Tally) -> Page:
    return Page(report_page(json.loads(json.dumps(report_values(tally, CONFIG)))))


def test_the_report_has_the_figures_under_the_contracts_names(tally: Tally, tmp_path: Path) -> None:
    output = Storage(str(tmp_path))

    write_report(output, tally, CONFIG)

    values = json.loads(output.read_bytes(f"reports/{tally.run}.json"))
    assert (values["images"], values["rejects"]) == (90, 10)
    assert (values["seconds"], values["startup_s"]) == (25.5, 12.0)
    assert values["images_per_s"] == 10.0
    assert values["limiting_stage"] == "model"
    assert values["fingerprint"] == "f" * 64
    assert values["config"]["model"]["checkpoint"] == "m"
    assert {"python", "ray", "torch", "pyarrow", "openvino"} <= values["versions"].keys()
    assert values["machine"]["cores"] >= 1


def test_the_report_tells_time_by_stage_and_over_time(tally: Tally) -> None:
    values = report_values(tally, CONFIG)
    assert list(values["stages"]) == ["list", "read", "decode", "wait", "model", "write"]
    assert values["stages"]["decode"] == {"seconds": 30.0, "share": 0.5, "slots": 2.0, "busy": 0.6818}
    assert values["stages"]["wait"] == {"seconds": 4.0, "share": 0.0667, "slots": None, "busy": None}
    assert sum(stage["share"] for stage in values["stages"].values()) == pytest.approx(1, abs=1e-3)
    assert values["timeline"]["bucket_s"] == 1
    assert values["timeline"]["images"] == [0] * 12 + [10] * 11 + [0] * 3
    assert sum(values["timeline"]["rejects"]) == 11


def test_secrets_are_neither_in_the_report_nor_on_the_page(tally: Tally, tmp_path: Path) -> None:
    write_report(Storage(str(tmp_path)), tally, CONFIG)
    for path in (tmp_path / "reports").iterdir():
        assert b"very-secret" not in path.read_bytes()
        assert b"storage_options" in path.read_bytes()


def test_labels_beyond_the_fiftieth_are_counted_together(tally: Tally) -> None:
    tally.labels = Counter({f"c{n:05d}": n for n in range(1, 22_001)})
    labels = report_values(tally, CONFIG)["labels"]
    assert (labels["num_labels"], len(labels["top"])) == (22_000, 50)
    assert sum(labels["top"].values()) + labels["others"] == 22_000 * 22_001 // 2
    text = page_of(tally).text
    assert "c22000" in text
    assert "c21981" in text
    assert "c21980" not in text
    assert "21,980 others" in text


def test_the_page_escapes_what_it_shows(tally: Tally, tmp_path: Path) -> None:
    output = Storage(str(tmp_path))

    write_report(output, tally, CONFIG)

    page = output.read_bytes(f"reports/{tally.run}.html").decode()
    assert "&lt;b&gt;.tar" in page
    assert "cut off &amp; gone" in page
    assert "<b>.tar" not in page


def test_nothing_from_the_input_becomes_markup(tally: Tally) -> None:
    plain = page_of(tally).tags
    row = dict.fromkeys(("image_id", "shard", "key", "message"), HOSTILE)
    tally.examples = {"truncated": [{**row, "reason": "truncated", "size_bytes": None}]}
    tally.failed_shards = {HOSTILE: HOSTILE}
    tally.ignored_shards = (HOSTILE,)
    tally.stopped = tally.output = tally.run = HOSTILE
    tally.labels = Counter({HOSTILE: 3})
    facts = {"size_bytes": 1, "images": 1, "rejects": 0, "seconds": 1.0}
    tally.largest.add(HOSTILE, 1, facts)
    tally.slowest.add(HOSTILE, 1, facts)
    page = page_of(tally)
    assert page.tags["script"] == plain["script"] == 1
    assert page.text.count("<script>alert('x')</script>") >= 9
    assert page.text.count("\\u202egpj.exe \\u0000\\u001b[1m \\udc80") >= 9
    assert not set("\u202e\x00\x1b\udc80") & set(page.text)
    assert not [found for found in page.attributes if found[1].startswith("on")]


def test_the_page_stands_alone(tally: Tally) -> None:
    loaded = [
        value
        for _, name, value in page_of(tally).attributes
        if name in ("src", "href", "srcset", "data", "action")
    ]
    assert loaded == ["data:,"]
    page = report_page(report_values(tally, CONFIG))
    assert "http:" not in page
    assert "https:" not in page
    assert "url(" not in page


def test_the_page_names_the_limit_and_what_to_do(tally: Tally) -> None:
    text = page_of(tally).text
    assert "model limits this run, busy for 91% of the time" in text
    assert "add GPUs" in text
    tally.stage_s["decode"] = 43
    assert "decode limits this run" in page_of(tally).text
    tally.stage_s |= {"decode": 2, "model": 3}
    assert "Start-up and waiting took most of this run" in page_of(tally).text


def test_rejects_have_their_examples_under_their_reason(tally: Tally) -> None:
    row = {"image_id": "a/1.png", "message": "ends at byte 7", "size_bytes": 1234, "reason": "empty"}
    tally.examples = {"empty": [row]}
    page = page_of(tally)
    assert page.tags["details"] == 3  # two reasons and the configuration
    text = page.text
    assert text.index("empty") < text.index("a/1.png") < text.index("ends at byte 7")
    assert "1.2 kB" in text
    assert "10 of them are in committed shards" in text


def test_ten_thousand_failed_shards_are_counted_and_some_are_named(tally: Tally) -> None:
    tally.failed_shards = {f"{number:05d}.tar": "cut off" for number in range(10_000)}
    values = report_values(tally, CONFIG)
    assert len(values["shards"]["failed"]) == 10_000
    page = report_page(values)
    assert len(page) < 100_000
    assert "00049.tar" in page
    assert "00050.tar" not in page
    assert "and 9,950 more" in page


@pytest.mark.parametrize("kind", ["nothing", "one", "huge"])
def test_a_page_is_whole_with_nothing_one_image_and_huge_numbers(kind: str, tally: Tally) -> None:
    made = Tally("run", "out", started=1000.0, ended=1012.0)
    if kind == "one":
        made.images = made.images_seen = made.planned_shards = made.committed_shards = 1
        made.first_receipt = made.last_receipt = 1011.0
        made.timeline.add(11, 1, 0)
    if kind == "huge":
        made = tally
        made.images = made.images_seen = 10**15
        made.ended = made.last_receipt = 1000 + 400 * 86400
        made.timeline.add(399 * 86400, 10**15, 10**12)
    text = page_of(made).text
    wanted = {"nothing": "Nothing was processed", "one": "start-up 11 s", "huge": "1 P"}
    assert wanted[kind] in text
    assert "nan" not in text
    assert "e+" not in text


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_shows_the_page_without_a_word_on_its_console(tally: Tally, tmp_path: Path) -> None:
    tally.failed_shards = {HOSTILE: HOSTILE}
    (tmp_path / "page.html").write_text(report_page(report_values(tally, CONFIG)))
    words = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", str(tmp_path / "page.html")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert "limits this run" in done.stdout
    assert "CONSOLE" not in done.stderr


def test_numbers_are_written_as_people_read_them() -> None:
    assert [count(n) for n in (0, 999, 9_999_999, 12_345_678, 999_999_999_999, 10**15)] == [
        *("0", "999", "9,999,999", "12.3 M", "1 T", "1 P")
    ]
    assert [rate(n) for n in (0, 0.034, 5.5, 123.44, 54_321.9)] == [
        "0.0",
        "0.034",
        "5.5",
        "123.4",
        "54,322",
    ]
    assert [size(n) for n in (0, 999, 1500, 3e9)] == ["0 B", "999 B", "1.5 kB", "3.0 GB"]
    assert [clock(s) for s in (0, 2.34, 59.4, 185, 7800, 100_000)] == [
        *("0 s", "2.3 s", "59 s", "3:05 min", "2:10 h", "1 d 03 h")
    ]
    assert safe("a<b>\n\u2067é") == "a&lt;b&gt;\\u000a\\u2067é"


def words_of(tally: Tally) -> str:
    stream = io.StringIO()
    summarize(tally, Console(file=stream, width=200), next_step="index")
    return stream.getvalue()


def test_the_summary_names_reasons_failed_shards_and_the_next_step(tally: Tally) -> None:
    text = words_of(tally)
    for part in ("3 of 4 committed", "2 were done before", "7 truncated", "3 empty", "10.0, limited by"):
        assert part in text
    assert "left out: <b>.tar: cut off & gone" in text
    assert "next: cvt-pipeline index out" in text
    assert "too young" not in text


def test_the_summary_tells_what_was_left_alone(tally: Tally) -> None:
    tally.removed_shards, tally.waiting_files, tally.ignored_shards = 2, 7, ("x.tar",)
    text = words_of(tally)
    for part in ("2 removed", "7 files are too young", "1 ignored"):
        assert part in text


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

    values: dict[str, Any] = json.loads(output.read_bytes("reports/run.json"))
    assert values["images_per_s"] == 0
    assert values["startup_s"] is None
    assert values["limiting_stage"] is None
