"""Muon: momentum whose matrices are made orthogonal before they are applied.

Enters: the network's matrices and convolutions, with gradients. Leaves: the same, a step further. After
Keller Jordan's publication (kellerjordan.github.io/posts/muon). torch.optim.Muon takes no convolutions, and
always computes in bfloat16, which takes twenty times as long on processors that have none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """For parameters of two dimensions and more, which are seen as matrices (out, all else).

    `dtype` is what matrices are made orthogonal in; momentum and parameters keep their own.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply the gradients; a parameter without one stays as it is."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                remembered = state["momentum"].lerp_(parameter.grad, 1 - momentum)
                looked_ahead = parameter.grad.lerp(remembered, momentum).flatten(1)
                update = orthogonal(looked_ahead.to(self._dtype)).to(parameter.dtype)
                rows, columns = update.shape
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_(update.view_as(parameter), alpha=-rate * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrix_MN: Tensor) -> Tensor:
    """About the orthogonal matrix nearest to this one: singular values near 1, by Newton and Schulz."""
    a, b, c = COEFFICIENTS
    tall = matrix_MN.shape[0] > matrix_MN.shape[1]
    x_MN = matrix_MN.mT if tall else matrix_MN
    x_MN = x_MN / (x_MN.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram_MM = x_MN @ x_MN.mT
        gram_MM = torch.addmm(gram_MM, gram_MM, gram_MM, beta=b, alpha=c)
        x_MN = torch.addmm(x_MN, gram_MM, x_MN, beta=a)
    return (x_MN.mT if tall else x_MN).contiguous()
