"""What starts a run every night on one machine: the systemd units and the script for cron."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from jobs.common import BAD_INPUT, BUSY, DONE, FAILED, INCOMPLETE
from pipeline.stop import GRACE_S

SCHEDULE = Path(__file__).resolve().parents[1] / "configs/schedule"
FAKE_PROGRAM = """#!/bin/sh
echo '{"message": "line of the log"}' >&2
echo "$* key=${KEY-}" > "$SEEN"
exit "$CODE"
"""


def nightly(folder, code):
    program = folder / "bin/cvt-pipeline"
    if not program.exists():
        program.parent.mkdir()
        program.write_text(FAKE_PROGRAM)
        program.chmod(0o755)
    env = {"HOME": str(folder), "SEEN": str(folder / "seen"), "CODE": str(code)}
    return subprocess.run(
        [SCHEDULE / "nightly.sh", "my.yaml", "model.precision=bfloat16"],
        env={**env, "PATH": f"{program.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("code", [DONE, BUSY, 130, 143])
def test_cron_has_nothing_to_mail_of_a_run_that_went_well(tmp_path, code):
    found = nightly(tmp_path, code)
    assert (found.returncode, found.stdout, found.stderr) == (code, "", "")


@pytest.mark.parametrize("code", [FAILED, BAD_INPUT, INCOMPLETE])
def test_cron_has_the_log_to_mail_of_a_run_that_did_not(tmp_path, code):
    found = nightly(tmp_path, code)
    assert found.returncode == code
    assert f"exit code {code}" in found.stdout
    assert "line of the log" in found.stdout


def test_the_script_hands_on_its_arguments_and_the_credentials_and_keeps_every_log(tmp_path):
    (tmp_path / ".config/cvt-pipeline").mkdir(parents=True)
    (tmp_path / ".config/cvt-pipeline/credentials.env").write_text("KEY=of-the-bucket\n")
    nightly(tmp_path, 0)
    nightly(tmp_path, 3)
    seen = (tmp_path / "seen").read_text()
    assert seen == "extract my.yaml model.precision=bfloat16 run.log_format=json key=of-the-bucket\n"
    assert (tmp_path / "cvt-extract.log").read_text().count("line of the log") == 2


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path):
    def verified(change=("", "")):
        for unit in [*SCHEDULE.glob("*.service"), *SCHEDULE.glob("*.timer")]:
            text = re.sub(r"/opt/\S+", "/bin/true", unit.read_text())  # a program that is there
            (tmp_path / unit.name).write_text(text.replace(*change))
        units = sorted(str(path) for path in tmp_path.iterdir())
        words = ["systemd-analyze", "verify", "--man=no", *units]
        return subprocess.run(words, capture_output=True, text=True, check=False).stderr

    assert verified() == ""
    assert "Persistant" in verified(("Persistent", "Persistant"))


def test_the_service_fails_for_the_codes_that_want_somebody():
    unit = (SCHEDULE / "cvt-extract.service").read_text()
    (fine,) = re.findall(r"^SuccessExitStatus=(.*)$", unit, re.MULTILINE)
    assert {int(code) for code in fine.split()} == {BUSY, 143}
    (held_s,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert int(held_s) > GRACE_S
