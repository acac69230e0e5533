"""Several processes that train as one would: shared statistics, the same random numbers, one decision.

Enters: torch.distributed's group, where there is one. What a batch gives must not follow from how many
processes share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cvt_model.layers import DropPath


@dataclass(frozen=True)
class Share:
    """Which part of every batch a worker takes."""

    rank: int
    num_workers: int

    def of(self, batch_size: int) -> slice:
        each = batch_size // self.num_workers
        return slice(self.rank * each, (self.rank + 1) * each)


class _NormalizeTogether(torch.autograd.Function):
    """Normalisation by the mean and variance of all processes' maps, by torch's own passes over memory.

    Only a channel's sums travel: two forwards, and two backwards.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The maps normalised, in their own precision; their mean and variance."""
        channels = x_BCHW.shape[1]
        count = x_BCHW.numel() // channels
        mean_C, variance_C = torch.zeros_like(weight_C), torch.zeros_like(weight_C)
        if count > 1:
            torch.batch_norm_update_stats(x_BCHW, mean_C, variance_C, 1.0)
            variance_C *= (count - 1) / count
        else:
            mean_C.copy_(x_BCHW.flatten())
        mine_2C = torch.stack((mean_C, variance_C)).double()
        mine_2C[1] += mine_2C[0].square()
        mean_C, square_C = sum_over_all(mine_2C) / dist.get_world_size()
        variance_C = (square_C - mean_C.square()).clamp(min=0).float()
        mean_C = mean_C.float()
        y_BCHW = torch.native_batch_norm(x_BCHW, weight_C, bias_C, mean_C, variance_C, False, 0.0, eps)[0]
        ctx.save_for_backward(x_BCHW, weight_C, mean_C, variance_C)
        ctx.eps, ctx.count = eps, count * dist.get_world_size()
        ctx.mark_non_differentiable(mean_C, variance_C)
        return y_BCHW, mean_C, variance_C

    @staticmethod
    def backward(ctx: Any, given_BCHW: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """The gradients of the maps, and this process's share of the weight's and the bias's."""
        x_BCHW, weight_C, mean_C, variance_C = ctx.saved_tensors
        # As if mean and variance were given, and then what follows from their being of these maps.
        gradient_BCHW, weight_gradient_C, bias_gradient_C = torch.ops.aten.native_batch_norm_backward(
            *(given_BCHW, x_BCHW, weight_C, mean_C, variance_C, None, None, False, ctx.eps),
            [True, True, True],
        )
        all_2C = sum_over_all(torch.stack((weight_gradient_C, bias_gradient_C))) / ctx.count
        along_C, level_C = all_2C * weight_C * torch.rsqrt(variance_C + ctx.eps)
        gradient_BCHW -= torch.native_batch_norm(
            x_BCHW, along_C, level_C, mean_C, variance_C, False, 0.0, ctx.eps
        )[0]
        return gradient_BCHW, weight_gradient_C, bias_gradient_C, None


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over the batch of all processes, for CPUs: torch's SyncBatchNorm needs a GPU.

    Every process has as many images. Shape suffixes: B batch, C channels, H, W of the map.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x_BCHW)
        y_BCHW: Tensor
        y_BCHW, mean_C, variance_C = _NormalizeTogether.apply(x_BCHW, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        count = x_BCHW.numel() // x_BCHW.shape[1] * dist.get_world_size()
        self._remember(mean_C, variance_C * count / max(1, count - 1))
        return y_BCHW

    @torch.no_grad()
    def _remember(self, mean_C: Tensor, variance_C: Tensor) -> None:
        for remembered, fresh in ((self.running_mean, mean_C), (self.running_var, variance_C)):
            assert remembered is not None, "the network's batch norms remember what they saw"
            remembered.lerp_(fresh, self.momentum or 0.0)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1


def share_statistics(model: nn.Module, device: torch.device) -> None:
    """Have the batch norms of a model to be trained on `device` see the batch of all processes."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                shared = SharedBatchNorm2d(child.num_features, child.eps, child.momentum)
                shared.load_state_dict(child.state_dict())
                setattr(parent, name, shared)


class Chances:
    """The random numbers of stochastic depth, the same for an image whoever computes it."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self._layers = [layer for layer in model.modules() if isinstance(layer, DropPath) and layer.rate]
        self._seed = seed

    def draw(self, step: int, batch_size: int) -> Tensor:
        """Numbers (layers, 2, batch_size) for the whole batch of a step: a layer has two branches."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        return torch.rand(len(self._layers), 2, batch_size, generator=generator)

    def set(self, chances: Tensor) -> None:
        """Use these columns, for the images that are computed next."""
        for number, layer in enumerate(self._layers):
            layer.chances = iter(chances[number])


def sum_over_all(values: Tensor) -> Tensor:
    """The sum of `values` over all processes."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def gather(values: list[Any]) -> list[Any]:
    """The lists of all processes, one after the other by rank."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return values
    gathered: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, values)
    return [value for part in gathered for value in part]
