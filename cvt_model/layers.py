"""Small parts of the network that the paper takes for granted: an activation, stochastic depth, shapes.

What enters and leaves: tensors. It must not know the network or its config. Shape suffixes are those
of `model.py`.
"""

from collections import OrderedDict
from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

FEW_KEYS = 64


class QuickGELU(nn.Module):
    """The original authors' activation, an approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class DepthwiseConv2d(nn.Conv2d):
    """A convolution of each channel by itself, without bias."""

    def __init__(self, width: int, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__(width, width, kernel_size, stride, padding, groups=width, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Convolve; on CPUs strides are taken in float32 where others compute in bfloat16.

        There the gradients of a depthwise convolution with a stride take 20 times as long in bfloat16
        (torch 2.13, oneDNN: 114 to 4.3 ms for 256 maps of 64 x 16 x 16).
        """
        if self.stride == (1, 1) or x_BCHW.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(x_BCHW)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x_BCHW.float())


class DropPath(nn.Module):
    """Stochastic depth: in training, drops a residual branch of whole samples, and scales up the rest.

    A sample is dropped where its chance (B,), uniform from 0 to 1, is under the rate. Who wants to repeat a
    step sets `chances` before it, one tensor for each call; else they are drawn.
    """

    chances: Iterator[Tensor] | None = None

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x_BLC: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x_BLC
        if self.chances is None:
            chances_B = torch.rand(x_BLC.shape[0], device=x_BLC.device)
        else:
            chances_B = next(self.chances)
        kept_B = (chances_B >= self.rate).to(x_BLC) / (1.0 - self.rate)
        return x_BLC * kept_B[:, None, None]


def attend(q_BNLD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor, scale: float, drop_rate: float) -> Tensor:
    """Attention of queries to keys and values.

    With few keys the gradients of plain products take two thirds of the time on CPUs; with many, torch's
    own attention is twice as fast, and takes no memory for the weights.
    """
    trains = torch.is_grad_enabled() and q_BNLD.requires_grad
    if trains and q_BNLD.device.type == "cpu" and k_BNSD.shape[2] <= FEW_KEYS and not drop_rate:
        return ((q_BNLD * scale) @ k_BNSD.transpose(2, 3)).softmax(dim=3) @ v_BNSD
    return F.scaled_dot_product_attention(q_BNLD, k_BNSD, v_BNSD, dropout_p=drop_rate, scale=scale)


def named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def to_tokens(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.flatten(2).transpose(1, 2)


def to_map(x_BLC: Tensor, height: int, width: int) -> Tensor:
    batch, _, channels = x_BLC.shape
    return x_BLC.transpose(1, 2).reshape(batch, channels, height, width)


def split_cls_token(x_BLC: Tensor, with_cls_token: bool) -> tuple[Tensor | None, Tensor]:
    return (x_BLC[:, :1], x_BLC[:, 1:]) if with_cls_token else (None, x_BLC)


def join_cls_token(cls_B1C: Tensor | None, x_BLC: Tensor) -> Tensor:
    return x_BLC if cls_B1C is None else torch.cat((cls_B1C, x_BLC), dim=1)
