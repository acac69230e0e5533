"""The card of a trained network, as the Hub shows it: `README.md` with its metadata on top."""

from __future__ import annotations

from typing import Any

import yaml

MOST_NAMED = 20


def model_card(metrics: dict[str, Any]) -> str:
    """Markdown from a training's `metrics.json`."""
    head = {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["cvt", "image-classification", "image-feature-extraction"],
        **({"base_model": metrics["from"]} if metrics["from"] else {}),
    }
    classes = metrics["classes"]
    named = ", ".join(classes[:MOST_NAMED]) + (", …" if len(classes) > MOST_NAMED else "")
    train, augment = metrics["config"]["train"], metrics["config"]["augment"]
    optimizer = {"adamw": "AdamW", "muon": "Muon and AdamW"}[train["optimizer"]]
    mixed, share = metrics["interpolation"], ""
    if mixed and mixed["share"] < 1:
        share = f" ({mixed['share']:.0%} of them, the rest the checkpoint's: WiSE-FT)"
    begun = f"fine-tuned from `{metrics['from']}`" if metrics["from"] else "trained from random weights"
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# CvT, {len(classes)} classes

A Convolutional vision Transformer (arXiv 2103.15808) with {metrics["parameters"]:,} parameters, for images
of {metrics["pixels"]} × {metrics["pixels"]} pixels, {begun} by `cvt-pipeline finetune`.

| | |
|---|---|
| accuracy | {metrics["accuracy"]:.2%} of {metrics["validation_images"]:,} images held out |
| top 5 | {metrics["top5_accuracy"]:.2%} |
| expected calibration error | {metrics["calibration_error"]:.4f} |
| training images | {metrics["train_images"]:,} |
| epochs | {metrics["epochs"]:g}; these weights are those after {metrics["best_epoch"]:g}{share} |
| recipe | {optimizer}, learning rate {train["learning_rate"]:g}, batches of {train["batch_size"]}, \
weight decay {train["weight_decay"]:g}, label smoothing {train["label_smoothing"]:g}, seed {train["seed"]} |
| augmentation | crop {augment["crop"]}, {augment["policy"]}, erasing {augment["erasing"]:g}, mixup \
{augment["mixup"]:g}, cutmix {augment["cutmix"]:g} |

Classes: {named}.

The accuracy holds for images like those that were held out. It says nothing of images from elsewhere.

`metrics.json` has the curve, every class and the whole configuration; `last/` has the last weights.
"""
