"""Training steps a second: ours beside transformers' CvT, with the same recipe and batches, in one run.

    python tests/bench/bench_train.py [--config configs/cvt-tiny-cifar10.yaml] [--size 32] [--json]

Both train the config's network on the same batches by the same code (optimizers, average, clipping); only
the forward pass and its gradients differ. Rounds alternate; medians and their spread are told. Pixels are
random, never zeros: a step's time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from cvt_model.config import CvtConfig
from pipeline.finetune.batches import Batch
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.network import find_start
from pipeline.finetune.sample_set import Files, SampleSet
from pipeline.finetune.together import Share
from pipeline.finetune.training import Job, Training
from pipeline.load_config import read_config
from pipeline.storage import Storage

WARM_UP, ROUNDS = 2, 7
CLASSES = tuple(f"class {n}" for n in range(10))


class Reference(nn.Module):
    """transformers' CvT, called as ours is."""

    def __init__(self, config: CvtConfig) -> None:
        super().__init__()
        values = config.to_dict()
        del values["architectures"]
        self.network = transformers.CvtForImageClassification(transformers.CvtConfig(**values))

    def forward(self, pixels: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (self.network(pixels).logits,)


def make(
    config: FinetuneConfig, samples: SampleSet, precision: str, folder: str, *, ours: bool
) -> Training:
    """A training whose network is ours or transformers'."""
    job = Job(
        config, find_start(config.model), CLASSES, samples, samples, Storage(folder), precision, "bench"
    )
    if not ours:
        network = Reference(job.start.build(CLASSES, 0).config)
        object.__setattr__(job, "start", _Start(job.start, network))
    training = Training(job, Share(0, 1), torch.device("cpu"))
    training.model.train()
    return training


class _Start:
    """A beginning with another network."""

    def __init__(self, start: Any, network: nn.Module) -> None:
        self._start, self._network = start, network

    def __getattr__(self, name: str) -> Any:
        return getattr(self._start, name)

    def build(self, *_: object) -> nn.Module:
        return self._network


def seconds(training: Training, batch: Batch) -> float:
    began = time.perf_counter()
    training._step(batch, 1e-3)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/cvt-tiny-cifar10.yaml"))
    parser.add_argument("--size", type=int, help="pixels a side; the config's if not given")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", help="key.path=value, over the config")
    options = parser.parse_args()
    config = read_config(FinetuneConfig, options.config, options.overrides, {})
    size = options.size or find_start(config.model).pixels
    precision = "float32" if config.model.precision == "auto" else config.model.precision
    images = config.train.batch_size
    rng = np.random.default_rng(0)
    labels = rng.integers(len(CLASSES), size=images).astype(np.int32)
    samples = SampleSet(
        Files(Storage("/nonexistent"), (), ()), np.arange(50_000), np.resize(labels, 50_000)
    )
    times: dict[str, list[float]] = {"ours": [], "transformers": []}
    with tempfile.TemporaryDirectory() as folder:
        trainings = {name: make(config, samples, precision, folder, ours=name == "ours") for name in times}
        for number in range(WARM_UP + options.rounds):
            pixels = rng.normal(120, 60, (images, size, size, 3)).clip(0, 255).astype(np.uint8)
            batch = Batch(number, pixels, labels)
            for name, training in sorted(trainings.items(), reverse=bool(number % 2)):
                elapsed = seconds(training, batch)
                if number >= WARM_UP:
                    times[name].append(elapsed)
    values = figures(times, images, size, precision)
    if options.json:
        print(json.dumps(values))  # noqa: T201
    for name in times:
        rate, spread = values[name], values[f"{name}_spread"]
        print(f"{name:>13}: {rate:7.1f} images/s, {spread[0]:.1f} to {spread[1]:.1f}", file=sys.stderr)  # noqa: T201
    print(f"{'ratio':>13}: {values['ratio']:.2f} ({values['machine']})", file=sys.stderr)  # noqa: T201


def figures(times: dict[str, list[float]], images: int, size: int, precision: str) -> dict[str, Any]:
    """Images a second of each, the median of the rounds' ratios, and where that was."""
    values: dict[str, Any] = {"batch_size": images, "size": size, "precision": precision}
    for name, elapsed in times.items():
        values[name] = images / statistics.median(elapsed)
        values[f"{name}_spread"] = [images / max(elapsed), images / min(elapsed)]
    ratios = [theirs / mine for mine, theirs in zip(times["ours"], times["transformers"], strict=True)]
    values["ratio"] = statistics.median(ratios)
    values["machine"] = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    values["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    return values


if __name__ == "__main__":
    main()
