"""Fixtures: real tiny models written by transformers, real images, one Ray for the whole session."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Else Ray's workers (nice 15) starve beside the tests of the other process, and run into time limits.
os.environ.setdefault("RAY_worker_niceness", "0")


LONGEST_FIRST = (
    *("cluster", "s3", "s3_faults", "faults", "kills", "poison", "increments", "cli", "extract"),
    *("finetune", "odd_images", "scale", "demo", "bench_run", "finetune_training", "nightly"),
    *("serve_page", "serve", "serve_attacks"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that two processes end at about the same time."""
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


def make_image(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A picture that is its own: smooth gradients and a few rectangles drawn from the seed."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    draw = random.Random(seed)
    for _ in range(3):
        left, top = draw.randrange(size[0] - 8), draw.randrange(size[1] - 8)
        colour = tuple(draw.randrange(256) for _ in range(3))
        image.paste(colour, (left, top, left + 8, top + 8))
    return image


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    """An image's bytes in a format that Pillow writes."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in the Hub's layout with a tiny CvT, its head and its image processor."""
    import torch
    from transformers import CvtConfig, CvtForImageClassification
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

    folder = tmp_path_factory.mktemp("tiny-cvt")
    torch.manual_seed(0)
    config = CvtConfig(
        embed_dim=[16, 32, 48],
        num_heads=[1, 2, 3],
        depth=[1, 2, 3],
        drop_path_rate=[0.0, 0.0, 0.0],
        num_labels=7,
        id2label={n: f"class-{n}" for n in range(7)},
        label2id={f"class-{n}": n for n in range(7)},
    )
    model = CvtForImageClassification(config).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.875).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray for every test that runs an extraction in this process."""
    import ray

    # As `pipeline.cluster` starts it: workers that idle are kept, since starting them takes 2 s of a core.
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _system_config={"num_workers_soft_limit": 10_000},
    )
    yield
    ray.shutdown()


WriteImages = Callable[[Path, int], list[str]]


@pytest.fixture(scope="session")
def write_images() -> WriteImages:
    """Writes N images called 000.png, 001.png, ... into a folder; returns their names."""

    def write(folder: Path, count: int) -> list[str]:
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"{number:03d}.png" for number in range(count)]
        for number, name in enumerate(names):
            (folder / name).write_bytes(encode(make_image(number)))
        return names

    return write
