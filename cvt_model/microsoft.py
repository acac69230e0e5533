"""The original authors' layout: a `.pth` file, with its spec beside it or without.

What enters: names and shapes in the file. What leaves: the rename table and the network's config,
read from the spec (`microsoft_spec.py`) or inferred. Source: `lib/models/cls_cvt.py` of
github.com/microsoft/CvT. It must not know how files are mapped to memory.
"""

import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvt_model.config import CvtConfig
from cvt_model.errors import CheckpointError
from cvt_model.layouts import Layout, Rule, same_shape
from cvt_model.presets import ARCHITECTURES
from cvt_model.weights import FETCH_AGAIN, Shape, Shapes, load_pickle, tensors_of

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

SUFFIXES = (".pth", ".pt")
RULES = (
    Rule(r"^cvt\.encoder\.stages\.(\d+)\.", r"stage\1."),
    Rule(r"\.embedding\.convolution_embeddings\.projection\.", ".patch_embed.proj."),
    Rule(r"\.embedding\.convolution_embeddings\.normalization\.", ".patch_embed.norm."),
    Rule(r"\.layers\.(\d+)\.", r".blocks.\1."),
    Rule(r"\.layernorm_before\.", ".norm1."),
    Rule(r"\.layernorm_after\.", ".norm2."),
    Rule(r"\.attention\.attention\.convolution_projection_([qkv])[a-z]+\.", r".attn.conv_proj_\1."),
    Rule(r"\.convolution_projection\.convolution\.", ".conv."),
    Rule(r"\.convolution_projection\.normalization\.", ".bn."),
    Rule(r"\.attention\.attention\.projection_([qkv])[a-z]+\.", r".attn.proj_\1."),
    Rule(r"\.attention\.output\.dense\.", ".attn.proj."),
    Rule(r"\.intermediate\.dense\.", ".mlp.fc1."),
    Rule(r"\.output\.dense\.", ".mlp.fc2."),
    Rule(r"^layernorm\.", "norm."),
    Rule(r"^classifier\.", "head."),
)
WRAPPERS = ("state_dict", "model")  # under which training scripts keep the weights
PARALLEL_PREFIX = "module."  # of DistributedDataParallel
ACTIVATION = "quick_gelu"  # the original has no other
PATCH_GEOMETRY = {7: (4, 2), 3: (2, 1)}  # kernel: stride and padding, in all of the paper's models
STRIDE_KV = 2  # likewise


def microsoft_layout(spec: Path | None) -> Layout:
    """The rename table; `spec` is the file that describes the network, None where it was inferred."""
    return Layout(
        described_by=spec.name if spec else "the network that their names and shapes suggest",
        remedy="give the spec that these weights were trained with, beside them and of the same name",
        rules=RULES,
        read_shapes=read_shapes,
        read_tensors=read_tensors,
        shape_as_stored=same_shape,
    )


def read_shapes(files: tuple[Path, ...]) -> Shapes:
    return {key: tuple(tensor.shape) for key, tensor in read_tensors(files)}


def read_tensors(files: tuple[Path, ...]) -> Iterator[tuple[str, "Tensor"]]:
    """Every tensor by its name in the original's network; each may be a view of its file."""
    for path in files:
        yield from unwrap(path, load_pickle(path)).items()


def unwrap(path: Path, state: Any) -> dict[str, "Tensor"]:
    """The network's tensors, out of what training scripts put around them."""
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            others = ", ".join(str(key) for key in state if key != wrapper) or "nothing else"
            logger.info("%s: weights taken from %r; it also holds %s", path, wrapper, others)
            state = state[wrapper]
            break
    tensors = tensors_of(path, state)
    if tensors and all(key.startswith(PARALLEL_PREFIX) for key in tensors):
        return {key.removeprefix(PARALLEL_PREFIX): tensor for key, tensor in tensors.items()}
    return tensors


def infer_config(path: Path, shapes: Shapes) -> CvtConfig:
    """The config as far as tensors tell it; the rest is a published model's or the paper's family.

    Raises CheckpointError where neither can be.
    """
    stages = [infer_stage(path, shapes, f"stage{n}.") for n in range(count(shapes, r"stage(\d+)\."))]
    if not stages:
        raise CheckpointError(
            f"{path} has no parameter called stage0.…, so it is no CvT of the original authors; "
            "give a checkpoint in a directory with its config.json"
        )
    told: dict[str, Any] = {field: tuple(stage[field] for stage in stages) for field in stages[0]}
    told |= {"num_labels": count_classes(shapes), "hidden_act": ACTIVATION}
    told["num_channels"] = shape_of(path, shapes, "stage0.patch_embed.proj.weight", 4)[1]
    for name, architecture in ARCHITECTURES.items():
        known = architecture.config
        if (known.embed_dim, known.depth) == (told["embed_dim"], told["depth"]):
            logger.info("%s: has the widths and depths of %s and is taken for it", path, name)
            return known.with_num_labels(told["num_labels"]).model_copy(update={"hidden_act": ACTIVATION})
    return assume_family(path, told)


def infer_stage(path: Path, shapes: Shapes, stage: str) -> dict[str, Any]:
    """What the tensors of one stage tell, by field of the config."""
    block = f"{stage}blocks.0."
    width, _, patch_size, _ = shape_of(path, shapes, f"{stage}patch_embed.proj.weight", 4)
    hidden, _ = shape_of(path, shapes, f"{block}mlp.fc1.weight", 2)
    if not any(key.startswith(f"{block}attn.conv_proj_") for key in shapes):
        raise CheckpointError(
            f"{path}: {stage}blocks.0 has no convolutions for queries, keys and values, and its "
            'tensors do not tell which way without them was meant ("avg" or "linear", kernel, '
            f"stride); {put_spec_beside(path)}"
        )
    return {
        "embed_dim": width,
        "patch_sizes": patch_size,
        "depth": count(shapes, rf"{stage}blocks\.(\d+)\."),
        "mlp_ratio": ratio_of(hidden, width),
        "qkv_bias": any(f"{block}attn.proj_{x}.bias" in shapes for x in "qkv"),
        "cls_token": f"{stage}cls_token" in shapes,
        "qkv_projection_method": "dw_bn",
        "kernel_qkv": shape_of(path, shapes, f"{block}attn.conv_proj_k.conv.weight", 4)[-1],
    }


def assume_family(path: Path, told: dict[str, Any]) -> CvtConfig:
    """Complete what no tensor tells (heads, strides, paddings) as all of the paper's models have it."""
    unknown = [size for size in told["patch_sizes"] if size not in PATCH_GEOMETRY]
    if unknown:
        raise CheckpointError(
            f"{path}: has a patch embedding of {unknown[0]} x {unknown[0]}, which no model of the "
            f"paper has, and tensors do not tell its stride; {put_spec_beside(path)}"
        )
    stages = len(told["depth"])
    head_dim = math.gcd(*told["embed_dim"])
    same_size = tuple((kernel - 1) // 2 for kernel in told["kernel_qkv"])
    assumed = {
        "num_heads": tuple(width // head_dim for width in told["embed_dim"]),
        "patch_stride": tuple(PATCH_GEOMETRY[size][0] for size in told["patch_sizes"]),
        "patch_padding": tuple(PATCH_GEOMETRY[size][1] for size in told["patch_sizes"]),
        "stride_q": (1,) * stages,
        "padding_q": same_size,
        "stride_kv": (STRIDE_KV,) * stages,
        "padding_kv": same_size,
    }
    training = dict.fromkeys(("attention_drop_rate", "drop_rate", "drop_path_rate"), (0.0,) * stages)
    try:
        config = CvtConfig.from_dict({**told, **assumed, **training})
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; {put_spec_beside(path)}") from error
    logger.warning(
        "%s: is no published model, and tensors do not tell all; assumed as in the paper: %s. If that "
        "is wrong, so are all results: %s",
        path,
        ", ".join(f"{field} {value}" for field, value in assumed.items()),
        put_spec_beside(path),
    )
    return config


def count(shapes: Shapes, numbered: str) -> int:
    """One more than the highest number that `numbered` finds at a name's beginning."""
    return max((int(m[1]) for key in shapes if (m := re.match(numbered, key))), default=-1) + 1


def count_classes(shapes: Shapes) -> int:
    """The classifier's outputs; 0 where there is none."""
    return next((shapes[key][0] for key in ("head.weight", "head.bias") if shapes.get(key)), 0)


def ratio_of(hidden: int, width: int) -> float:
    """The mlp_ratio that gives this hidden width, which the network computes as int(width * ratio)."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def shape_of(path: Path, shapes: Shapes, key: str, ndim: int) -> Shape:
    shape = shapes.get(key)
    if shape is None or len(shape) != ndim:
        found = "is missing" if shape is None else f"has {len(shape)} axes instead of {ndim}"
        raise CheckpointError(f"{path}: {key} {found}; {FETCH_AGAIN}")
    return shape


def put_spec_beside(path: Path) -> str:
    return f"put the YAML or JSON spec that it was trained with beside it, as {path.stem}.yaml"
