"""What a CvT network computes, counted from its config.

Enters: a config and an image size. Leaves: floating-point operations, two for a multiply-add, of all
convolutions, linear maps and matrix products; norms and activations, some hundredths, are left out. Knows
no tensors.
"""

from __future__ import annotations

from cvt_model.config import CvtConfig


def count_flops(config: CvtConfig, height: int, width: int) -> int:
    """Operations of one image as the references compute it, pooled keys and values once each."""
    total, channels = 0, config.num_channels
    for stage, embed_dim in enumerate(config.embed_dim):
        kernel, stride = config.patch_sizes[stage], config.patch_stride[stage]
        height, width = (
            convolved(length, kernel, stride, config.patch_padding[stage]) for length in (height, width)
        )
        total += 2 * height * width * embed_dim * channels * kernel**2
        total += config.depth[stage] * layer_flops(config, stage, height, width)
        channels = embed_dim
    return total + 2 * channels * config.num_labels


def layer_flops(config: CvtConfig, stage: int, height: int, width: int) -> int:
    """One transformer block on a map of this size."""
    embed_dim, extra = config.embed_dim[stage], int(config.cls_token[stage])
    kernel, stride, padding = config.kernel_qkv[stage], config.stride_kv[stage], config.padding_kv[stage]
    method = config.qkv_projection_method[stage]
    kv_map = height * width
    if method == "dw_bn":
        kv_map = convolved(height, kernel, stride, padding) * convolved(width, kernel, stride, padding)
    elif method == "avg":
        kv_map = pooled(height, kernel, stride, padding) * pooled(width, kernel, stride, padding)
    depthwise = (height * width + 2 * kv_map) * embed_dim * kernel**2 if method == "dw_bn" else 0
    tokens, kv_tokens = height * width + extra, kv_map + extra
    projections = 2 * (tokens + kv_tokens) * embed_dim**2  # queries and output; keys and values
    attention = 2 * tokens * kv_tokens * embed_dim  # scores, then their weighted sum of values
    mlp = 2 * tokens * embed_dim * int(embed_dim * config.mlp_ratio[stage])
    return 2 * (depthwise + projections + attention + mlp)


def convolved(length: int, kernel: int, stride: int, padding: int) -> int:
    return (length + 2 * padding - kernel) // stride + 1


def pooled(length: int, kernel: int, stride: int, padding: int) -> int:
    """As a convolution, but rounded up, where that window begins inside (torch's `ceil_mode`)."""
    count = -(-(length + 2 * padding - kernel) // stride) + 1
    return count - 1 if (count - 1) * stride >= length + padding else count
