"""What a network says of the validation images, by all workers together.

Enters: prepared pixels and a network in eval mode. Leaves: loss, accuracy and what was said of each image.
Shape suffixes: B batch, K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pipeline.finetune.sample_set import SampleSet
from pipeline.finetune.together import Share, gather

BATCH = 128


@dataclass(frozen=True)
class Verdict:
    """The outcome for all validation images, in their order."""

    loss: float
    labels: Tensor  # int32 (images,)
    said: Tensor  # the most probable class, int32 (images,)
    confidence: Tensor  # its probability, float32 (images,)
    in_top5: Tensor  # whether the label is among the five most probable, bool (images,)

    @property
    def accuracy(self) -> float:
        return float((self.said == self.labels).double().mean())

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {
            "labels": self.labels,
            "classes": self.said,
            "confidence": self.confidence,
            "in_top5": self.in_top5,
        }


class Judge:
    """Runs networks over the validation images; each worker takes a part of them."""

    def __init__(
        self,
        samples: SampleSet,
        share: Share,
        normalize: Callable[[Tensor], Tensor],
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    ) -> None:
        self._samples, self._normalize, self._autocast = samples, normalize, autocast
        self._mine = np.array_split(np.arange(len(samples)), share.num_workers)[share.rank].tolist()

    @torch.inference_mode()
    def __call__(self, model: nn.Module) -> Verdict:
        rows: list[tuple[int, int, float, bool, float]] = []
        for begin in range(0, len(self._mine), BATCH):
            rows += self._batch(model, self._mine[begin : begin + BATCH])
        labels, said, confidence, in_top5, losses = zip(*gather(rows), strict=True)
        return Verdict(
            float(np.mean(losses)),
            torch.tensor(labels, dtype=torch.int32),
            torch.tensor(said, dtype=torch.int32),
            torch.tensor(confidence, dtype=torch.float32),
            torch.tensor(in_top5, dtype=torch.bool),
        )

    def _batch(self, model: nn.Module, numbers: list[int]) -> list[tuple[int, int, float, bool, float]]:
        cells = [np.frombuffer(self._samples.data(number), np.uint8) for number in numbers]
        side = round((len(cells[0]) // 3) ** 0.5)
        x_BCHW = self._normalize(torch.from_numpy(np.stack(cells).reshape(-1, side, side, 3)))
        with self._autocast():
            (logits_BK,) = model(x_BCHW, return_dict=False)
        logits_BK = logits_BK.float().cpu()
        labels_B = torch.from_numpy(self._samples.labels[numbers]).long()
        best_BK = logits_BK.topk(min(5, logits_BK.shape[1])).indices
        confidence_B = logits_BK.softmax(1).max(1).values
        return list(
            zip(
                labels_B.tolist(),
                best_BK[:, 0].tolist(),
                confidence_B.tolist(),
                (best_BK == labels_B[:, None]).any(1).tolist(),
                F.cross_entropy(logits_BK, labels_B, reduction="none").tolist(),
                strict=True,
            )
        )
