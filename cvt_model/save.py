"""Saving: a network into a directory in the Hub's layout.

What enters: a network and, where known, its preprocessing. What leaves: `config.json`,
`model.safetensors` and `preprocessor_config.json`, which transformers and `resolve_checkpoint`
read. It must not know other layouts.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from cvt_model.config import CvtConfig
from cvt_model.image_processor import CvtImageProcessor

if TYPE_CHECKING:
    from torch import Tensor

    from cvt_model.model import CvtForImageClassification, CvtModel

WEIGHTS_FORMAT = {"format": "pt"}  # transformers refuses safetensors that do not say so


def save_checkpoint(
    directory: str | os.PathLike[str],
    model: "CvtForImageClassification | CvtModel",
    processor: CvtImageProcessor | None = None,
) -> tuple[Path, ...]:
    """Write `model` as it is, in its dtype, and `processor` if given; returns the files written.

    Each file is complete when it appears under its name; the weights come first. Raises OSError.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.detach().contiguous() for key, tensor in model.state_dict().items()}
    dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    config = {
        **model.config.to_dict(),
        "architectures": [type(model).__name__],
        "dtype": str(dtype).removeprefix("torch."),
    }
    weights, settings = folder / "model.safetensors", folder / "config.json"
    replace(weights, lambda path: write_weights(path, state))
    replace(settings, lambda path: write_json(path, config))
    if processor is None:
        return weights, settings
    preprocessing = folder / "preprocessor_config.json"
    replace(preprocessing, lambda path: write_json(path, processor.to_dict()))
    return weights, settings, preprocessing


def replace(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside `path` and move it there, so that nobody reads it half-written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors leaves files that only their owner can read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_weights(path: Path, state: dict[str, "Tensor"], metadata: dict[str, str] | None = None) -> None:
    """Write safetensors, by default as transformers takes them. Raises OSError where that fails."""
    try:
        save_file(state, path, metadata=metadata or WEIGHTS_FORMAT)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def differences_in_transformers(config: CvtConfig) -> tuple[str, ...]:
    """What transformers' CvT does otherwise with a network of this config; empty where nothing."""
    differences = []
    if config.hidden_act != "gelu":
        differences.append(
            f"hidden_act is {config.hidden_act}, transformers always computes the exact GELU: its "
            "outputs will be others than these weights were trained for"
        )
    methods = sorted(set(config.qkv_projection_method) - {"dw_bn"})
    if methods:
        differences.append(
            f"qkv_projection_method is {' and '.join(methods)} in some stage, transformers can run "
            "dw_bn only"
        )
    widths = zip(config.cls_token, config.embed_dim, strict=True)
    if any(cls_token and width != config.embed_dim[-1] for cls_token, width in widths):
        differences.append(
            "a stage other than the last has a CLS token of its own width, transformers gives every "
            "CLS token the last stage's"
        )
    if any(depth <= stage for stage, depth in enumerate(config.depth)):
        differences.append(
            f"depth is {config.depth}, transformers can build a stage only with more layers than "
            "there are stages before it"
        )
    return tuple(differences)
