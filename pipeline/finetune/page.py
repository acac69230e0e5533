"""A training as a page: its curve, what it confuses, its classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.quality_page import calibration_bars, class_table, confusion_matrix, curves, page
from pipeline.report_parts import clock, configuration, count, pairs, rate, safe, section


def training_page(metrics: dict[str, Any]) -> str:
    """The page of a training's `metrics.json`."""
    history = metrics["history"]
    epochs = [row["epoch"] for row in history]

    def column(name: str) -> list[float | None]:
        return [row[name] for row in history]

    accuracy = {
        "validation accuracy": column("validation_accuracy"),
        "training accuracy, of varied images": column("train_accuracy"),
    }
    losses = {"validation loss": column("validation_loss"), "training loss": column("train_loss")}
    body = (
        section(
            "Accuracy", curves(epochs, accuracy, "epochs", percent=True), "after each epoch", wide=True
        ),
        section("Loss", curves(epochs, losses, "epochs"), "cross-entropy; in training of varied images"),
        section("Learning rate", curves(epochs, {"learning rate": column("learning_rate")}, "epochs")),
        section(
            "Confusion",
            confusion_matrix(metrics["confusion"], metrics["classes"]),
            "labels down, what the network says across; validation images",
            wide=True,
        ),
        section(
            "Classes",
            class_table(metrics["per_class"], {"precision": "precision", "recall": "recall", "f1": "F1"}),
            "the weakest first",
        ),
        section(
            "Calibration",
            calibration_bars(metrics["calibration_bins"]),
            "is it right as often as it is sure?",
        ),
        section("Network and data", _facts(metrics)),
        section("Configuration", configuration(metrics["config"])),
    )
    speed = rate(sum(row["images_per_s"] for row in history) / max(1, len(history)))
    tiles = (
        (
            "accuracy",
            f"{metrics['accuracy']:.2%}",
            f"of {count(metrics['validation_images'])} validation images",
        ),
        ("top 5", f"{metrics['top5_accuracy']:.2%}", "label among the five first"),
        ("calibration error", f"{metrics['calibration_error']:.3f}", "0 is perfect"),
        ("epochs", f"{metrics['epochs']:g}", f"the best after {metrics['best_epoch']:g}"),
        ("images/s", speed, f"of {count(metrics['train_images'])} training images"),
        ("time", clock(metrics["seconds"]), "of training"),
    )
    verdict = "<span class='verdict good'>finished</span>"
    return page(metrics["output"], "finetune", verdict, metrics["finished_at"], tiles, "".join(body))


def _interpolation(chosen: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """What mixtures with the weights that it started from would have given."""
    if chosen is None:
        return
    for row in chosen["tried"]:
        kept = ", kept" if row["share"] == chosen["share"] else ""
        accuracy, loss = row["validation_accuracy"], row["validation_loss"]
        yield f"{row['share']:.0%} trained weights", f"{accuracy:.2%}, loss {loss:.3f}{kept}"


def _facts(metrics: dict[str, Any]) -> str:
    rows = [
        ("started from", metrics["from"] or "random weights"),
        *_interpolation(metrics["interpolation"]),
        ("parameters", count(metrics["parameters"])),
        ("image size", f"{metrics['pixels']} × {metrics['pixels']}"),
        ("precision", metrics["precision"]),
        (
            "left out",
            ", ".join(f"{count(n)} {reason}" for reason, n in metrics["rejects"].items()) or "no image",
        ),
        *((f"failed shard {n}", text) for n, text in enumerate(metrics["failed_shards"], 1)),
        *metrics["versions"].items(),
    ]
    return pairs((safe(key), safe(value)) for key, value in rows)
