"""What the end-to-end tests share: corpora on disk, runs in this process and in others, and their rows."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from filelock import FileLock

from pipeline.config import Config
from pipeline.extract import extract
from pipeline.stop import Stop
from pipeline.tally import Tally

CLI = Path(sys.executable).parent / "cvt-pipeline"


def make_config(input_uri: object, checkpoint: object, output: object, **overrides: Any) -> Config:
    """A config; `limits__max_pixels=1` sets `limits.max_pixels`."""
    values: dict[str, Any] = {
        "input": {"uri": str(input_uri)},
        "model": {"checkpoint": str(checkpoint), "precision": "float32"},
        "output": {"uri": str(output)},
        "compute": {"batch_size": 16},
    }
    for path, value in overrides.items():
        section, key = path.split("__")
        values.setdefault(section, {})[key] = value
    return Config.model_validate(values)


def write_config(path: Path, config: Config) -> Path:
    """The config as the YAML file of a command line."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    return path


def run(config: Config) -> Tally:
    """Extract in this process, whose signal handlers stay as they were."""
    with same_signal_handlers():
        return extract(config, stop=Stop(), on_progress=lambda tally: None, started=time.time())


@contextlib.contextmanager
def same_signal_handlers() -> Iterator[None]:
    """Whatever is done inside, a test's process handles signals as before."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def cli(
    *words: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 900,
) -> subprocess.CompletedProcess[str]:
    """`cvt-pipeline WORDS` to its end."""
    return subprocess.run(
        [str(CLI), *map(str, words)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        timeout=timeout_s,
        capture_output=True,
        text=True,
        check=False,
    )


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder made by whichever of the session's processes asks first, and read by all of them."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, made = root / name, root / f"{name}.made"
    with FileLock(root / f"{name}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """An uncompressed tar of files, in the given order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def rows_of(output: Path, folder: str = "embeddings") -> list[dict[str, Any]]:
    """Every row of the files that are there, by image_id: what any reader of the folder sees."""
    rows: list[dict[str, Any]] = []
    for path in sorted((output / folder).glob("*.parquet")):
        rows += pq.read_table(path, partitioning=None).to_pylist()
    return sorted(rows, key=lambda row: row["image_id"])


def ids_of(output: Path, folder: str = "embeddings") -> list[str]:
    """The sorted image ids of an output, twice where a row is there twice."""
    return [row["image_id"] for row in rows_of(output, folder)]


def schema_of(output: Path) -> pa.Schema:
    """The schema of an output's first file."""
    return pq.read_schema(min((output / "embeddings").glob("*.parquet")))


def leftovers(output: Path) -> list[str]:
    """Files of a run in progress: none after a run that ended by itself."""
    return [str(p.relative_to(output)) for f in ("_staging", "lease") for p in (output / f).glob("**/*")]
