"""Checkpoints: from what a user names to a network with its weights and its preprocessing.

What enters: a directory in the Hub's layout, a weight file of any layout, a Hub id, the short name
of a published model, or the name of a built-in one. What leaves: a `Checkpoint`, resolved without
loading tensors, that loads itself on demand. It must not know images, storage or clusters, and
imports torch only to load.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cvt_model import microsoft, microsoft_spec, tensorflow
from cvt_model.config import CvtConfig
from cvt_model.errors import CheckpointError
from cvt_model.hub import fetch, full_id, is_hub_id
from cvt_model.hub_config import read_config, read_preprocessing
from cvt_model.image_processor import CvtImageProcessor
from cvt_model.layouts import (
    HEAD,
    STAGES_PREFIX,
    TRANSFORMERS,
    Layout,
    match_keys,
    transformers_layout,
)
from cvt_model.presets import HUB_IDS, PRESETS, TRAINED, TRAINED_FOLDER
from cvt_model.weights import (
    Shapes,
    draw_weights,
    find_weight_files,
    hash_files,
    hash_preset,
    read_shapes,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cvt_model.model import CvtForImageClassification, CvtModel

__all__ = ["Checkpoint", "CheckpointError", "resolve_checkpoint"]

Model = TypeVar("Model", bound="CvtModel | CvtForImageClassification")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found and understood; no tensor is loaded yet."""

    source: str
    path: Path | None  # the directory or the weight file; None of random weights
    weight_files: tuple[Path, ...]  # sorted by name; empty of random weights
    layout: Layout  # of the weight files
    config: CvtConfig  # its num_labels is 0 where the weights have no classifier
    preprocessing: CvtImageProcessor | str  # or the reason why there is none
    weights_sha256: str
    has_layernorm: bool  # False of a headless checkpoint, which loads as CvtModel

    @property
    def num_labels(self) -> int:
        """Classes; 0 where the weights have no classifier."""
        return self.config.num_labels

    @property
    def processor(self) -> CvtImageProcessor:
        """The preprocessing; raises CheckpointError where the checkpoint has none of use to us."""
        if isinstance(self.preprocessing, str):
            raise CheckpointError(self.preprocessing)
        return self.preprocessing

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
        prefix = STAGES_PREFIX if headless else ""
        expected = {prefix + key: tuple(value.shape) for key, value in model.state_dict().items()}
        found = self.layout.read_shapes(self.weight_files) if self.weight_files else expected
        names = match_keys(self.source, self.layout, expected, found, HEAD if headless else ())
        state = {
            names[name].removeprefix(prefix): tensor.to(
                device=device,
                dtype=(dtype or torch.float32) if tensor.is_floating_point() else None,
                copy=True,  # a tensor that is a view of its file would not survive the file
                memory_format=torch.contiguous_format,
            )
            for name, tensor in self.read_tensors()
            if name in names
        }
        for key in model.state_dict().keys() - state.keys():
            state[key] = torch.zeros((), dtype=torch.long, device=device)  # num_batches_tracked
        model.load_state_dict(state, assign=True)
        model.requires_grad_(False).eval()
        return model

    def read_tensors(self) -> "Iterator[tuple[str, Tensor]]":
        """Every tensor under the name that its file gives it, with torch's axes."""
        if self.path is None:
            return draw_weights(PRESETS[self.source])
        return self.layout.read_tensors(self.weight_files)


def resolve_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Find and check a checkpoint: a directory, a weight file, a Hub id (`org/name@revision`), the
    short name of a published model (`cvt-13`), or the name of a built-in one.

    An existing file or directory wins over a name. Reads configs, key names and the files' hash, no
    tensors. Raises CheckpointError.
    """
    source = os.fspath(source)
    path = Path(os.path.expanduser(source))  # noqa: PTH111 - as it is where no such user is
    if path.is_dir():
        return resolve_directory(source, path)
    if path.is_file():
        return resolve_file(source, path)
    if source in TRAINED:
        return resolve_directory(source, TRAINED_FOLDER / source)
    if source in PRESETS:
        return resolve_builtin(source)
    if not is_hub_id(source):
        raise CheckpointError(
            f"{source}: no such file or directory, and not a Hub id (org/name, org/name@revision); "
            "check the spelling, or use a published or a built-in model: "
            f"{', '.join((*HUB_IDS, *TRAINED, *PRESETS))}"
        )
    source = full_id(source)
    return resolve_directory(source, fetch(source))


def resolve_builtin(name: str) -> Checkpoint:
    preset = PRESETS[name]
    return Checkpoint(
        source=name,
        path=None,
        weight_files=(),
        layout=TRANSFORMERS,
        config=preset.config,
        preprocessing=CvtImageProcessor.from_dict(preset.processor),
        weights_sha256=hash_preset(preset),
        has_layernorm=True,
    )


def resolve_file(source: str, path: Path) -> Checkpoint:
    """A weight file by itself, its description beside it."""
    if path.suffix in microsoft.SUFFIXES:
        return resolve_microsoft(source, path)
    if path.suffix in (".safetensors", ".bin", *tensorflow.SUFFIXES):
        return replace(resolve_hub_layout(source, path.parent, (path,)), path=path)
    raise CheckpointError(
        f"{source} is no weight file by its name; give a .safetensors, .bin, .h5 or .pth file, or the "
        "directory that holds it"
    )


def resolve_directory(source: str, path: Path) -> Checkpoint:
    return resolve_hub_layout(source, path, find_weight_files(path))


def resolve_hub_layout(source: str, folder: Path, weight_files: tuple[Path, ...]) -> Checkpoint:
    """Weights of PyTorch or TensorFlow with transformers' files beside them."""
    config = read_config(folder)
    if weight_files[0].suffix in tensorflow.SUFFIXES:
        shapes = tensorflow.read_shapes(weight_files)
        layout = tensorflow.tensorflow_layout(weight_files[0], config, shapes)
    else:
        shapes = read_shapes(weight_files)
        layout = transformers_layout(shapes)
    if layout.holds(shapes, "classifier"):
        check_classifier(folder, config, layout, shapes)
    else:
        config = config.with_num_labels(0)
    return Checkpoint(
        source=source,
        path=folder,
        weight_files=weight_files,
        layout=layout,
        config=config,
        preprocessing=read_preprocessing(folder),
        weights_sha256=hash_files(weight_files),
        has_layernorm=layout.holds(shapes, ""),
    )


def resolve_microsoft(source: str, path: Path) -> Checkpoint:
    """A `.pth` file of the original authors, its spec beside it or inferred."""
    shapes = microsoft.read_shapes((path,))
    spec = microsoft_spec.find_spec(path)
    values = microsoft_spec.read_spec(spec) if spec else {}
    if spec:
        config = microsoft_spec.config_of_spec(spec, values, microsoft.count_classes(shapes))
    else:
        config = microsoft.infer_config(path, shapes)
    return Checkpoint(
        source=source,
        path=path,
        weight_files=(path,),
        layout=microsoft.microsoft_layout(spec),
        config=config,
        preprocessing=microsoft_spec.transform_for(path, spec, values),
        weights_sha256=hash_files((path,)),
        has_layernorm=True,
    )


def check_classifier(path: Path, config: CvtConfig, layout: Layout, shapes: Shapes) -> None:
    """Tell a wrong number of labels before loading, in words that help more than shapes."""
    stored = shapes.get(layout.rename("classifier.weight"), ())
    outputs = layout.shape_as_stored(stored)[:1] or (config.num_labels,)
    if outputs != (config.num_labels,):
        raise CheckpointError(
            f"{path}: the classifier has {outputs[0]} outputs, config.json names "
            f"{config.num_labels} labels; write id2label for each output into config.json"
        )
