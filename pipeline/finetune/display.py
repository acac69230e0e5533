"""A training for people: a bar on a terminal, a log line now and then elsewhere, a summary at the end."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape

from pipeline.finetune.job import Trained
from pipeline.progress import Display, Picture, format_duration


def training_display(console: Console) -> Display[dict[str, Any]]:
    """Shows what a training tells."""

    def picture(values: dict[str, Any]) -> Picture:
        done, total = ("step", "total_steps")
        if values["phase"] == "preparing":
            done, total = ("shards", "total_shards")
        return Picture(describe(values), values[done], values[total], lambda: values)

    return Display(console, "starting Ray", picture)


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
    mixed = metrics.get("interpolation")  # an earlier version's training has none
    share = ""
    if mixed and mixed["share"] < 1:
        share = f", {mixed['share']:.0%} of the way from the checkpoint's"
    console.print(
        f"[bold]{metrics['accuracy']:.2%}[/] of {metrics['validation_images']:,} validation images, by the "
        f"weights after epoch {metrics['best_epoch']:g} of {metrics['epochs']:g}{share} "
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
