"""Small labelled pictures that a small network learns in seconds, in every layout that has labels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.running import write_tar

CLASSES = ("columns", "rows", "spots")
SIZE = 24

# Of the tests' own trainings: two stages, four layers, images of 16 x 16.
NETWORK = {
    "patch_sizes": [3, 3],
    "patch_stride": [2, 2],
    "patch_padding": [1, 1],
    "embed_dim": [16, 32],
    "num_heads": [1, 2],
    "depth": [1, 2],
    "mlp_ratio": [2.0, 2.0],
    "attention_drop_rate": [0.0, 0.0],
    "drop_rate": [0.0, 0.0],
    "drop_path_rate": [0.0, 0.2],
    "qkv_bias": [True, True],
    "cls_token": [False, True],
    "qkv_projection_method": ["dw_bn", "dw_bn"],
    "kernel_qkv": [3, 3],
    "padding_kv": [1, 1],
    "stride_kv": [2, 1],
    "padding_q": [1, 1],
    "stride_q": [1, 1],
    "initializer_range": 0.1,
}
PREPROCESSING = {"size": {"shortest_edge": 16}, "crop_pct": 1.0}


def picture(label: str, rng: np.random.Generator) -> Image.Image:
    """Stripes down, stripes across or a chequered field, of random colours, width and phase, with noise."""
    width, phase = int(rng.integers(2, 5)), int(rng.integers(0, 8))
    y, x = np.mgrid[:SIZE, :SIZE]
    down, across = (x + phase) // width % 2, (y + phase) // width % 2
    field = {"columns": down, "rows": across, "spots": down ^ across}[label][..., None]
    dark, bright = rng.integers(0, 110, 3), rng.integers(145, 256, 3)
    pixels = np.where(field, bright, dark) + rng.normal(0, 12, (SIZE, SIZE, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def pictures(count: int, seed: int = 0) -> list[tuple[str, bytes]]:
    """Labels with encoded images, the classes in turn."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        label, buffer = CLASSES[number % len(CLASSES)], io.BytesIO()
        picture(label, rng).save(buffer, "PNG")
        made.append((label, buffer.getvalue()))
    return made


def write_folders(folder: Path, count: int, seed: int = 0) -> Path:
    """A folder of class folders."""
    for number, (label, data) in enumerate(pictures(count, seed)):
        path = folder / label / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_parquet(path: Path, count: int, seed: int = 0, **columns: list[object]) -> Path:
    """A Parquet file with the columns image and label."""
    labels, images = zip(*pictures(count, seed), strict=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": labels, **columns}), path)
    return path


def write_webdataset(path: Path, count: int, seed: int = 0, *, labels_last: bool = False) -> Path:
    """A tar of `<number>.png` and `<number>.cls`, the labels after all images where that is asked for."""
    images, labels = [], []
    for number, (label, data) in enumerate(pictures(count, seed)):
        images.append((f"{number:04d}.png", data))
        labels.append((f"{number:04d}.cls", label.encode()))
    if labels_last:
        return write_tar(path, [*images, *labels])
    return write_tar(path, [member for pair in zip(images, labels, strict=True) for member in pair])
