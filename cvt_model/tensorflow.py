"""TensorFlow's layout: `tf_model.h5` as TFCvtModel and TFCvtForImageClassification wrote it.

What enters: an HDF5 file of Keras weights. What leaves: its rename table, shapes and tensors with
torch's axes. Source: transformers 4's `modeling_tf_cvt.py`. It needs h5py and no TensorFlow.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvt_model.config import CvtConfig
from cvt_model.errors import CheckpointError
from cvt_model.layouts import TRANSFORMERS, Layout, Rule
from cvt_model.weights import FETCH_AGAIN, Shape, Shapes

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".h5", ".hdf5")
# Keras' group, the model's name (which ends in _1 where a session had made one before), our path.
DATASET = re.compile(r"(?:cvt|layernorm|classifier)/([^/]+)/")
RULES = (
    Rule(r"(norm[a-z_]*)\.weight$", r"\1/gamma:0"),
    Rule(r"(norm[a-z_]*)\.bias$", r"\1/beta:0"),
    Rule(r"\.running_mean$", "/moving_mean:0"),
    Rule(r"\.running_var$", "/moving_variance:0"),
    Rule(r"\.weight$", "/kernel:0"),
    Rule(r"\.bias$", "/bias:0"),
    Rule(r"\.(?!\d)", "/"),  # but not that of stages.0 and layers.0
    # The CLS token is called so whatever its stage, and is outside of the model's name.
    Rule(r"^cvt/encoder/stages\.\d+/cls_token$", "cvt/cvt.encoder.stages.2.cls_token:0"),
)


def tensorflow_layout(file: Path, config: CvtConfig, shapes: Shapes) -> Layout:
    """The rename table for a file whose datasets have these shapes."""
    if sum(config.cls_token) > 1:
        raise CheckpointError(
            f"{file}: config.json gives {sum(config.cls_token)} stages a CLS token, of which "
            "TensorFlow's CvT can save one only; use the checkpoint of PyTorch"
        )
    models = (match[1] for name in shapes if (match := DATASET.match(name)))
    model = next(models, "tf_cvt_for_image_classification")
    escaped = model.replace("\\", "\\\\")
    prefix = Rule(r"^(cvt|layernorm|classifier)/(?!cvt\.)", rf"\1/{escaped}/\1/")
    return Layout(
        described_by=TRANSFORMERS.described_by,
        remedy=TRANSFORMERS.remedy,
        rules=(*RULES, prefix),
        read_shapes=read_shapes,
        read_tensors=read_tensors,
        shape_as_stored=shape_as_stored,
    )


def shape_as_stored(shape: Shape) -> Shape:
    """Kernels of dense layers are (in, out), those of convolutions (height, width, in, out)."""
    if len(shape) == 4:
        return shape[2], shape[3], shape[1], shape[0]
    return shape[::-1] if len(shape) == 2 else shape


def read_shapes(files: tuple[Path, ...]) -> Shapes:
    """Names and shapes of all datasets, as stored."""
    return {name: tuple(dataset.shape) for name, dataset in read_datasets(files)}


def read_tensors(files: tuple[Path, ...]) -> Iterator[tuple[str, "Tensor"]]:
    """Every dataset as a tensor with torch's axes."""
    import torch

    for name, dataset in read_datasets(files):
        tensor = torch.from_numpy(dataset[()])
        if tensor.ndim == 4:
            tensor = tensor.permute(3, 2, 0, 1)
        yield name, tensor.T if tensor.ndim == 2 else tensor


def read_datasets(files: tuple[Path, ...]) -> Iterator[tuple[str, Any]]:
    try:
        import h5py
    except ImportError as error:
        raise CheckpointError(
            f"{files[0]}: reading TensorFlow's weights needs h5py; pip install 'cvt-pipeline[tensorflow]'"
        ) from error
    for path in files:
        try:
            with h5py.File(path, "r") as file:
                names: list[str] = []
                file.visit(names.append)  # follows no link out of the file
                for name in names:
                    if isinstance(file[name], h5py.Dataset):
                        check_dataset(path, file[name])
                        yield name, file[name]
        except (OSError, RuntimeError, KeyError) as error:
            raise CheckpointError(f"{path} is not a complete HDF5 file: {error}; {FETCH_AGAIN}") from error


def check_dataset(path: Path, dataset: Any) -> None:
    """Refuse what Keras never writes: anything but floats, and floats kept in other files."""
    floats = dataset.dtype.kind == "f" and dataset.dtype.isnative
    if not floats or dataset.external or dataset.is_virtual:
        raise CheckpointError(
            f"{path}: {dataset.name} is no array of floats in this file, as Keras writes them; "
            f"{FETCH_AGAIN}"
        )
