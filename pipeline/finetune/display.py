"""A training for people: a bar on a terminal, a log line now and then elsewhere, a summary at the end."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pipeline.finetune.job import Trained
from pipeline.progress import LOG_EVERY_S, format_duration

logger = logging.getLogger(__name__)


class TrainingDisplay:
    """Shows what a training tells; call it as often as you like. A context manager, which ends the bar."""

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
            self._task = self._bar.add_task("starting Ray", total=None)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, values: dict[str, Any]) -> None:
        preparing = values["phase"] == "preparing"
        done, total = (
            (values["shards"], values["total_shards"])
            if preparing
            else (values["step"], values["total_steps"])
        )
        if self._bar:
            self._bar.update(self._task, total=total, completed=done, description=describe(values))
        elif time.monotonic() - self._last_log >= LOG_EVERY_S:
            self._last_log = time.monotonic()
            logger.info("%s", describe(values), extra={"values": values})


def describe(values: dict[str, Any]) -> str:
    """One line of what goes on."""
    if values["phase"] == "preparing":
        return f"preparing images: {values['shards']:,}/{values['total_shards']:,} shards"
    parts = [f"epoch {values['epoch']:.2f}/{values['epochs']:g}"]
    if values["loss"] is not None:
        parts += [f"loss {values['loss']:.3f}", f"accuracy {values['accuracy']:.1%} in training"]
    if values["best_accuracy"] is not None:
        parts.append(f"best {values['best_accuracy']:.2%}")
    if values["images_per_s"]:
        parts.append(f"{values['images_per_s']:,.0f} images/s")
    if values["seconds_left"] is not None:
        parts.append(f"{format_duration(values['seconds_left'])} left")
    return ", ".join(parts)


def summarize(trained: Trained, console: Console) -> None:
    """The outcome in a few lines, with the next step."""
    metrics = trained.metrics
    console.print(
        f"[bold]{metrics['accuracy']:.2%}[/] of {metrics['validation_images']:,} validation images, by the "
        f"weights after epoch {metrics['best_epoch']:g} of {metrics['epochs']:g} "
        f"({format_duration(metrics['seconds'])})",
        highlight=False,
    )
    for error in trained.failed_shards:
        console.print(f"left out: {escape(error)}", highlight=False)
    console.print(
        f"curve, confusion, classes: {escape(trained.output)}/training.html\n"
        f"use it: model.checkpoint={escape(trained.output)}",
        highlight=False,
    )
