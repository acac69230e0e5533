"""The shape of a CvT network.

What enters: a `config.json` in the Hub's layout, or its dict. What leaves: a validated, frozen
`CvtConfig`, one tuple entry a stage. It must not know tensors or the network.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

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
QkvProjection = Literal["dw_bn", "avg", "linear"]
HiddenAct = Literal["gelu", "quick_gelu"]
ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]

PER_STAGE = (
    "patch_sizes", "patch_stride", "patch_padding", "embed_dim", "num_heads", "depth",
    "mlp_ratio", "attention_drop_rate", "drop_rate", "drop_path_rate", "qkv_bias", "cls_token",
    "qkv_projection_method", "kernel_qkv", "padding_kv", "stride_kv", "padding_q", "stride_q",
)  # fmt: skip


class CvtConfig(BaseModel):
    """The fields of transformers' `CvtConfig`, with its defaults (which are CvT-13's), and `hidden_act`.

    Per-stage fields are tuples of one length; any number of stages, of any depth, each with a CLS
    token or without. Raises pydantic's ValidationError (a ValueError) that names the field;
    `from_dict` raises a plain ValueError with the same findings.
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
    drop_path_rate: Rates = Field(
        (0.0, 0.0, 0.1), description="stochastic depth of each stage's last layer, rising from 0"
    )
    qkv_bias: Flags = Field((True, True, True), description="biases in the query, key, value maps")
    cls_token: Flags = Field((False, False, True), description="stages with a CLS token")
    qkv_projection_method: tuple[QkvProjection, ...] = Field(
        ("dw_bn", "dw_bn", "dw_bn"),
        description="dw_bn: depth-wise convolution and BatchNorm; avg: average pooling of keys and "
        "values, queries as they are; linear: neither",
    )
    kernel_qkv: Sizes = Field((3, 3, 3), description="kernel of the convolutions, or of the pooling")
    padding_kv: Paddings = Field((1, 1, 1), description="padding of keys and values")
    stride_kv: Sizes = Field((2, 2, 2), description="stride of keys and values")
    padding_q: Paddings = Field((1, 1, 1), description="padding of queries, read by dw_bn alone")
    stride_q: Sizes = Field((1, 1, 1), description="stride of queries, read by dw_bn alone")
    hidden_act: HiddenAct = Field(
        "gelu", description="of the MLPs: transformers' gelu, or quick_gelu, the original authors'"
    )
    initializer_range: float = Field(0.02, gt=0, description="std of the initial weights")
    # transformers declares layer_norm_eps and never reads it: every LayerNorm there is built with
    # torch's 1e-5, and released weights were trained so. It is kept for the round trip only.
    layer_norm_eps: float = Field(1e-12, gt=0, description="written back, never used")
    num_labels: int = Field(DEFAULT_NUM_LABELS, ge=0, description="classes; 0: no classifier")
    id2label: dict[int, str] = Field(default_factory=dict, description="class index to name")
    label2id: dict[str, int] = Field(default_factory=dict, description="class name to index")
    problem_type: ProblemType | None = Field(
        None, description="which loss; None: by num_labels and the labels' dtype"
    )

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
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError("problem_type: single_label_classification needs more than one label")
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
        # The Hub's files have these two only where they differ from what transformers computes.
        if self.hidden_act == "gelu":
            del values["hidden_act"]
        if self.problem_type is None:
            del values["problem_type"]
        return {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], **values}

    @classmethod
    def from_json_file(cls, path: str | Path) -> Self:
        """Read a `config.json`; raises ValueError as `from_dict` does, OSError without the file."""
        values = json.loads(Path(path).read_text("utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold a JSON object, not a {type(values).__name__}")
        return cls.from_dict(values)

    def to_json_file(self, path: str | Path) -> None:
        """Write a `config.json` in the Hub's layout."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True)
        Path(path).write_text(text + "\n", "utf-8")

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
        if int(width * config.mlp_ratio[stage]) < 1:
            raise ValueError(f"mlp_ratio: {config.mlp_ratio[stage]} leaves no MLP in stage {stage}")
        method = config.qkv_projection_method[stage]
        if method == "dw_bn":
            check_query_convolution(config, stage)
        elif method == "avg" and 2 * config.padding_kv[stage] > config.kernel_qkv[stage]:
            raise ValueError(
                f"padding_kv: {config.padding_kv[stage]} is more than half of kernel_qkv "
                f"{config.kernel_qkv[stage]} in stage {stage}, which average pooling cannot have"
            )


def check_query_convolution(config: CvtConfig, stage: int) -> None:
    """Queries must keep the map's resolution, whatever it is, for the residual connection."""
    stride, padding = config.stride_q[stage], config.padding_q[stage]
    if stride != 1:
        raise ValueError(
            f"stride_q: is {stride} in stage {stage}; queries must keep the resolution for the "
            "residual connection, so it must be 1"
        )
    if 2 * padding != config.kernel_qkv[stage] - 1:
        raise ValueError(
            f"padding_q: {padding} with kernel_qkv {config.kernel_qkv[stage]} "
            f"changes the resolution in stage {stage}; it must be (kernel_qkv - 1) / 2"
        )
