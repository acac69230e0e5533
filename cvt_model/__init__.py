"""CvT: the network, its checkpoints and its preprocessing.

What enters: checkpoints, images as bytes. What leaves: tensors. It knows nothing of storage,
shards or clusters. Names load on first use, so that resolving a checkpoint or preprocessing an
image does not pay the seconds that importing torch takes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvt_model.checkpoint import Checkpoint, resolve_checkpoint
    from cvt_model.classifier import CvtClassifier, Prediction
    from cvt_model.config import CvtConfig
    from cvt_model.errors import CheckpointError, ImageError
    from cvt_model.export import export_onnx, export_openvino
    from cvt_model.image_file import OpenedImage, open_image
    from cvt_model.image_processor import CvtImageProcessor
    from cvt_model.inference import InferenceModel
    from cvt_model.model import CvtForImageClassification, CvtModel
    from cvt_model.presets import ARCHITECTURES, HUB_IDS

__all__ = [
    "ARCHITECTURES",
    "HUB_IDS",
    "Checkpoint",
    "CheckpointError",
    "CvtClassifier",
    "CvtConfig",
    "CvtForImageClassification",
    "CvtImageProcessor",
    "CvtModel",
    "ImageError",
    "InferenceModel",
    "OpenedImage",
    "Prediction",
    "export_onnx",
    "export_openvino",
    "open_image",
    "resolve_checkpoint",
]

_HOME_OF = {
    "ARCHITECTURES": "presets",
    "HUB_IDS": "presets",
    "Checkpoint": "checkpoint",
    "CheckpointError": "errors",
    "CvtClassifier": "classifier",
    "CvtConfig": "config",
    "CvtForImageClassification": "model",
    "CvtImageProcessor": "image_processor",
    "CvtModel": "model",
    "ImageError": "errors",
    "InferenceModel": "inference",
    "OpenedImage": "image_file",
    "Prediction": "classifier",
    "export_onnx": "export",
    "export_openvino": "export",
    "open_image": "image_file",
    "resolve_checkpoint": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
