"""A tiny CvT as transformers saves it, and the check that something loads as it."""

import pytest
import torch

from cvt_model import resolve_checkpoint
from tests.tiny_cvt import reference_model, save_checkpoint


@pytest.fixture(scope="module")
def reference():
    return reference_model()


@pytest.fixture
def saved(tmp_path, reference):
    """A directory as save_pretrained leaves it."""
    save_checkpoint(tmp_path / "saved", reference)
    return tmp_path / "saved"


def pixels():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def assert_loads_as(reference, source):
    model = resolve_checkpoint(str(source)).load()
    with torch.no_grad():
        expected = reference(pixels()).logits
    assert (model(pixels()).logits - expected).abs().max() <= 1e-5
