"""A real run, in a process of its own, as a user starts it: what its report tells.

Enters: a Config and an environment. Leaves: the values of `reports/<run>.json`. Measures nothing itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import Config
from pipeline.errors import PipelineError
from pipeline.load_config import ENV_PREFIX
from pipeline.report import REPORTS

TOLD_LINES = 5  # of what a failed run said


def environment(num_cores: int) -> dict[str, str]:
    """This process's, for a run on so many cores of this very machine, and by its config alone."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    ours.pop("RAY_ADDRESS", None)
    return {**ours, "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": num_cores})}


def run_extract(config: Config, folder: Path, env: Mapping[str, str]) -> dict[str, Any]:
    """Run `extract` to its end. Raises PipelineError with its last words where it fails."""
    file = folder / f"{Path(config.output.uri).name}.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    words = [sys.executable, "-m", "jobs.extract", str(file)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-TOLD_LINES:])
        raise PipelineError(f"the run ended with exit code {done.returncode}:\n{last}")
    (report,) = (Path(config.output.uri) / REPORTS).glob("*.json")
    values: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return values
