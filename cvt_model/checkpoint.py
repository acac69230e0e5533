"""Checkpoints: from what a user names to a network with its weights and its preprocessing.

What enters: a directory in the Hub's layout, a Hub id, or the name of a built-in model. What
leaves: a `Checkpoint`, resolved without loading tensors, that loads itself on demand. It must not
know images, storage or clusters, and imports torch only to load.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cvt_model.config import PRESETS, CvtConfig
from cvt_model.errors import CheckpointError
from cvt_model.hub import fetch, is_hub_id
from cvt_model.image_processor import CvtImageProcessor
from cvt_model.weights import (
    Shapes,
    check_keys,
    draw_weights,
    find_weight_files,
    hash_files,
    hash_preset,
    read_json,
    read_shapes,
    read_tensors,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cvt_model.model import CvtForImageClassification, CvtModel

__all__ = ["Checkpoint", "CheckpointError", "resolve_checkpoint"]

Model = TypeVar("Model", bound="CvtModel | CvtForImageClassification")
Settings = TypeVar("Settings", CvtConfig, CvtImageProcessor)
Value = TypeVar("Value")

STAGES_PREFIX = "cvt."  # of the stages' parameters inside CvtForImageClassification
HEAD_PREFIXES = ("layernorm.", "classifier.")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found and understood; no tensor is loaded yet."""

    source: str
    path: Path | None  # the directory; None of a built-in model
    weight_files: tuple[Path, ...]  # sorted by name; empty of a built-in model
    config: CvtConfig  # its num_labels is 0 where the weights have no classifier
    processor: CvtImageProcessor
    weights_sha256: str
    num_labels: int  # 0 where the weights have no classifier
    has_layernorm: bool  # False of a headless checkpoint, which loads as CvtModel

    def load(
        self, dtype: "torch.dtype | None" = None, device: "torch.device | str" = "cpu"
    ) -> "CvtForImageClassification | CvtModel":
        """The network for inference, float32 unless `dtype` says else; raises CheckpointError."""
        from cvt_model.model import CvtForImageClassification, CvtModel

        if self.has_layernorm:
            return self.load_as(CvtForImageClassification, dtype, device)
        return self.load_as(CvtModel, dtype, device)

    def load_as(
        self,
        model_class: type[Model],
        dtype: "torch.dtype | None" = None,
        device: "torch.device | str" = "cpu",
    ) -> Model:
        """The weights as this class: in eval mode, without gradients.

        The network is built without memory and takes each tensor as it is read and converted, so
        no second copy of the weights exists at any time. Raises CheckpointError.
        """
        import torch

        from cvt_model.model import CvtModel

        headless = issubclass(model_class, CvtModel)
        if not headless and not self.has_layernorm:
            raise CheckpointError(
                f"{self.source} has no final LayerNorm and no classifier; load it with CvtModel, "
                "or give a checkpoint that CvtForImageClassification wrote"
            )
        with torch.device("meta"):
            model = model_class(self.config)
        if self.path is not None:
            expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
            found = read_shapes(self.weight_files)
            check_keys(self.source, expected, dict(renamed(found.items(), headless)))
        state = {
            key: tensor.to(
                device=device,
                dtype=(dtype or torch.float32) if tensor.is_floating_point() else None,
                copy=True,  # a tensor that is a view of its file would not survive the file
            )
            for key, tensor in renamed(self.read_tensors(), headless)
        }
        for key in model.state_dict().keys() - state.keys():
            state[key] = torch.zeros((), dtype=torch.long, device=device)  # num_batches_tracked
        model.load_state_dict(state, assign=True)
        model.requires_grad_(False).eval()
        return model

    def read_tensors(self) -> "Iterator[tuple[str, Tensor]]":
        if self.path is None:
            return draw_weights(PRESETS[self.source])
        return read_tensors(self.weight_files)


def resolve_checkpoint(source: str) -> Checkpoint:
    """Find and check a checkpoint: a directory, a Hub id (`org/name@revision`), a built-in name.

    An existing directory wins over a built-in name, that over a Hub id. Reads configs, key names
    and the files' hash, no tensors. Raises CheckpointError.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return resolve_directory(source, path)
    if source in PRESETS:
        return resolve_builtin(source)
    if path.exists():
        raise CheckpointError(f"{source} is a file; give the directory that holds it")
    if not is_hub_id(source):
        raise CheckpointError(
            f"{source}: no such directory, and not a Hub id (org/name, org/name@revision); check "
            f"the spelling, or use a built-in model: {', '.join(PRESETS)}"
        )
    return resolve_directory(source, fetch(source))


def resolve_builtin(name: str) -> Checkpoint:
    preset = PRESETS[name]
    return Checkpoint(
        source=name,
        path=None,
        weight_files=(),
        config=preset.config,
        processor=CvtImageProcessor.from_dict(preset.processor),
        weights_sha256=hash_preset(preset),
        num_labels=preset.config.num_labels,
        has_layernorm=True,
    )


def resolve_directory(source: str, path: Path) -> Checkpoint:
    config = read_config(path)
    processor = read_processor(path)
    weight_files = find_weight_files(path)
    shapes = read_shapes(weight_files)
    if any(key.startswith("classifier.") for key in shapes):
        check_classifier(path, config, shapes)
    else:
        config = config.with_num_labels(0)
    return Checkpoint(
        source=source,
        path=path,
        weight_files=weight_files,
        config=config,
        processor=processor,
        weights_sha256=hash_files(weight_files),
        num_labels=config.num_labels,
        has_layernorm=any(key.startswith(HEAD_PREFIXES) for key in shapes),
    )


def read_config(path: Path) -> CvtConfig:
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{path} is not a checkpoint: it has no config.json; give a directory that "
            "save_pretrained wrote, or a complete copy of a Hub repository"
        )
    config = read_settings(file, CvtConfig.from_dict, read_json(file))
    if config.num_channels != 3:
        raise CheckpointError(
            f"{file}: num_channels: is {config.num_channels}; images are read as RGB, so only "
            "models of 3 channels can be used"
        )
    return config


def read_processor(path: Path) -> CvtImageProcessor:
    """The preprocessing, from either file that transformers writes it to."""
    file = path / "preprocessor_config.json"
    if file.is_file():
        return read_settings(file, CvtImageProcessor.from_dict, read_json(file))
    combined = path / "processor_config.json"
    section = read_json(combined).get("image_processor") if combined.is_file() else None
    if isinstance(section, dict):
        return read_settings(combined, CvtImageProcessor.from_dict, section)
    raise CheckpointError(
        f"{path} has no preprocessor_config.json, without which images cannot be prepared as in "
        "training; copy it from the model that this one was trained from, or write one with "
        "ConvNextImageProcessor(...).save_pretrained"
    )


def read_settings(
    file: Path, parse: Callable[[dict[str, Any]], Settings], values: dict[str, Any]
) -> Settings:
    try:
        return parse(values)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def check_classifier(path: Path, config: CvtConfig, shapes: Shapes) -> None:
    shape = shapes.get("classifier.weight", (config.num_labels,))
    if shape[:1] != (config.num_labels,):
        raise CheckpointError(
            f"{path}: the classifier has {shape[0] if shape else 'no'} outputs, config.json names "
            f"{config.num_labels} labels; write id2label for each output into config.json"
        )


def renamed(items: Iterable[tuple[str, Value]], headless: bool) -> Iterator[tuple[str, Value]]:
    """The items under the names of the class to load: CvtModel has no head and no prefix."""
    for key, value in items:
        if not headless:
            yield key, value
        elif not key.startswith(HEAD_PREFIXES):
            yield key.removeprefix(STAGES_PREFIX), value
