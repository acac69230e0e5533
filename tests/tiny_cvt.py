"""Tiny CvT networks of transformers, the oracle of the tests of `cvt_model`."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

# Networks this small gain nothing from threads, which on a busy machine wait for each other.
torch.set_num_threads(1)

# transformers itself demands depth[i] > i: it takes drop_path_rates of a stage by its number.
TINY: dict[str, Any] = {
    "embed_dim": [16, 32, 48],
    "num_heads": [1, 2, 3],
    "depth": [1, 2, 3],
    "num_labels": 5,
}


def reference_model(model_class: Any = transformers.CvtForImageClassification, **overrides: Any) -> Any:
    """A tiny network of transformers with random parameters and buffers, in eval mode."""
    torch.manual_seed(0)
    return randomised(model_class(transformers.CvtConfig(**{**TINY, **overrides})).eval())


def randomised(model: Any) -> Any:
    """The model with every parameter and buffer random.

    Fresh ones have equal BatchNorms and zero biases, with which a swap of two goes unseen.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor) * 0.3)
            else:
                tensor.copy_(torch.randn_like(tensor) * 0.15)
    return model


def save_checkpoint(directory: Path, model: Any | None = None, **save_options: Any) -> Any:
    """Write a checkpoint as transformers does, with its preprocessing; returns the model."""
    model = reference_model() if model is None else model
    model.save_pretrained(directory, **save_options)
    ConvNextImageProcessorPil(size=32).save_pretrained(directory)
    return model
