"""Progress of a run: a bar on a terminal, a log line every ten seconds elsewhere, a file for `status`.

The file lies in the run's folder of `_staging/`, and goes with it when the run ends by itself.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pipeline.storage import STAGING, Storage
from pipeline.tally import Tally

PROGRESS = "progress.json"
LOG_EVERY_S = 10.0

logger = logging.getLogger(__name__)


class ProgressDisplay:
    """Shows a Tally; call it as often as you like. A context manager, which ends the bar."""

    def __init__(self, console: Console) -> None:
        self._last_log = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("starting Ray and loading the model", total=None)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, tally: Tally) -> None:
        if self._bar:
            total = max(tally.planned_bytes, 1)
            description = describe(tally) if tally.num_seen else "starting Ray and loading the model"
            done = min(total, round(total * tally.fraction_done))
            self._bar.update(self._task, total=total, completed=done, description=description)
        elif time.monotonic() - self._last_log >= LOG_EVERY_S:
            self._last_log = time.monotonic()
            logger.info("%s", describe(tally), extra={"values": progress_values(tally)})


def write_progress(output: Storage, tally: Tally) -> None:
    """Put what the bar shows where `status` reads it, whole: `_staging/<run>/progress.json`."""
    values = json.dumps(progress_values(tally), indent=1)
    output.write_bytes(f"{STAGING}/{tally.run}/{PROGRESS}", values.encode())


def progress_values(tally: Tally) -> dict[str, Any]:
    """A run under way as JSON values; the names are a contract."""
    left = tally.seconds_left
    return {
        "run": tally.run,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started_at": iso_time(tally.started),
        "updated_at": iso_time(time.time()),
        "lease_s": tally.lease_s,
        "shards_planned": tally.planned_shards,
        "shards_committed": tally.committed_shards,
        "shards_failed": len(tally.failed_shards),
        "shards_done_before": tally.done_before,
        "images": tally.images,
        "images_seen": tally.images_seen,
        "rejects_seen": tally.rejects_seen.total(),
        "rejects_seen_by_reason": dict(tally.rejects_seen.most_common()),
        "images_per_s": round(tally.images_per_s, 3),
        "images_per_s_last_minute": round(tally.recent_images_per_s, 3),
        "fraction_done": round(tally.fraction_done, 4),
        "seconds_left": None if left is None else round(left, 1),
        "limiting_stage": tally.limiting_stage,
    }


def iso_time(seconds: float) -> str:
    """Epoch seconds as ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def describe(tally: Tally) -> str:
    """One line: shards, images, rate, rejects, time left."""
    finished = tally.committed_shards + len(tally.failed_shards)
    left = tally.seconds_left
    parts = [
        f"{finished:,}/{tally.planned_shards:,} shards",
        f"{tally.images_seen:,} images",
        f"{tally.images_per_s:,.1f} images/s",
        f"{tally.rejects_seen.total():,} rejects",
    ]
    return ", ".join([*parts, f"{format_duration(left)} left"] if left is not None else parts)


def format_duration(seconds: float) -> str:
    """Seconds as 42 s, 3 min 05 s or 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
