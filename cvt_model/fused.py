"""The inference form of CvT: the network of `model.py`, rearranged to do less, with the same results.

What enters: a network's config and weights, and its preprocessing. What leaves: a module from uint8
pixels to embeddings and logits, that torch runs as it is, compiles or captures, and from which OpenVINO
and ONNX are converted. It must not know files, back ends or batch sizes.

What it saves against the references:
    - preprocessing is one multiply-add where the network runs, and only bytes travel there;
    - BatchNorm is folded into the depth-wise convolutions, the attention's scale into the queries, and
      QuickGELU's factor into the MLP, which leaves SiLU;
    - maps are channels-last, in which a map and its tokens are the same memory: nothing is copied;
    - pooled keys and values are pooled once;
    - of the last layer only the CLS token is computed where the model has one: nothing reads the rest,
      which is 6 % of CvT-13.

Shape suffixes are those of `model.py`.
"""

from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cvt_model.choices import EmbeddingKind
from cvt_model.config import CvtConfig
from cvt_model.image_processor import CvtImageProcessor
from cvt_model.layers import join_cls_token, split_cls_token, to_map, to_tokens

QUICK_GELU = 1.702  # x * sigmoid(1.702 x) = silu(1.702 x) / 1.702


class Features(NamedTuple):
    """What the inference form returns, float32 in every precision."""

    embedding: Tensor  # BC, by EmbeddingKind
    logits: Tensor  # BK; K is 0 where there is no classifier


class Weights:
    """The parameters under one prefix of a state dict."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str = "") -> None:
        self._state, self._prefix = state, prefix

    def under(self, name: str) -> "Weights":
        return Weights(self._state, f"{self._prefix}{name}.")

    def __getitem__(self, name: str) -> Tensor:
        return self._state[self._prefix + name]

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._state


class Convolution(nn.Module):
    """A convolution of a channels-last map."""

    def __init__(self, kernel: Tensor, bias: Tensor, stride: int, padding: int, groups: int = 1) -> None:
        super().__init__()
        self.weight = constant(kernel.contiguous(memory_format=torch.channels_last))
        self.bias = constant(bias)
        self.stride, self.padding, self.groups = stride, padding, groups

    @classmethod
    def depthwise(cls, weights: Weights, stride: int, padding: int) -> Self:
        """A depth-wise convolution, with the BatchNorm that follows it folded in."""
        norm = weights.under("convolution_projection.normalization")
        gain = norm["weight"] * torch.rsqrt(norm["running_var"] + nn.BatchNorm2d(1).eps)
        kernel = weights["convolution_projection.convolution.weight"] * gain[:, None, None, None]
        return cls(kernel, norm["bias"] - norm["running_mean"] * gain, stride, padding, len(gain))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.conv2d(x_BCHW, self.weight, self.bias, self.stride, self.padding, 1, self.groups)


class Linear(nn.Module):
    """A linear map whose weights, and bias if any, may be scaled."""

    def __init__(self, weights: Weights, gain: float = 1.0, bias_gain: float | None = None) -> None:
        super().__init__()
        bias_gain = gain if bias_gain is None else bias_gain
        self.weight = constant(scaled(weights["weight"], gain))
        self.bias = constant(scaled(weights["bias"], bias_gain)) if "bias" in weights else None

    def forward(self, x_BLC: Tensor) -> Tensor:
        return F.linear(x_BLC, self.weight, self.bias)


class LayerNorm(nn.Module):
    """LayerNorm over channels, with the epsilon that both references have, torch's own."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weight, self.bias = constant(weights["weight"]), constant(weights["bias"])

    def forward(self, x_BLC: Tensor) -> Tensor:
        return F.layer_norm(x_BLC, self.weight.shape, self.weight, self.bias)


class FusedAttention(nn.Module):
    """Attention of all tokens, or of the CLS token alone, over keys and values of the whole map."""

    def __init__(self, weights: Weights, config: CvtConfig, stage: int) -> None:
        super().__init__()
        self.num_heads, self.with_cls_token = config.num_heads[stage], config.cls_token[stage]
        self.query = Linear(weights.under("projection_query"), config.embed_dim[stage] ** -0.5)
        self.key = Linear(weights.under("projection_key"))
        self.value = Linear(weights.under("projection_value"))
        self.map_query: nn.Module = nn.Identity()
        self.map_key: nn.Module = nn.Identity()
        self.map_value: nn.Module | None = None  # the keys' map serves the values too
        kv = (config.stride_kv[stage], config.padding_kv[stage])
        match config.qkv_projection_method[stage]:
            case "dw_bn":
                of = "convolution_projection_"
                self.map_query = Convolution.depthwise(
                    weights.under(f"{of}query"), config.stride_q[stage], config.padding_q[stage]
                )
                self.map_key = Convolution.depthwise(weights.under(f"{of}key"), *kv)
                self.map_value = Convolution.depthwise(weights.under(f"{of}value"), *kv)
            case "avg":
                self.map_key = nn.AvgPool2d(config.kernel_qkv[stage], *kv, ceil_mode=True)

    def forward(self, x_BLC: Tensor, height: int, width: int, cls_only: bool) -> Tensor:
        cls_B1C, map_BLC = split_cls_token(x_BLC, self.with_cls_token)
        map_BCHW = to_map(map_BLC, height, width)
        k_BSC = v_BSC = join_cls_token(cls_B1C, to_tokens(self.map_key(map_BCHW)))
        if self.map_value is not None:
            v_BSC = join_cls_token(cls_B1C, to_tokens(self.map_value(map_BCHW)))
        if cls_only and cls_B1C is not None:
            q_BLC = cls_B1C
        else:
            q_BLC = join_cls_token(cls_B1C, to_tokens(self.map_query(map_BCHW)))
        q_BNLD, k_BNSD, v_BNSD = (
            x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for x in (self.query(q_BLC), self.key(k_BSC), self.value(v_BSC))
        )
        context_BNLD = F.scaled_dot_product_attention(q_BNLD, k_BNSD, v_BNSD, scale=1.0)
        return context_BNLD.transpose(1, 2).flatten(2)


class FusedLayer(nn.Module):
    """A transformer block; with `cls_only` it returns the CLS token alone."""

    def __init__(self, weights: Weights, config: CvtConfig, stage: int, cls_only: bool) -> None:
        super().__init__()
        self.cls_only = cls_only
        self.quick = config.hidden_act == "quick_gelu"
        factor = QUICK_GELU if self.quick else 1.0
        self.norm_before = LayerNorm(weights.under("layernorm_before"))
        self.attention = FusedAttention(weights.under("attention.attention"), config, stage)
        self.project = Linear(weights.under("attention.output.dense"))
        self.norm_after = LayerNorm(weights.under("layernorm_after"))
        self.widen = Linear(weights.under("intermediate.dense"), factor)
        self.narrow = Linear(weights.under("output.dense"), 1 / factor, bias_gain=1.0)

    def forward(self, x_BLC: Tensor, height: int, width: int) -> Tensor:
        context_BLC = self.attention(self.norm_before(x_BLC), height, width, self.cls_only)
        x_BLC = (x_BLC[:, :1] if self.cls_only else x_BLC) + self.project(context_BLC)
        hidden_BLC = self.widen(self.norm_after(x_BLC))
        hidden_BLC = F.silu(hidden_BLC) if self.quick else F.gelu(hidden_BLC)
        narrowed_BLC: Tensor = self.narrow(hidden_BLC)
        return x_BLC + narrowed_BLC


class FusedStage(nn.Module):
    """A stage: a map to tokens (the CLS token first, if any) and the map's height and width."""

    def __init__(self, weights: Weights, config: CvtConfig, stage: int) -> None:
        super().__init__()
        patches = weights.under("embedding.convolution_embeddings")
        geometry = (config.patch_stride[stage], config.patch_padding[stage])
        self.patches = Convolution(patches["projection.weight"], patches["projection.bias"], *geometry)
        self.norm = LayerNorm(patches.under("normalization"))
        self.cls_token = constant(weights["cls_token"]) if config.cls_token[stage] else None
        prune = config.cls_token[stage] and stage == len(config.depth) - 1
        depth = config.depth[stage]
        self.layers = nn.ModuleList(
            FusedLayer(weights.under(f"layers.{number}"), config, stage, prune and number == depth - 1)
            for number in range(depth)
        )

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, int, int]:
        x_BCHW = self.patches(x_BCHW)
        height, width = x_BCHW.shape[-2:]
        x_BLC = self.norm(to_tokens(x_BCHW))
        if self.cls_token is not None:
            x_BLC = torch.cat((self.cls_token.expand(x_BLC.shape[0], -1, -1), x_BLC), dim=1)
        for layer in self.layers:
            x_BLC = layer(x_BLC, height, width)
        return x_BLC, height, width


class FusedCvt(nn.Module):
    """uint8 pixels (B, H, W, 3) of the processor's size to `Features`.

    `state` is that of `CvtForImageClassification` or of `CvtModel`, float32; its tensors are shared where
    nothing is folded into them. The module is in `dtype`; the head, a vector an image, stays float32.
    Without a head the embedding is the raw CLS token, or the mean of the tokens.
    """

    def __init__(
        self,
        config: CvtConfig,
        state: Mapping[str, Tensor],
        processor: CvtImageProcessor,
        embedding: EmbeddingKind = "pooled",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        gain, offset = processor.affine()
        self.pixel_gain, self.pixel_offset = constant(gain), constant(offset)
        weights = Weights(state)
        stages = weights.under("cvt") if "layernorm.weight" in weights else weights
        self.stages = nn.ModuleList(
            FusedStage(stages.under(f"encoder.stages.{stage}"), config, stage)
            for stage in range(len(config.depth))
        ).to(dtype)
        self.dtype, self.embed_dim = dtype, config.embed_dim[-1]
        self.num_labels = len(weights["classifier.weight"]) if "classifier.weight" in weights else 0
        self.with_cls_token = config.cls_token[-1]
        self.raw_embedding = embedding == "cls_token"
        self.norm = LayerNorm(weights.under("layernorm")) if "layernorm.weight" in weights else None
        self.classifier = Linear(weights.under("classifier")) if "classifier.weight" in weights else None

    def forward(self, pixels_BHWC: Tensor) -> Features:
        x_BHWC = pixels_BHWC.to(torch.float32) * self.pixel_gain + self.pixel_offset
        x_BCHW = x_BHWC.to(self.dtype).permute(0, 3, 1, 2)
        for number, stage in enumerate(self.stages):
            x_BLC, height, width = stage(x_BCHW)
            if number < len(self.stages) - 1:
                _, map_BLC = split_cls_token(x_BLC, stage.cls_token is not None)
                x_BCHW = to_map(map_BLC, height, width)
        return self.head(x_BLC.to(torch.float32))

    def head(self, x_BLC: Tensor) -> Features:
        """The tokens of the last stage to an embedding and logits."""
        x_BLC = x_BLC[:, :1] if self.with_cls_token else x_BLC
        normed_BC = (x_BLC if self.norm is None else self.norm(x_BLC)).mean(dim=1)
        logits_BK = normed_BC[:, :0] if self.classifier is None else self.classifier(normed_BC)
        return Features(x_BLC[:, 0] if self.raw_embedding else normed_BC, logits_BK)


def constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def scaled(tensor: Tensor, gain: float) -> Tensor:
    return tensor if gain == 1.0 else tensor * gain
