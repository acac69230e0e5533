"""CvT, the Convolutional vision Transformer (Wu et al. 2021), as one readable network.

What enters: normalised pixels. What leaves: feature maps, the embedding that the classifier sees,
logits, a loss. Parameters are named as in transformers' `CvtForImageClassification`, so its
checkpoints match directly; where the references disagree (drop-path, initialisation, average
pooling, the width of a CLS token), the original authors' code holds. It must not know files, images
or preprocessing.

Shape suffixes of tensors:
    B  batch                            H, W  height and width of the pixels or feature map
    C  channels: the stage's embed_dim  L     tokens: H * W, and one more with a CLS token
    N  attention heads                  S     key and value tokens (the map may be strided)
    D  width of a head, C / N           K     classes
"""

from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from cvt_model.checkpoint import resolve_checkpoint
from cvt_model.config import CvtConfig
from cvt_model.image_processor import CvtImageProcessor
from cvt_model.layers import (
    DepthwiseConv2d,
    DropPath,
    QuickGELU,
    attend,
    join_cls_token,
    named,
    split_cls_token,
    to_map,
    to_tokens,
)
from cvt_model.loss import classification_loss
from cvt_model.save import save_checkpoint


class CvtModelOutput(NamedTuple):
    """What `CvtModel` returns."""

    last_hidden_state: Tensor  # BCHW, of the last stage
    cls_token_value: Tensor | None  # (B, 1, C), None where the last stage has no CLS token
    hidden_states: tuple[Tensor, ...] | None  # BCHW of every stage, when asked for


class ImageClassifierOutput(NamedTuple):
    """What `CvtForImageClassification` returns."""

    loss: Tensor | None  # a scalar, where labels were given
    logits: Tensor  # BK; the embedding itself where num_labels is 0
    hidden_states: tuple[Tensor, ...] | None  # BCHW of every stage, when asked for
    embedding: Tensor  # BC, the vector that the classifier sees
    cls_token_value: Tensor | None  # (B, 1, C), before the final LayerNorm


class PatchEmbedding(nn.Module):
    """Overlapping patches to tokens: a strided convolution, then LayerNorm over channels (3.1)."""

    def __init__(self, config: CvtConfig, stage: int) -> None:
        super().__init__()
        in_channels = config.embed_dim[stage - 1] if stage else config.num_channels
        self.projection = nn.Conv2d(
            in_channels,
            config.embed_dim[stage],
            kernel_size=config.patch_sizes[stage],
            stride=config.patch_stride[stage],
            padding=config.patch_padding[stage],
        )
        self.normalization = nn.LayerNorm(config.embed_dim[stage])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.projection(x_BCHW)
        height, width = x_BCHW.shape[-2:]
        return to_map(self.normalization(to_tokens(x_BCHW)), height, width)


class SelfAttention(nn.Module):
    """Multi-head attention whose queries, keys and values come from the map's neighbourhoods (3.2)."""

    def __init__(self, config: CvtConfig, stage: int) -> None:
        super().__init__()
        width, bias = config.embed_dim[stage], config.qkv_bias[stage]
        self.num_heads = config.num_heads[stage]
        self.with_cls_token = config.cls_token[stage]
        self.drop_rate = config.attention_drop_rate[stage]
        # The stage's width, not the head's: the original code scales so, and weights expect it.
        self.scale = width**-0.5
        method, kernel = config.qkv_projection_method[stage], config.kernel_qkv[stage]
        q_method = "linear" if method == "avg" else method  # only keys and values are pooled
        q = (q_method, width, kernel, config.stride_q[stage], config.padding_q[stage])
        kv = (method, width, kernel, config.stride_kv[stage], config.padding_kv[stage])
        self.convolution_projection_query = map_projection(*q)
        self.convolution_projection_key = map_projection(*kv)
        self.convolution_projection_value = map_projection(*kv)
        self.projection_query = nn.Linear(width, width, bias=bias)
        self.projection_key = nn.Linear(width, width, bias=bias)
        self.projection_value = nn.Linear(width, width, bias=bias)

    def forward(self, x_BLC: Tensor, height: int, width: int) -> Tensor:
        cls_B1C, map_BLC = split_cls_token(x_BLC, self.with_cls_token)
        map_BCHW = to_map(map_BLC, height, width)
        q_BLC = join_cls_token(cls_B1C, to_tokens(self.convolution_projection_query(map_BCHW)))
        k_BSC = join_cls_token(cls_B1C, to_tokens(self.convolution_projection_key(map_BCHW)))
        v_BSC = join_cls_token(cls_B1C, to_tokens(self.convolution_projection_value(map_BCHW)))
        context_BNLD = attend(
            self.split_heads(self.projection_query(q_BLC)),
            self.split_heads(self.projection_key(k_BSC)),
            self.split_heads(self.projection_value(v_BSC)),
            self.scale,
            self.drop_rate if self.training else 0.0,
        )
        return context_BNLD.transpose(1, 2).flatten(2)

    def split_heads(self, x_BLC: Tensor) -> Tensor:
        batch, length, channels = x_BLC.shape
        x_BLND = x_BLC.reshape(batch, length, self.num_heads, channels // self.num_heads)
        return x_BLND.transpose(1, 2)


class Layer(nn.Module):
    """A pre-norm transformer block: attention and MLP, each beside a residual connection."""

    def __init__(self, config: CvtConfig, stage: int, drop_path_rate: float) -> None:
        super().__init__()
        width = config.embed_dim[stage]
        hidden = int(width * config.mlp_ratio[stage])
        drop_rate = config.drop_rate[stage]
        self.layernorm_before = nn.LayerNorm(width)
        self.attention = nn.ModuleDict(
            {
                "attention": SelfAttention(config, stage),
                "output": named(dense=nn.Linear(width, width), dropout=nn.Dropout(drop_rate)),
            }
        )
        self.layernorm_after = nn.LayerNorm(width)
        activation = nn.GELU() if config.hidden_act == "gelu" else QuickGELU()
        self.intermediate = named(dense=nn.Linear(width, hidden), activation=activation)
        self.output = named(dense=nn.Linear(hidden, width), dropout=nn.Dropout(drop_rate))
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x_BLC: Tensor, height: int, width: int) -> Tensor:
        context_BLC = self.attention["attention"](self.layernorm_before(x_BLC), height, width)
        x_BLC = x_BLC + self.drop_path(self.attention["output"](context_BLC))
        mlp_BLC: Tensor = self.drop_path(self.output(self.intermediate(self.layernorm_after(x_BLC))))
        return x_BLC + mlp_BLC


class Stage(nn.Module):
    """A patch embedding that shrinks the map, then `depth` layers over its tokens."""

    def __init__(self, config: CvtConfig, stage: int) -> None:
        super().__init__()
        self.with_cls_token = config.cls_token[stage]
        if self.with_cls_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, config.embed_dim[stage]))
        self.embedding = named(
            convolution_embeddings=PatchEmbedding(config, stage),
            dropout=nn.Dropout(config.drop_rate[stage]),
        )
        depth, drop_path_rate = config.depth[stage], config.drop_path_rate[stage]
        self.layers = nn.ModuleList(
            Layer(config, stage, drop_path_rate * layer / max(depth - 1, 1)) for layer in range(depth)
        )

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        x_BCHW = self.embedding(x_BCHW)
        height, width = x_BCHW.shape[-2:]
        cls_B1C = self.cls_token.expand(x_BCHW.shape[0], -1, -1) if self.with_cls_token else None
        x_BLC = join_cls_token(cls_B1C, to_tokens(x_BCHW))
        for layer in self.layers:
            x_BLC = layer(x_BLC, height, width)
        cls_B1C, map_BLC = split_cls_token(x_BLC, self.with_cls_token)
        return to_map(map_BLC, height, width), cls_B1C


class CvtModel(nn.Module):
    """The stages without a head: normalised pixels to feature maps."""

    def __init__(self, config: CvtConfig) -> None:
        super().__init__()
        self.config = config
        stages = nn.ModuleList(Stage(config, stage) for stage in range(len(config.depth)))
        self.encoder = nn.ModuleDict({"stages": stages})
        init_weights(self, config.initializer_range)

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool = False, return_dict: bool = True
    ) -> CvtModelOutput | tuple[Any, ...]:
        """Pixels (B, num_channels, H, W) of any size to feature maps (B, C, H / stride, W / stride).

        With `return_dict=False` a plain tuple of the outputs that are not None, in their order.
        Raises ValueError for pixels of another shape.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values: shape {tuple(pixel_values.shape)} is not "
                f"(batch, {self.config.num_channels}, height, width)"
            )
        x_BCHW, cls_B1C = pixel_values, None
        hidden_states: tuple[Tensor, ...] = ()
        for stage in self.encoder["stages"].children():
            x_BCHW, cls_B1C = stage(x_BCHW)
            if output_hidden_states:
                hidden_states = (*hidden_states, x_BCHW)
        output = CvtModelOutput(x_BCHW, cls_B1C, hidden_states or None)
        return output if return_dict else tuple(value for value in output if value is not None)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Self:
        """Load a checkpoint's stages (whatever `resolve_checkpoint` takes), in eval mode.

        Raises CheckpointError.
        """
        return resolve_checkpoint(source).load_as(cls, dtype, device).requires_grad_()

    def save_pretrained(self, directory: str | Path, processor: CvtImageProcessor | None = None) -> None:
        """Write weights, config and, where given, preprocessing as `from_pretrained` reads them."""
        save_checkpoint(directory, self, processor)


class CvtForImageClassification(nn.Module):
    """`CvtModel`, a LayerNorm and a linear classifier (none where `num_labels` is 0)."""

    def __init__(self, config: CvtConfig) -> None:
        super().__init__()
        self.config = config
        self.cvt = CvtModel(config)
        self.layernorm = nn.LayerNorm(config.embed_dim[-1])
        self.classifier: nn.Module = nn.Identity()
        if config.num_labels:
            self.classifier = nn.Linear(config.embed_dim[-1], config.num_labels)
            init_weights(self.classifier, config.initializer_range)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Classify normalised pixels (B, num_channels, H, W) of any size.

        Labels, if given, are class numbers (B,) or targets (B, K), by `config.problem_type`; see
        `classification_loss`. With `return_dict=False` a plain tuple of loss, logits and hidden
        states, those that are not None. Raises ValueError for pixels or labels of another shape.
        """
        features: CvtModelOutput = self.cvt(pixel_values, output_hidden_states)
        cls_B1C = features.cls_token_value
        x_BLC = to_tokens(features.last_hidden_state) if cls_B1C is None else cls_B1C
        embedding_BC = self.layernorm(x_BLC).mean(dim=1)
        logits_BK = self.classifier(embedding_BC)
        loss = None
        if labels is not None:
            loss = classification_loss(logits_BK, labels, self.config.num_labels, self.config.problem_type)
        output = ImageClassifierOutput(loss, logits_BK, features.hidden_states, embedding_BC, cls_B1C)
        return output if return_dict else tuple(value for value in output[:3] if value is not None)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Self:
        """Load a checkpoint (whatever `resolve_checkpoint` takes), in eval mode.

        Raises CheckpointError, also where the checkpoint has no final LayerNorm.
        """
        return resolve_checkpoint(source).load_as(cls, dtype, device).requires_grad_()

    def save_pretrained(self, directory: str | Path, processor: CvtImageProcessor | None = None) -> None:
        """Write weights, config and, where given, preprocessing as `from_pretrained` reads them."""
        save_checkpoint(directory, self, processor)


def map_projection(method: str, width: int, kernel_size: int, stride: int, padding: int) -> nn.Module:
    """What a map goes through before its tokens become queries, keys or values; see `CvtConfig`."""
    if method == "linear":
        return nn.Identity()
    if method == "avg":
        return nn.AvgPool2d(kernel_size, stride, padding, ceil_mode=True)
    convolution = DepthwiseConv2d(width, kernel_size, stride, padding)
    normalization = nn.BatchNorm2d(width)
    return named(convolution_projection=named(convolution=convolution, normalization=normalization))


def init_weights(model: nn.Module, std: float) -> None:
    """Initialise as the original authors do: convolutions and norms stay as torch makes them."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Stage) and module.with_cls_token:
            nn.init.trunc_normal_(module.cls_token, std=std)
