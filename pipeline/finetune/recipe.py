"""The recipe's arithmetic: which weights decay, how the rate moves, how weights and images are mixed.

Enters: numbers and tensors. Leaves: the same. Knows no files, no processes.
Shape suffixes: B batch, C channels, H, W height and width, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pipeline.finetune.config import AugmentConfig, TrainConfig
from pipeline.finetune.muon import Muon


@dataclass(frozen=True)
class Schedule:
    """A training's length, and the learning rate of each step: a linear rise, then half a cosine."""

    total_steps: int
    warmup_steps: int
    peak: float
    floor: float

    @classmethod
    def of(cls, train: TrainConfig, num_samples: int) -> Schedule:
        steps_per_epoch = num_samples / train.batch_size
        total = max(1, math.ceil(train.epochs * steps_per_epoch))
        warmup = min(total, round(train.warmup_epochs * steps_per_epoch))
        floor = min(train.min_learning_rate, train.learning_rate)
        return cls(total, warmup, train.learning_rate, floor)

    def rate(self, step: int) -> float:
        """The learning rate of a step, the first being 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        share = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.floor + (self.peak - self.floor) * (1 + math.cos(math.pi * share)) / 2


def make_optimizers(
    model: nn.Module, train: TrainConfig, dtype: torch.dtype = torch.float32
) -> dict[str, torch.optim.Optimizer]:
    """The optimizers by name, over what learns; norms, biases and CLS tokens do not decay.

    Muon, where it is asked for, takes the matrices and the convolutions, without the classifier (which ends
    in classes, not in features) and the depth-wise convolutions (which are no matrices); `dtype` is what it
    computes in.
    """
    orthogonal: list[nn.Parameter] = []
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim > 1 and not name.endswith("cls_token")
        matrix = plain and parameter.shape[1] > 1 and not name.startswith("classifier.")
        if train.optimizer == "muon" and matrix:
            orthogonal.append(parameter)
        else:
            (decaying if plain else others).append(parameter)
    groups = [
        {"params": decaying, "weight_decay": train.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizers: dict[str, torch.optim.Optimizer] = {
        "adamw": torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas, fused=True)
    }
    if orthogonal:
        optimizers["muon"] = Muon(orthogonal, train.muon_learning_rate, train.weight_decay, dtype=dtype)
    return optimizers


def set_rates(optimizers: Mapping[str, torch.optim.Optimizer], rate: float, train: TrainConfig) -> None:
    """Give AdamW this learning rate, and Muon the same share of its own."""
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            scale = train.muon_learning_rate / train.learning_rate if name == "muon" else 1.0
            group["lr"] = rate * scale


class Average:
    """An exponential moving average of a network's weights and statistics."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after a step, the first being 0; the first steps count for more."""
        weight = 1 - min(self._decay, (1 + step) / (10 + step))
        averaged, fresh = [], []
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                averaged.append(self.state[name])
                fresh.append(value)
            else:
                self.state[name].copy_(value)
        torch._foreach_lerp_(averaged, fresh, weight)


def interpolate(
    begun: Mapping[str, Tensor], trained: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """Weights and statistics on the line between two networks, `share` of the way; the latter's counts."""
    return {
        name: begun[name].lerp(value, share) if value.is_floating_point() else value
        for name, value in trained.items()
    }


class Mix(NamedTuple):
    """How the pairs of a batch are mixed: `kept` is the share of an image's own, 1 where none is."""

    kept: float
    box: tuple[int, int, int, int] | None = None  # top, bottom, left, right of what cutmix exchanges


NO_MIX = Mix(1.0)


def draw_mix(augment: AugmentConfig, size: int, rng: np.random.Generator) -> Mix:
    """Mixup, cutmix or neither, for one batch (arXiv 1710.09412, 1905.04899, as DeiT combines them)."""
    alphas = [alpha for alpha in (augment.mixup, augment.cutmix) if alpha]
    if not alphas or rng.random() >= augment.mix_probability:
        return NO_MIX
    cut = bool(augment.cutmix) and (not augment.mixup or rng.random() < 0.5)
    alpha = augment.cutmix if cut else augment.mixup
    kept = float(rng.beta(alpha, alpha))
    if not cut:
        return Mix(kept)
    side = round(size * math.sqrt(1 - kept))
    y, x = rng.integers(size, size=2)
    top, left = max(0, int(y) - side // 2), max(0, int(x) - side // 2)
    bottom, right = min(size, int(y) - side // 2 + side), min(size, int(x) - side // 2 + side)
    return Mix(1 - (bottom - top) * (right - left) / size**2, (top, bottom, left, right))


def mix_pairs(x_BCHW: Tensor, mix: Mix) -> Tensor:
    """Each image mixed with its neighbour, the first with the second, the third with the fourth…"""
    if mix.kept == 1:
        return x_BCHW
    if mix.box is None:
        return x_BCHW.lerp(swap_pairs(x_BCHW), 1 - mix.kept)
    top, bottom, left, right = mix.box
    mixed_BCHW = x_BCHW.clone()
    mixed_BCHW[:, :, top:bottom, left:right] = swap_pairs(x_BCHW[:, :, top:bottom, left:right])
    return mixed_BCHW


def swap_pairs(x_B: Tensor) -> Tensor:
    """Neighbours exchanged; B must be even."""
    return x_B.reshape(-1, 2, *x_B.shape[1:]).flip(1).reshape(x_B.shape)


def mixed_loss(logits_BK: Tensor, labels_B: Tensor, mix: Mix, label_smoothing: float) -> Tensor:
    """The mean cross-entropy with the labels of both images, by their shares."""
    loss = F.cross_entropy(logits_BK, labels_B, label_smoothing=label_smoothing)
    if mix.kept == 1:
        return loss
    other = F.cross_entropy(logits_BK, swap_pairs(labels_B), label_smoothing=label_smoothing)
    return mix.kept * loss + (1 - mix.kept) * other


def clip_gradients(parameters: Iterable[nn.Parameter], most: float | None) -> None:
    """Scale all gradients down where their norm is over `most`."""
    if most is not None:
        torch.nn.utils.clip_grad_norm_(parameters, most)
