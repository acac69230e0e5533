"""The built-in trained model: what lies in the package, and how good it is on real images."""

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from cvt_model.classifier import CvtClassifier
from cvt_model.presets import DEFAULT_MODEL, TRAINED, TRAINED_FOLDER

FOLDER = TRAINED_FOLDER / DEFAULT_MODEL
TEST_SPLIT = sorted(Path("../shared/cifar10").glob("test-*.parquet"))


def test_the_default_is_in_the_package_in_half_precision_with_its_card():
    assert DEFAULT_MODEL in TRAINED
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 6e6
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= {
        path.name for path in FOLDER.iterdir()
    }
    from safetensors import safe_open

    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118  # not a mapping
    assert dtypes <= {torch.float16, torch.int64}


def test_transformers_loads_it_as_it_is_and_says_the_same():
    theirs = transformers.CvtForImageClassification.from_pretrained(FOLDER).float().eval()
    ours = CvtClassifier(DEFAULT_MODEL, device="cpu").checkpoint.load().float().eval()
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        difference = (theirs(pixels).logits - ours(pixels).logits).abs().max()
    assert difference <= 1e-4
    assert theirs.config.id2label[3] == "cat"


@pytest.mark.skipif(not TEST_SPLIT, reason="needs CIFAR-10 in ../shared/cifar10")
def test_it_is_as_good_on_images_it_never_saw_as_its_card_says():
    card = (FOLDER / "README.md").read_text()
    (said,) = re.findall(r"top-1 of CIFAR-10's test split \| (\d+\.\d+) %", card)
    rows = pq.read_table(TEST_SPLIT[0]).slice(0, 500)
    images = [image if isinstance(image, bytes) else image["bytes"] for image in rows["image"].to_pylist()]
    found = [best[0].label for best in CvtClassifier(DEFAULT_MODEL, device="cpu").stream(images, 1)]
    right = np.mean([a == b for a, b in zip(found, rows["label_name"].to_pylist(), strict=True)])
    assert abs(100 * right - float(said)) <= 6  # of 500 images: four standard errors
