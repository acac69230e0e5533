"""The rival of a whole run: transformers' `pipeline("image-classification")` on the same photographs.

Enters: what names a checkpoint, and image files. Leaves: images a second, batch by batch. Runs in a process
of its own. Knows nothing of our stages.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from cvt_model.checkpoint import Checkpoint, resolve_checkpoint
from cvt_model.save import differences_in_transformers, save_checkpoint
from pipeline.bench.inputs import Unavailable
from pipeline.bench.rivals import Form, failures_told

BATCH_SIZE = 16
MIN_BATCHES = 5
MAX_BATCHES = 200


def hub_pipeline_speeds(
    source: str, files: Sequence[Path], num_threads: int, at_least_s: float
) -> list[float]:
    """Images a second of each batch in float32, after one that is not counted: files in turn, top label.

    Raises Unavailable with the reason where transformers cannot do that.
    """
    checkpoint = resolve_checkpoint(source)
    refuse_others(checkpoint)
    with tempfile.TemporaryDirectory() as folder, failures_told(Form("transformers_pipeline", "float32")):
        model = checkpoint.load()
        save_checkpoint(folder, model, checkpoint.processor)
        del model
        return batch_speeds(make_pipeline(folder, num_threads), files, at_least_s)


def refuse_others(checkpoint: Checkpoint) -> None:
    """Networks that transformers' classifier cannot compute."""
    differences = differences_in_transformers(checkpoint.config)
    if differences:
        raise Unavailable(differences[0])
    if not checkpoint.num_labels:
        raise Unavailable("the checkpoint has no classifier")
    if not checkpoint.config.cls_token[-1]:
        raise Unavailable("transformers' classifier fails for a network without a CLS token")


def make_pipeline(folder: str, num_threads: int) -> Any:
    """The pipeline as people make it; without torchvision its image processor is Pillow's."""
    import transformers

    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(num_threads)
    device = 0 if torch.cuda.is_available() else -1
    return transformers.pipeline(
        "image-classification", model=folder, device=device, dtype=torch.float32, batch_size=BATCH_SIZE
    )


def batch_speeds(classify: Any, files: Sequence[Path], at_least_s: float) -> list[float]:
    """Batch by batch, for that long and MIN_BATCHES."""

    def paths() -> Iterator[str]:
        yield from itertools.cycle(map(str, files))

    answers = classify(paths(), top_k=1)
    ends: list[float] = []
    while len(ends) <= MIN_BATCHES or (ends[-1] - ends[0] < at_least_s and len(ends) <= MAX_BATCHES):
        if len(list(itertools.islice(answers, BATCH_SIZE))) < BATCH_SIZE:
            raise RuntimeError("transformers' pipeline ended before its input did")
        ends.append(time.perf_counter())
    return [BATCH_SIZE / (end - begin) for begin, end in itertools.pairwise(ends)]
