"""Random CvT configs, and CvT written a second time straight from the original authors' definitions."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cvt_model import CvtConfig


def random_values(seed: int) -> dict[str, Any]:
    """A config that transformers can build and run, every field drawn.

    There depth[i] must be more than i, and a CLS token has the width of the last stage.
    """
    draw = random.Random(seed)
    stages = range(1 + seed % 4)
    num_heads = [draw.choice((1, 2, 3)) for _ in stages]
    embed_dim = [heads * draw.choice((4, 6, 8)) for heads in num_heads]
    for stage in stages:
        if draw.random() < 0.4:
            num_heads[stage], embed_dim[stage] = num_heads[-1], embed_dim[-1]
    kernels = [draw.choice((1, 3, 5)) for _ in stages]
    patches = [draw.choice((2, 3, 5, 7) if stage == 0 else (1, 2, 3)) for stage in stages]
    num_labels = draw.choice((1, 2, 5))
    return {
        "num_channels": draw.choice((1, 3, 4)),
        "patch_sizes": patches,
        "patch_stride": [draw.choice((1, 2)) + (stage == 0) for stage in stages],
        "patch_padding": [draw.randint(0, size // 2) for size in patches],
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "depth": [stage + 1 + draw.choice((0, 0, 1)) for stage in stages],
        "mlp_ratio": [draw.choice((1.0, 2.5, 4.0)) for _ in stages],
        "attention_drop_rate": [draw.choice((0.0, 0.3)) for _ in stages],
        "drop_rate": [draw.choice((0.0, 0.2)) for _ in stages],
        "drop_path_rate": [draw.choice((0.0, 0.4)) for _ in stages],
        "qkv_bias": [draw.random() < 0.6 for _ in stages],
        "cls_token": [width == embed_dim[-1] and draw.random() < 0.7 for width in embed_dim],
        "qkv_projection_method": ["dw_bn" for _ in stages],
        "kernel_qkv": kernels,
        "padding_kv": [draw.randint(0, kernel // 2) for kernel in kernels],
        "stride_kv": [draw.choice((1, 2, 3)) for _ in stages],
        "padding_q": [kernel // 2 for kernel in kernels],
        "stride_q": [1 for _ in stages],
        "num_labels": num_labels,
    }


def random_pixels(values: dict[str, Any], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """One to three images, hardly ever square, large enough for the kernels of the last stage."""
    draw = random.Random(-seed)
    shrink = math.prod(values["patch_stride"])
    height, width = (shrink * 6 + 8 + draw.randint(0, 9) for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    shape = (1 + seed % 3, values["num_channels"], height, width)
    return torch.randn(shape, generator=generator, dtype=dtype)


def random_own_values(seed: int) -> dict[str, Any]:
    """A config of what transformers cannot run: its projections, activation, depths, CLS tokens."""
    draw = random.Random(seed)
    values = random_values(seed)
    stages = range(len(values["depth"]))
    values["qkv_projection_method"] = [draw.choice(("avg", "linear", "dw_bn")) for _ in stages]
    values["qkv_projection_method"][seed % len(stages)] = ("avg", "linear")[seed % 2]
    for stage in stages:
        if values["qkv_projection_method"][stage] != "dw_bn":
            values["kernel_qkv"][stage] = kernel = draw.choice((2, 3, 4))
            values["padding_kv"][stage] = draw.randint(0, kernel // 2)
            values["stride_q"][stage] = 2  # never read there
    return {
        **values,
        "depth": [draw.choice((1, 2)) for _ in stages],
        "cls_token": [draw.random() < 0.5 for _ in stages],
        "hidden_act": draw.choice(("gelu", "quick_gelu", "quick_gelu")),
    }


def restated_maps(
    config: CvtConfig, state: dict[str, Tensor], x: Tensor
) -> tuple[list[Tensor], Tensor | None]:
    """The map after each stage, and the last stage's CLS token, of a `CvtModel`'s state in eval mode."""
    maps, cls = [], None
    for stage, depth in enumerate(config.depth):
        at = f"encoder.stages.{stage}."
        weights = {key.removeprefix(at): value for key, value in state.items() if key.startswith(at)}
        embed = "embedding.convolution_embeddings."
        x = F.conv2d(
            x, weights[embed + "projection.weight"], weights[embed + "projection.bias"],
            config.patch_stride[stage], config.patch_padding[stage],
        )  # fmt: skip
        height, width = x.shape[2:]
        tokens = norm(x.permute(0, 2, 3, 1).flatten(1, 2), weights, embed + "normalization")
        if config.cls_token[stage]:
            tokens = torch.cat([weights["cls_token"].repeat(len(x), 1, 1), tokens], 1)
        for layer in range(depth):
            own = {
                key.removeprefix(f"layers.{layer}."): value
                for key, value in weights.items()
                if key.startswith(f"layers.{layer}.")
            }
            attended = attend(config, stage, own, norm(tokens, own, "layernorm_before"), height, width)
            tokens = tokens + linear(attended, own, "attention.output.dense")
            hidden = linear(norm(tokens, own, "layernorm_after"), own, "intermediate.dense")
            if config.hidden_act == "quick_gelu":
                hidden = hidden / (1 + torch.exp(-1.702 * hidden))
            else:
                hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            tokens = tokens + linear(hidden, own, "output.dense")
        cls = tokens[:, :1] if config.cls_token[stage] else None
        x = tokens[:, int(config.cls_token[stage]) :].unflatten(1, (height, width)).permute(0, 3, 1, 2)
        maps.append(x)
    return maps, cls


def attend(
    config: CvtConfig, stage: int, weights: dict[str, Tensor], tokens: Tensor, height: int, width: int
) -> Tensor:
    """Attention over tokens, one head after another."""
    cls, tokens = tokens.split([int(config.cls_token[stage]), height * width], 1)
    grid = tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    method, kernel = config.qkv_projection_method[stage], config.kernel_qkv[stage]
    projected = []
    for name in ("query", "key", "value"):
        query = name == "query"
        stride = config.stride_q[stage] if query else config.stride_kv[stage]
        padding = config.padding_q[stage] if query else config.padding_kv[stage]
        x = grid
        if method == "avg" and not query:
            x = average_pool(grid, kernel, stride, padding)
        elif method == "dw_bn":
            at = f"attention.attention.convolution_projection_{name}.convolution_projection."
            kernels = weights[at + "convolution.weight"]
            x = F.conv2d(grid, kernels, None, stride, padding, groups=grid.shape[1])
            scale, shift, mean, variance = (
                weights[f"{at}normalization.{key}"][:, None, None]
                for key in ("weight", "bias", "running_mean", "running_var")
            )
            x = (x - mean) / torch.sqrt(variance + 1e-5) * scale + shift
        x = torch.cat([cls, x.permute(0, 2, 3, 1).flatten(1, 2)], 1)
        projected.append(linear(x, weights, f"attention.attention.projection_{name}"))
    heads = []
    for q, k, v in zip(*(x.chunk(config.num_heads[stage], 2) for x in projected), strict=True):
        scores = torch.einsum("bld,bsd->bls", q, k) / math.sqrt(config.embed_dim[stage])
        heads.append(torch.einsum("bls,bsd->bld", scores.softmax(2), v))
    return torch.cat(heads, 2)


def average_pool(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Average pooling in ceil mode, a window at a time.

    A window may hang over the padded map, but must start before its end padding; padding counts in
    the mean, what lies beyond it does not.
    """

    def windows(size: int) -> list[tuple[int, int]]:
        count = math.ceil((size + 2 * padding - kernel) / stride) + 1
        starts = [n * stride - padding for n in range(count) if n * stride - padding < size]
        return [(start, min(start + kernel, size + padding)) for start in starts]

    rows = [
        torch.stack(
            [
                x[:, :, max(top, 0) : bottom, max(left, 0) : right].sum((2, 3))
                / ((bottom - top) * (right - left))
                for left, right in windows(x.shape[3])
            ],
            2,
        )
        for top, bottom in windows(x.shape[2])
    ]
    return torch.stack(rows, 2)


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    y = torch.einsum("blc,dc->bld", x, weights[name + ".weight"])
    return y + weights[name + ".bias"] if name + ".bias" in weights else y


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(2, keepdim=True)
    deviation = torch.sqrt(centred.square().mean(2, keepdim=True) + 1e-5)
    return centred / deviation * weights[name + ".weight"] + weights[name + ".bias"]
