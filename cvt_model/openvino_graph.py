"""The inference form as an OpenVINO graph, op for op the network of `fused.py`.

What enters: a `FusedCvt`, float32, on the CPU. What leaves: an `openvino.Model` that shares its weights,
from uint8 pixels (B, H, W, 3) to float32 `embedding` (B, C) and `logits` (B, K). It must not know devices,
batches in flight or files. The graph is written out rather than traced: that takes a tenth of a second
instead of seconds, and openvino's own converter reports its use over the network.
"""

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset14 as ops
from torch import Tensor, nn

from cvt_model.fused import Convolution, FusedAttention, FusedCvt, FusedLayer, FusedStage, LayerNorm, Linear

Node = Any  # openvino's nodes carry no types

NORM_EPS = 1e-5
TO_MAP, TO_PIXELS_LAST = (0, 3, 1, 2), (0, 2, 3, 1)
HEADS_FIRST = (0, 2, 1, 3)


def build_graph(fused: FusedCvt, height: int, width: int, batch_size: int = -1) -> ov.Model:
    """The graph for pixels of this size; a batch size of -1 takes any number of images."""
    pixels_BHWC = ops.parameter([batch_size, height, width, 3], np.uint8, name="pixels")
    x_BHWC = ops.add(
        ops.multiply(ops.convert(pixels_BHWC, "f32"), constant(fused.pixel_gain)),
        constant(fused.pixel_offset),
    )
    x_BCHW = transpose(x_BHWC, TO_MAP)
    stages = list(fused.stages)
    for number, stage in enumerate(stages):
        assert isinstance(stage, FusedStage)
        x_BLC, size = run_stage(stage, x_BCHW, (height, width))
        height, width = size
        if number < len(stages) - 1:
            _, map_BLC = split_cls_token(x_BLC, stage.cls_token is not None)
            x_BCHW = to_map(map_BLC, size)
    if fused.with_cls_token:
        x_BLC, _ = split_cls_token(x_BLC, True)
    normed_BLC = x_BLC if fused.norm is None else layer_norm(x_BLC, fused.norm)
    normed_BC = ops.reduce_mean(normed_BLC, [1], keep_dims=False)
    embedding_BC = ops.squeeze(x_BLC, [1]) if fused.raw_embedding else normed_BC
    results = [named_result(embedding_BC, "embedding")]
    if fused.classifier is not None:
        results.append(named_result(linear(normed_BC, fused.classifier), "logits"))
    return ov.Model(results, [pixels_BHWC], "cvt")


def run_stage(stage: FusedStage, x_BCHW: Node, size: tuple[int, int]) -> tuple[Node, tuple[int, int]]:
    x_BCHW = convolution(x_BCHW, stage.patches)
    height, width = (convolved(n, stage.patches) for n in size)
    x_BLC = layer_norm(to_tokens(x_BCHW), stage.norm)
    if stage.cls_token is not None:
        batch = ops.gather(ops.shape_of(x_BLC), [0], 0)
        shape = ops.concat([batch, ops.constant([1, stage.cls_token.shape[-1]], np.int64)], 0)
        x_BLC = ops.concat([ops.broadcast(constant(stage.cls_token), shape), x_BLC], 1)
    for layer in stage.layers:
        assert isinstance(layer, FusedLayer)
        x_BLC = run_layer(layer, x_BLC, (height, width))
    return x_BLC, (height, width)


def run_layer(layer: FusedLayer, x_BLC: Node, size: tuple[int, int]) -> Node:
    context_BLC = run_attention(layer.attention, layer_norm(x_BLC, layer.norm_before), size, layer.cls_only)
    if layer.cls_only:
        x_BLC, _ = split_cls_token(x_BLC, True)
    x_BLC = ops.add(x_BLC, linear(context_BLC, layer.project))
    hidden_BLC = linear(layer_norm(x_BLC, layer.norm_after), layer.widen)
    hidden_BLC = ops.swish(hidden_BLC) if layer.quick else ops.gelu(hidden_BLC, "erf")
    return ops.add(x_BLC, linear(hidden_BLC, layer.narrow))


def run_attention(attention: FusedAttention, x_BLC: Node, size: tuple[int, int], cls_only: bool) -> Node:
    cls_B1C, map_BLC = split_cls_token(x_BLC, attention.with_cls_token)
    map_BCHW = to_map(map_BLC, size)
    k_BSC = v_BSC = join_cls_token(cls_B1C, run_map(attention.map_key, map_BCHW, map_BLC, size))
    if attention.map_value is not None:
        v_BSC = join_cls_token(cls_B1C, run_map(attention.map_value, map_BCHW, map_BLC, size))
    q_BLC = cls_B1C
    if not cls_only:
        q_BLC = join_cls_token(cls_B1C, run_map(attention.map_query, map_BCHW, map_BLC, size))
    heads = attention.num_heads
    q_BNLD, k_BNSD, v_BNSD = (
        transpose(ops.reshape(x, ops.constant([0, 0, heads, -1], np.int64), True), HEADS_FIRST)
        for x in (
            linear(q_BLC, attention.query),
            linear(k_BSC, attention.key),
            linear(v_BSC, attention.value),
        )
    )
    scores_BNLS = ops.softmax(ops.matmul(q_BNLD, k_BNSD, False, True), -1)
    context_BLND = transpose(ops.matmul(scores_BNLS, v_BNSD, False, False), HEADS_FIRST)
    return ops.reshape(context_BLND, ops.constant([0, 0, -1], np.int64), True)


def run_map(module: nn.Module, map_BCHW: Node, map_BLC: Node, size: tuple[int, int]) -> Node:
    """What the map goes through before it becomes queries, keys or values, as tokens."""
    if isinstance(module, Convolution):
        return to_tokens(convolution(map_BCHW, module))
    if isinstance(module, nn.AvgPool2d):
        return to_tokens(average_pool(map_BCHW, module, size))
    return map_BLC


def average_pool(x_BCHW: Node, module: nn.AvgPool2d, size: tuple[int, int]) -> Node:
    """torch's pooling in ceil mode, as sums times a map of weights.

    OpenVINO's own pooling counts otherwise where the last window reaches beyond the padding.
    """
    geometry = (module.kernel_size, module.stride, module.padding)
    kernel, stride, padding = (int(n) for n in geometry)  # type: ignore[arg-type]
    spans = [window_spans(n, kernel, stride, padding) for n in size]
    ends = [max((len(s) - 1) * stride + kernel - padding - n, 0) for s, n in zip(spans, size, strict=True)]
    ones = np.ones((length(x_BCHW, 1), 1, 1, kernel, kernel), np.float32)
    sums_BCHW = ops.group_convolution(x_BCHW, ops.constant(ones), [stride] * 2, [padding] * 2, ends, [1, 1])
    shares_HW = 1 / np.outer(spans[0], spans[1])
    return ops.multiply(sums_BCHW, ops.constant(shares_HW[None, None].astype(np.float32)))


def window_spans(length: int, kernel: int, stride: int, padding: int) -> list[int]:
    """How many places of the padded axis each window of torch's ceil mode covers."""
    starts = range(-padding, length + 2 * padding, stride)
    count = -((kernel - length - 2 * padding) // stride) + 1
    return [min(start + kernel, length + padding) - start for start in starts[:count] if start < length]


def convolution(x_BCHW: Node, module: Convolution) -> Node:
    geometry = ([module.stride] * 2, [module.padding] * 2, [module.padding] * 2, [1, 1])
    kernel = module.weight.contiguous()
    if module.groups == 1:
        convolved = ops.convolution(x_BCHW, constant(kernel), *geometry)
    else:  # groups, outputs of each, inputs of each, height, width
        convolved = ops.group_convolution(x_BCHW, constant(kernel.unsqueeze(1)), *geometry)
    return ops.add(convolved, constant(module.bias[None, :, None, None]))


def convolved(length: int, module: Convolution) -> int:
    return (length + 2 * module.padding - module.weight.shape[-1]) // module.stride + 1


def linear(x_BLC: Node, module: Linear) -> Node:
    product = ops.matmul(x_BLC, constant(module.weight), False, True)
    return product if module.bias is None else ops.add(product, constant(module.bias))


def layer_norm(x_BLC: Node, module: LayerNorm) -> Node:
    normed = ops.mvn(x_BLC, ops.constant([-1], np.int64), True, NORM_EPS, "inside_sqrt")
    return ops.add(ops.multiply(normed, constant(module.weight)), constant(module.bias))


def to_tokens(x_BCHW: Node) -> Node:
    x_BHWC = transpose(x_BCHW, TO_PIXELS_LAST)
    return ops.reshape(x_BHWC, ops.constant([0, -1, length(x_BHWC, 3)], np.int64), True)


def to_map(x_BLC: Node, size: tuple[int, int]) -> Node:
    shape = ops.constant([0, *size, length(x_BLC, 2)], np.int64)
    return transpose(ops.reshape(x_BLC, shape, True), TO_MAP)


def split_cls_token(x_BLC: Node, with_cls_token: bool) -> tuple[Node | None, Node]:
    if not with_cls_token:
        return None, x_BLC
    parts = ops.variadic_split(x_BLC, 1, ops.constant([1, -1], np.int64))
    return parts.output(0), parts.output(1)


def join_cls_token(cls_B1C: Node | None, x_BLC: Node) -> Node:
    return x_BLC if cls_B1C is None else ops.concat([cls_B1C, x_BLC], 1)


def length(x: Node, axis: int) -> int:
    output = x if isinstance(x, ov.Output) else x.output(0)
    return int(output.get_partial_shape()[axis].get_length())


def transpose(x: Node, order: tuple[int, ...]) -> Node:
    return ops.transpose(x, ops.constant(list(order), np.int64))


def constant(tensor: Tensor) -> Node:
    return ov.op.Constant(tensor.detach().numpy(), shared_memory=True)


def named_result(node: Node, name: str) -> Node:
    result = ops.result(node, name=name)
    result.output(0).get_tensor().set_names({name})
    return result
