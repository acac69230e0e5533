"""Progress for people: a bar on a terminal, a log line every ten seconds elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pipeline.tally import Tally

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
            logger.info("%s", describe(tally))


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
