"""Trainings in this process, without Ray: the same job and the same batches, taken one after the other.

As a program it is one of several workers: `python -m tests.small_training CONFIG.yaml RANK WORKERS PORT`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.job import Trained, choose_precision, finetune, make_job
from pipeline.finetune.network import find_start
from pipeline.finetune.sources import list_sources, prepare
from pipeline.finetune.together import Share
from pipeline.finetune.training import Command, Job, Training
from pipeline.index.tasks import Runner, in_this_process
from pipeline.load_config import read_config
from pipeline.stop import Stop
from pipeline.storage import Storage
from tests.labelled_images import NETWORK, PREPROCESSING

RECIPE = {
    "epochs": 4,
    "batch_size": 16,
    "learning_rate": 3e-3,
    "warmup_epochs": 0.5,
    "ema_decay": 0.9,
    "seed": 3,
}
AUGMENT = {"crop": "padded", "padding": 2, "policy": "trivialaugment", "mixup": 0.2, "cutmix": 0.5}


def small_config(source: Path, output: Path, **sections: dict[str, Any]) -> FinetuneConfig:
    """A training of the tests' own network; `train={"epochs": 2}` changes a key."""
    values: dict[str, Any] = {
        "input": {"uri": str(source)},
        "model": {"config": NETWORK, "preprocessing": PREPROCESSING},
        "output": {"uri": str(output)},
        "validation": {"fraction": 0.25},
        "train": RECIPE,
        "augment": AUGMENT,
    }
    for name, section in sections.items():
        values[name] = section if name == "model" else {**values.get(name, {}), **section}
    return FinetuneConfig.model_validate(values)


def small_job(config: FinetuneConfig) -> Job:
    """The job of a configuration, its samples prepared here."""
    output, start = Storage(config.output.uri), find_start(config.model)
    sources = list_sources(config, start.processor, output)
    found = prepare(sources, output, in_this_process, config, lambda done, total: None)
    return make_job(config, start, sources, found, output, choose_precision(config, on_gpu=False))


def train(
    job: Job, share: Share | None = None, command: Callable[[Training], Command] | None = None
) -> Training:
    """Train from the newest state on, to the end or until `command` stops it."""
    share = share or Share(0, 1)
    training = Training(job, share, torch.device("cpu"))
    loader = job.loader(share)
    batches = (loader.load(step, size) for step, size in training.steps())
    training.run(batches, command or (lambda _: "go"))
    return training


class NoCluster:
    """In the place of a cluster: a core of this process."""

    num_gpus, cores = 0, 1

    def __init__(self, *, verbose: bool) -> None:
        pass

    def tasks(self, number: int, what: str) -> Runner:
        return in_this_process

    def close(self) -> None:
        pass


def finetune_here(config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """What the command does, in this process."""
    monkeypatch.setattr("pipeline.cluster.Cluster", NoCluster)
    monkeypatch.setattr("pipeline.finetune.fit.fit", lambda job, placement, stop, told: train(job))
    stop = Stop()
    monkeypatch.setattr(stop, "install", lambda: None)  # signals stay pytest's
    return finetune(config, stop=stop, on_progress=lambda values: None)


def _worker(config: Path, rank: int, num_workers: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_workers)
    train(small_job(read_config(FinetuneConfig, config)), Share(rank, num_workers), _save_and_look)
    dist.destroy_process_group()


def _save_and_look(training: Training) -> Command:
    """Saved between evaluations or not, the rate that people see is that of all workers' images."""
    progress, status = training.progress, training.status()
    if progress.sums.seconds:
        steps = progress.step - (progress.history[-1]["step"] if progress.history else 0)
        images = steps * training._job.config.train.batch_size
        assert abs(status["images_per_s"] * progress.sums.seconds - images) < 0.5, (status, images)
    return "save" if progress.step % 5 == 2 else "go"


if __name__ == "__main__":
    _worker(Path(sys.argv[1]), *map(int, sys.argv[2:]))
