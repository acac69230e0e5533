"""The original authors' spec: the YAML (or JSON) that a `.pth` file was trained with.

What enters: the spec's file and the weights' name. What leaves: the network's config and the
evaluation transform. Sources: `lib/config/default.py`, `lib/dataset/transformas/build.py` and
`experiments/` of github.com/microsoft/CvT. It must not know tensors.
"""

import logging
import re
from pathlib import Path
from typing import Any

import yaml

from cvt_model.config import CvtConfig
from cvt_model.errors import CheckpointError
from cvt_model.image_processor import WARP_FROM, CvtImageProcessor
from cvt_model.microsoft import ACTIVATION

logger = logging.getLogger(__name__)

SUFFIXES = (".json", ".yaml", ".yml")
FIELDS = {
    "PATCH_SIZE": "patch_sizes",
    "PATCH_STRIDE": "patch_stride",
    "PATCH_PADDING": "patch_padding",
    "DIM_EMBED": "embed_dim",
    "NUM_HEADS": "num_heads",
    "DEPTH": "depth",
    "MLP_RATIO": "mlp_ratio",
    "ATTN_DROP_RATE": "attention_drop_rate",
    "DROP_RATE": "drop_rate",
    "DROP_PATH_RATE": "drop_path_rate",
    "QKV_BIAS": "qkv_bias",
    "CLS_TOKEN": "cls_token",
    "QKV_PROJ_METHOD": "qkv_projection_method",
    "KERNEL_QKV": "kernel_qkv",
    "PADDING_KV": "padding_kv",
    "STRIDE_KV": "stride_kv",
    "PADDING_Q": "padding_q",
    "STRIDE_Q": "stride_q",
}
WITHOUT_EFFECT = ("NUM_STAGES", "INIT", "POS_EMBED")  # no positions are embedded whatever it says
DEFAULT_SIZE = 224
BICUBIC = 3  # of Pillow; so in all of the published specs
IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
SIZE_IN_NAME = re.compile(r"(?<!\d)(\d{2,4})x\1(?!\d)")


def find_spec(weights: Path) -> Path | None:
    """The spec beside a weight file: of the same name, JSON before YAML."""
    candidates = (weights.with_suffix(suffix) for suffix in SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def read_spec(path: Path) -> dict[str, Any]:
    """The spec's sections; raises CheckpointError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML too
    except (yaml.YAMLError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is neither readable YAML nor JSON: {reason}") from error
    if not isinstance(values, dict) or not section(path, section(path, values, "MODEL"), "SPEC"):
        raise CheckpointError(f"{path}: MODEL.SPEC is missing, which the original authors' specs have")
    if any(values.get("BASE") or ()):
        raise CheckpointError(
            f"{path}: BASE names other files; merge them into this one, its own keys over theirs"
        )
    return values


def section(path: Path, values: dict[str, Any], name: str) -> dict[str, Any]:
    """A mapping inside of another; empty where there is none."""
    found = values.get(name) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: {name} must be a mapping, not {found!r:.40}")
    return found


def config_of_spec(path: Path, values: dict[str, Any], num_classes: int) -> CvtConfig:
    """The config that MODEL describes; `num_classes` is the weights', for specs that name none."""
    model = section(path, values, "MODEL")
    spec = section(path, model, "SPEC")
    missing = [key for key in FIELDS if not isinstance(spec.get(key), list)]
    if missing:
        raise CheckpointError(f"{path}: MODEL.SPEC lacks {', '.join(missing)}, or it is no list")
    unknown = [key for key in spec if key not in FIELDS and key not in WITHOUT_EFFECT]
    if unknown:
        logger.warning("%s: MODEL.SPEC has %s, which CvT does not know", path, ", ".join(unknown))
    num_stages = spec.get("NUM_STAGES", len(spec["DEPTH"]))
    wrong = [key for key in FIELDS if len(spec[key]) != num_stages]
    if wrong:
        raise CheckpointError(
            f"{path}: MODEL.SPEC.{wrong[0]} has {len(spec[wrong[0]])} entries for {num_stages} stages"
        )
    fields = {ours: spec[theirs] for theirs, ours in FIELDS.items()}
    num_labels = model.get("NUM_CLASSES", num_classes)
    try:
        return CvtConfig.from_dict({**fields, "num_labels": num_labels, "hidden_act": ACTIVATION})
    except ValueError as error:
        raise CheckpointError(f"{path}: MODEL.SPEC: {in_their_words(str(error))}") from error


def in_their_words(message: str) -> str:
    for theirs, ours in {**FIELDS, "NUM_CLASSES": "num_labels"}.items():
        message = re.sub(rf"\b{ours}\b", theirs, message)
    return message


def transform_for(weights: Path, spec: Path | None, values: dict[str, Any]) -> CvtImageProcessor | str:
    """The preprocessing of the original's evaluation; where we have none like it, the reason.

    Below 384 the short side is resized to size / 0.875 and the centre cropped; from 384 on the
    image is resized to the square.
    """
    path = spec or weights
    test, inputs = section(path, values, "TEST"), section(path, values, "INPUT")
    in_name = SIZE_IN_NAME.search(weights.stem)
    size = test.get("IMAGE_SIZE") or (in_name and int(in_name[1]))
    size = size or section(path, values, "TRAIN").get("IMAGE_SIZE") or DEFAULT_SIZE
    sides = size if isinstance(size, list) else [size]
    if len(set(map(str, sides))) != 1 or not isinstance(sides[0], int):
        return f"{path}: TEST.IMAGE_SIZE: {size!r} is no square, and only squares are made of images"
    crops = test.get("CENTER_CROP", sides[0] < WARP_FROM)
    if crops != (sides[0] < WARP_FROM):
        return (
            f"{path}: TEST.CENTER_CROP: {crops} at {sides[0]} pixels is nothing that "
            f"ConvNextImageProcessor does; it crops below {WARP_FROM} and never from there on"
        )
    try:
        return CvtImageProcessor(
            size=sides[0],
            crop_pct=0.875,
            resample=test.get("INTERPOLATION", BICUBIC),
            image_mean=inputs.get("MEAN", IMAGENET["image_mean"]),
            image_std=inputs.get("STD", IMAGENET["image_std"]),
        )
    except ValueError as error:
        return f"{path}: {' '.join(str(error).split())}"
