"""Several processes that train as one would: shared statistics, the same random numbers, one decision.

Enters: torch.distributed's group, where there is one. What a batch gives must not follow from how many
processes share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
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


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over the batch of all processes, on any device.

    torch's own SyncBatchNorm needs a GPU. Shape suffixes: B batch, C channels, H, W of the map.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x_BCHW)
        x_BCHW = x_BCHW.float()
        mine_2C = torch.stack((x_BCHW.sum((0, 2, 3)), x_BCHW.square().sum((0, 2, 3))))
        sums_2C: Tensor = dist_nn.all_reduce(mine_2C)  # type: ignore[no-untyped-call]
        count = x_BCHW.numel() // x_BCHW.shape[1] * dist.get_world_size()
        mean_C, square_C = sums_2C / count
        variance_C = (square_C - mean_C.square()).clamp(min=0)
        self._remember(mean_C.detach(), variance_C.detach() * count / max(1, count - 1))
        scale_C = torch.rsqrt(variance_C + self.eps) * self.weight
        offset_C = self.bias - mean_C * scale_C
        y_BCHW: Tensor = x_BCHW * scale_C[:, None, None] + offset_C[:, None, None]
        return y_BCHW

    @torch.no_grad()
    def _remember(self, mean_C: Tensor, variance_C: Tensor) -> None:
        for remembered, fresh in ((self.running_mean, mean_C), (self.running_var, variance_C)):
            assert remembered is not None, "the network's batch norms remember what they saw"
            remembered.lerp_(fresh, self.momentum or 0.0)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1


def share_statistics(model: nn.Module) -> None:
    """Have the batch norms of `model` see the batch of all processes."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                shared = SharedBatchNorm2d(child.num_features, child.eps, child.momentum)
                shared.load_state_dict(child.state_dict())
                setattr(parent, name, shared.to(child.weight.device))


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
