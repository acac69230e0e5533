"""What a training leaves: the best network where extract and transformers find it, and how good it is.

Enters: a finished training's states. Leaves: `config.json`, `model.safetensors`, `preprocessor_config.json`
and a model card in the output itself, the last weights in `last/`, `metrics.json` and a page.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from cvt_model.model import CvtForImageClassification
from cvt_model.save import save_checkpoint
from pipeline.errors import OutputError
from pipeline.finetune.metrics import METRICS
from pipeline.finetune.model_card import model_card
from pipeline.finetune.network import LAST, with_classes
from pipeline.finetune.page import training_page
from pipeline.finetune.sources import Found
from pipeline.finetune.state import (
    BEST,
    INTERPOLATED,
    Progress,
    Tensors,
    read_best,
    read_state,
    without_prefix,
)
from pipeline.finetune.training import Job
from pipeline.progress import iso_time
from pipeline.quality import calibration, confusion, per_class
from pipeline.report import versions
from pipeline.storage import Storage

PAGE, CARD = "training.html", "README.md"


def write_results(job: Job, found: Found, asked: str) -> dict[str, Any]:
    """Write them all, `metrics.json` last, and return its values. `asked` tells trainings apart."""
    state = read_state(job.output, job.digest)
    if state is None or not state[0].finished:
        raise OutputError(f"{job.output.uri}: the training has no finished state; run it again")
    progress, tensors = state
    facts, weights, said = read_best(job.output, INTERPOLATED if job.config.train.interpolate else BEST)
    averaged = without_prefix("average/", tensors) or without_prefix("model/", tensors)
    _write_model(job, averaged, f"{LAST}/")
    kept = _write_model(job, weights, "")
    metrics = {
        **_metrics(job, found, progress, facts, said),
        "parameters": sum(parameter.numel() for parameter in kept.parameters()),
        "asked": asked,
    }
    job.output.write_bytes(CARD, model_card(metrics).encode())
    job.output.write_bytes(PAGE, training_page(metrics).encode())
    job.output.write_bytes(METRICS, (json.dumps(metrics, indent=1) + "\n").encode())
    return metrics


def _finite(row: dict[str, float]) -> dict[str, float | None]:
    """A row of the curve as JSON can hold it; earlier versions went on where a loss was not finite."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def _write_model(job: Job, state: Tensors, folder: str) -> CvtForImageClassification:
    """Write the network with these weights in the Hub's layout, and return it; each file appears whole."""
    model = CvtForImageClassification(with_classes(job.start.config, job.classes))
    model.load_state_dict(state)
    with tempfile.TemporaryDirectory(prefix="cvt-pipeline-") as local:
        for path in save_checkpoint(local, model, job.start.processor):
            _upload(job.output, path, folder + path.name)
    return model


def _upload(output: Storage, local: Path, path: str) -> None:
    with output.replacing(path) as target:
        target.write_bytes(local.read_bytes())


def _metrics(
    job: Job, found: Found, progress: Progress, facts: dict[str, Any], said: Tensors
) -> dict[str, Any]:
    """`metrics.json`; the names are a contract."""
    labels, classes = said["labels"].numpy(), said["classes"].numpy()
    correct = labels == classes
    calibrated = calibration(said["confidence"].numpy(), correct)
    config = job.config
    return {
        "output": job.output.uri,
        "finished_at": iso_time(time.time()),
        "accuracy": float(correct.mean()),
        "top5_accuracy": float(said["in_top5"].double().mean()),
        "calibration_error": calibrated.error,
        "calibration_bins": calibrated.bins,
        "best_epoch": round(job.epochs_after(facts["step"]), 4),
        "interpolation": facts.get("interpolation"),
        "epochs": round(job.epochs_after(progress.step), 4),
        "steps": progress.step,
        "seconds": round(progress.seconds, 1),
        "train_images": len(job.train),
        "validation_images": len(job.validation),
        "rejects": dict(found.rejects),
        "failed_shards": list(found.failed_shards.values()),
        "classes": list(job.classes),
        "per_class": per_class(labels, classes, job.classes),
        "confusion": confusion(labels, classes, len(job.classes)),
        "history": [_finite(row) for row in progress.history],
        "precision": job.precision,
        "pixels": job.start.pixels,
        "from": config.model.checkpoint or None,
        "config": config.model_dump(mode="json"),
        "versions": versions(),
    }
