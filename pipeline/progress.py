"""Progress of a run: a bar on a terminal, a log line every ten seconds elsewhere, a file for `status`.

The file lies in the run's folder of `_staging/`, and goes with it when the run ends by itself.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pipeline.storage import STAGING, Storage
from pipeline.tally import Tally

PROGRESS = "progress.json"
LOG_EVERY_S = 10.0

Told = TypeVar("Told")

logger = logging.getLogger(__name__)


class Picture(NamedTuple):
    """What people see of work under way: a line, how much is done, and on request the values behind it."""

    line: str
    done: float
    total: float
    values: Callable[[], dict[str, Any]]


class Display(Generic[Told]):
    """Shows what it is told as `picture` draws it; call it as often as you like.

    A context manager, which ends the bar. `beginning` stands there until the first call.
    """

    def __init__(self, console: Console, beginning: str, picture: Callable[[Told], Picture]) -> None:
        self._picture = picture
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
            self._task = self._bar.add_task(beginning, total=None)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, told: Told) -> None:
        if self._bar:
            picture = self._picture(told)
            self._bar.update(
                self._task, total=picture.total, completed=picture.done, description=picture.line
            )
        elif time.monotonic() - self._last_log >= LOG_EVERY_S:
            self._last_log = time.monotonic()
            picture = self._picture(told)
            logger.info("%s", picture.line, extra={"values": picture.values()})


def run_display(console: Console) -> Display[Tally]:
    """Shows the Tally of a run."""
    beginning = "starting Ray and loading the model"

    def picture(tally: Tally) -> Picture:
        line = describe(tally) if tally.num_seen else beginning
        return Picture(line, tally.fraction_done, 1, lambda: progress_values(tally))

    return Display(console, beginning, picture)


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
