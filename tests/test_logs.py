"""Logs for programs: with `run.log_format: json` every line on stderr is an object."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from jobs.json_lines import JsonFormatter, JsonLines
from tests.conftest import WriteImages
from tests.running import cli, make_config, write_config

AS_JSON = {"CVT_PIPELINE__RUN__LOG_FORMAT": "json"}


def objects(stderr: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in stderr.splitlines()]
    for line in lines:
        assert line.keys() >= {"time", "level", "logger", "message"}, line
        assert datetime.fromisoformat(line["time"]).utcoffset() is not None
    return lines


@pytest.mark.slow
def test_every_line_of_a_run_is_an_object(
    tiny_model: Path, tmp_path: Path, write_images: WriteImages
) -> None:
    write_images(tmp_path / "in", 5)
    (tmp_path / "in/bad [bold]\n.png").write_bytes(b"junk")
    config = make_config(tmp_path / "in", tiny_model, tmp_path / "out", run__log_format="json")
    write_config(tmp_path / "c.yaml", config)
    done = cli("extract", tmp_path / "c.yaml", env={"FORCE_COLOR": "1"})
    assert (done.returncode, done.stdout) == (0, "")
    lines = objects(done.stderr)
    assert any(line["message"].startswith("committed images-") for line in lines)
    last = lines[-1]
    assert last["message"].startswith("run finished: 1/1 shards, 5 images")
    assert (last["values"]["images"], last["values"]["rejects_by_reason"]) == (5, {"not_an_image": 1})


def test_text_stays_the_default(made_nothing: list[str]) -> None:
    done = cli(*made_nothing)
    assert done.stderr.startswith("error: ")


def test_an_error_is_one_object_however_many_lines_it_has(made_nothing: list[str]) -> None:
    done = cli(*made_nothing, env=AS_JSON)
    assert done.returncode == 2
    (line,) = objects(done.stderr)
    assert (line["level"], line["logger"]) == ("ERROR", "jobs")
    assert "model.precission: unknown key" in line["message"]
    assert "\n" in line["message"]


@pytest.fixture
def made_nothing(tmp_path: Path, tiny_model: Path) -> list[str]:
    config = write_config(tmp_path / "c.yaml", make_config(tmp_path, tiny_model, tmp_path / "out"))
    return ["extract", str(config), "model.precission=float32"]


def test_tables_for_people_become_objects_too(tmp_path: Path) -> None:
    from tests.made_output import archive, claimed, put_shard

    output = claimed(tmp_path / "out")
    put_shard(output, archive(tmp_path / "in", "a.tar"), ["a"])
    done = cli("status", output.root, env=AS_JSON)
    assert done.returncode == 0
    assert any(line["message"].split()[:2] == ["images", "1"] for line in objects(done.stderr))
    assert "\x1b" not in done.stderr


def test_a_bug_and_a_warning_are_objects_with_their_trace() -> None:
    code = (
        "import warnings\nfrom jobs.common import set_up_logging\n"
        "set_up_logging(verbose=False, log_format='json')\n"
        "warnings.warn('mind the gap')\nraise KeyError('our own bug')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    warned, crashed = objects(done.stderr)
    assert "mind the gap" in warned["message"]
    assert crashed["level"] == "CRITICAL"
    assert "KeyError: 'our own bug'" in crashed["exception"]


def test_what_is_written_in_pieces_is_told_by_whole_lines(caplog: pytest.LogCaptureFixture) -> None:
    stream = JsonLines()
    with caplog.at_level(logging.INFO, "jobs"):
        for piece in ("one", " line\n  \n", "two\nthree"):
            stream.write(piece)
    assert caplog.messages == ["one line", "two"]


def test_odd_text_stays_on_one_line_and_can_be_read_back() -> None:
    text = 'a "b"\n\udc80 \u2028 \x1b[1m é'
    record = logging.LogRecord("x", logging.INFO, __file__, 1, "%s", (text,), None)
    record.values = {"path": Path("/p")}
    line = JsonFormatter().format(record)
    assert len(line.splitlines()) == 1
    assert json.loads(line)["message"] == text
    assert json.loads(line)["values"] == {"path": "/p"}
