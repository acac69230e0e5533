"""The shape of a CvT network, and the presets of the built-in models.

What enters: the dict of a `config.json` in the Hub's layout. What leaves: a validated, frozen
`CvtConfig`, one tuple entry a stage. It must not know tensors, files or the network.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cvt_model.validation import describe_validation_error

MODEL_TYPE = "cvt"
ARCHITECTURE = "CvtForImageClassification"
DEFAULT_NUM_LABELS = 2  # transformers leaves the labels out of config.json when there are two

Sizes = tuple[Annotated[int, Field(ge=1)], ...]
Paddings = tuple[Annotated[int, Field(ge=0)], ...]
Rates = tuple[Annotated[float, Field(ge=0, lt=1)], ...]
Ratios = tuple[Annotated[float, Field(gt=0)], ...]
Flags = tuple[bool, ...]

PER_STAGE = (
    "patch_sizes", "patch_stride", "patch_padding", "embed_dim", "num_heads", "depth",
    "mlp_ratio", "attention_drop_rate", "drop_rate", "drop_path_rate", "qkv_bias", "cls_token",
    "qkv_projection_method", "kernel_qkv", "padding_kv", "stride_kv", "padding_q", "stride_q",
)  # fmt: skip


class CvtConfig(BaseModel):
    """The fields of transformers' `CvtConfig`, with its defaults (which are CvT-13's).

    Per-stage fields are tuples of one length. Raises pydantic's ValidationError (a ValueError)
    that names the field; `from_dict` raises a plain ValueError with the same findings.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_channels: int = Field(3, ge=1, description="channels of the input image")
    patch_sizes: Sizes = Field((7, 3, 3), description="kernel of each stage's patch embedding")
    patch_stride: Sizes = Field((4, 2, 2), description="stride of each patch embedding")
    patch_padding: Paddings = Field((2, 1, 1), description="padding of each patch embedding")
    embed_dim: Sizes = Field((64, 192, 384), description="width of each stage")
    num_heads: Sizes = Field((1, 3, 6), description="attention heads of each stage")
    depth: Sizes = Field((1, 2, 10), description="layers of each stage")
    mlp_ratio: Ratios = Field((4.0, 4.0, 4.0), description="MLP width over the stage's width")
    attention_drop_rate: Rates = Field((0.0, 0.0, 0.0), description="dropout of attention weights")
    drop_rate: Rates = Field((0.0, 0.0, 0.0), description="dropout of embeddings and outputs")
    drop_path_rate: Rates = Field((0.0, 0.0, 0.1), description="stochastic depth, training only")
    qkv_bias: Flags = Field((True, True, True), description="biases in the query, key, value maps")
    cls_token: Flags = Field((False, False, True), description="stages with a CLS token")
    qkv_projection_method: tuple[str, ...] = Field(
        ("dw_bn", "dw_bn", "dw_bn"), description="dw_bn: depth-wise convolution and BatchNorm"
    )
    kernel_qkv: Sizes = Field((3, 3, 3), description="kernel of the q, k, v convolutions")
    padding_kv: Paddings = Field((1, 1, 1), description="padding of the k and v convolutions")
    stride_kv: Sizes = Field((2, 2, 2), description="stride of the k and v convolutions")
    padding_q: Paddings = Field((1, 1, 1), description="padding of the q convolution")
    stride_q: Sizes = Field((1, 1, 1), description="stride of the q convolution")
    initializer_range: float = Field(0.02, gt=0, description="std of the initial weights")
    # transformers declares layer_norm_eps and never reads it: every LayerNorm there is built with
    # torch's 1e-5, and released weights were trained so. It is kept for the round trip only.
    layer_norm_eps: float = Field(1e-12, gt=0, description="written back, never used")
    num_labels: int = Field(DEFAULT_NUM_LABELS, ge=0, description="classes; 0: no classifier")
    id2label: dict[int, str] = Field(default_factory=dict, description="class index to name")
    label2id: dict[str, int] = Field(default_factory=dict, description="class name to index")

    @model_validator(mode="before")
    @classmethod
    def _complete_labels(cls, values: Any) -> Any:
        return complete_labels(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_per_stage_lengths(self)
        check_stages(self)
        if sorted(self.id2label) != list(range(self.num_labels)):
            raise ValueError(
                f"id2label: has {len(self.id2label)} labels that must be numbered 0 to "
                f"{self.num_labels - 1}, one for each of num_labels={self.num_labels}"
            )
        return self

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read the dict of a Hub `config.json`; keys of others (dtype, architectures) are ignored.

        Raises ValueError, one line that names every field at fault.
        """
        model_type = values.get("model_type", MODEL_TYPE)
        if model_type != MODEL_TYPE:
            raise ValueError(f'model_type: is {model_type!r}, only "{MODEL_TYPE}" can be loaded')
        own = {key: values[key] for key in cls.model_fields if values.get(key) is not None}
        try:
            return cls.model_validate(own)
        except ValidationError as error:
            raise ValueError(describe_validation_error(error)) from error

    def to_dict(self) -> dict[str, Any]:
        """This config in the Hub's layout (JSON types only); `from_dict` reads it back."""
        values = self.model_dump(mode="json", exclude={"num_labels", "id2label"})
        values["id2label"] = {str(index): label for index, label in self.id2label.items()}
        return {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], **values}

    def with_num_labels(self, num_labels: int) -> Self:
        """The same network with another number of classes, under default labels."""
        labels = {"id2label", "label2id", "num_labels"}
        return type(self)(**self.model_dump(exclude=labels), num_labels=num_labels)


def complete_labels(values: dict[str, Any]) -> dict[str, Any]:
    """Derive num_labels, id2label and label2id from whichever of them `values` has."""
    if values.get("id2label") is None:
        num_labels = values.get("num_labels", DEFAULT_NUM_LABELS)
        if not isinstance(num_labels, int):
            return values  # the field's own validation says what is wrong
        values = {**values, "id2label": {i: f"LABEL_{i}" for i in range(num_labels)}}
        values.pop("label2id", None)
    id2label = values["id2label"]
    if not isinstance(id2label, dict):
        return values
    values = {"num_labels": len(id2label), **values}
    if not values.get("label2id"):
        # An index that is no number is id2label's own validation to refuse.
        values["label2id"] = {
            label: int(index) for index, label in id2label.items() if str(index).isdecimal()
        }
    return values


def check_per_stage_lengths(config: CvtConfig) -> None:
    num_stages = len(config.depth)
    if num_stages == 0:
        raise ValueError("depth: names no stage, at least one is needed")
    for name in PER_STAGE:
        length = len(getattr(config, name))
        if length != num_stages:
            raise ValueError(f"{name}: has {length} entries for {num_stages} stages (depth's)")


def check_stages(config: CvtConfig) -> None:
    """Refuse what no forward pass could compute, stage by stage."""
    for stage, width in enumerate(config.embed_dim):
        if width % config.num_heads[stage]:
            raise ValueError(
                f"num_heads: embed_dim {width} of stage {stage} is not a multiple of its "
                f"{config.num_heads[stage]} heads"
            )
        method = config.qkv_projection_method[stage]
        if method != "dw_bn":
            raise ValueError(
                f'qkv_projection_method: {method!r} of stage {stage} is not supported, only "dw_bn" is'
            )
        if config.stride_q[stage] != 1:
            raise ValueError(
                f"stride_q: is {config.stride_q[stage]} in stage {stage}; queries must keep the "
                "resolution for the residual connection, so it must be 1"
            )
        if 2 * config.padding_q[stage] != config.kernel_qkv[stage] - 1:
            raise ValueError(
                f"padding_q: {config.padding_q[stage]} with kernel_qkv {config.kernel_qkv[stage]} "
                f"changes the resolution in stage {stage}; it must be (kernel_qkv - 1) / 2"
            )
        if config.cls_token[stage] and width != config.embed_dim[-1]:
            raise ValueError(
                f"cls_token: stage {stage} is {width} wide, a CLS token has the last stage's "
                f"{config.embed_dim[-1]}"
            )


@dataclass(frozen=True)
class Preset:
    """A built-in model: its network, the seed of its random weights, its preprocessing."""

    config: CvtConfig
    seed: int
    processor: Mapping[str, Any]  # in the layout of preprocessor_config.json


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "cvt-tiny-random": Preset(
            config=CvtConfig(
                patch_stride=(4, 2, 1),
                embed_dim=(32, 64, 192),
                num_heads=(4, 4, 4),
                depth=(1, 2, 3),
                drop_path_rate=(0.0, 0.0, 0.0),
                cls_token=(False, False, False),
                initializer_range=0.07,
                num_labels=10,
            ),
            seed=20240229,
            processor={
                "size": {"shortest_edge": 64},
                "crop_pct": 0.875,
                "resample": 3,
                "image_mean": (0.485, 0.456, 0.406),
                "image_std": (0.229, 0.224, 0.225),
            },
        )
    }
)
