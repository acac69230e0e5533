"""`tf_model.h5` as TensorFlow would have written it, made from transformers' PyTorch models with h5py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from torch import nn

PARAMETERS = {
    nn.Linear: {"weight": "kernel", "bias": "bias"},
    nn.Conv2d: {"weight": "kernel", "bias": "bias"},
    nn.LayerNorm: {"weight": "gamma", "bias": "beta"},
    nn.BatchNorm2d: {
        "weight": "gamma",
        "bias": "beta",
        "running_mean": "moving_mean",
        "running_var": "moving_variance",
    },
}


def keras_weights(model: Any, name: str) -> dict[str, np.ndarray]:
    """Every weight under the path that Keras gives its dataset."""
    headless = not hasattr(model, "classifier")
    weights = {}
    for path, module in model.named_modules():
        path = f"cvt.{path}" if headless else path
        keras_path = re.sub(r"\.(?!\d)", "/", path)
        for ours, theirs in PARAMETERS.get(type(module), {}).items():
            tensor = getattr(module, ours)
            if tensor is not None:
                values = tensor.detach().numpy()
                order = (2, 3, 1, 0) if values.ndim == 4 else range(values.ndim)[::-1]
                weights[f"{path.partition('.')[0]}/{name}/{keras_path}/{theirs}:0"] = values.transpose(
                    order
                )
        if getattr(module, "cls_token", None) is not None:  # called so whatever the stage
            weights["cvt/cvt.encoder.stages.2.cls_token:0"] = module.cls_token.detach().numpy()
    return weights


def write_h5(path: Path, weights: dict[str, np.ndarray]) -> Path:
    """The datasets, and the groups and attributes that Keras puts around them."""
    with h5py.File(path, "w") as file:
        file.attrs["backend"], file.attrs["keras_version"] = "tensorflow", "2.14.0"
        groups = sorted({name.partition("/")[0] for name in weights})
        file.attrs["layer_names"] = groups
        file.create_group("top_level_model_weights").attrs["weight_names"] = np.array([])
        for name, values in weights.items():
            file[name] = values
        for group in groups:
            names = [name.partition("/")[2] for name in weights if name.startswith(f"{group}/")]
            file[group].attrs["weight_names"] = names
    return path


def save_tensorflow(folder: Path, model: Any, name: str = "tf_cvt_for_image_classification") -> Path:
    """A directory as TFCvt's save_pretrained left it."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    write_h5(folder / "tf_model.h5", keras_weights(model, name))
    return folder
