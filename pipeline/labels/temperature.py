"""Temperature scaling: probabilities that mean what they say (Guo et al. 2017, arXiv 1706.04599).

Enters: logits of labelled rows. Leaves: one number, and how much better it is on rows that it was not
fitted on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.labels.decide import softmax
from pipeline.quality import Ids, calibration

BOUNDS = (0.05, 20.0)
LEAST_ROWS = 20

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Calibrated:
    """A temperature, and the calibration error without and with it, of rows that it was not fitted on."""

    temperature: float
    rows: int
    error_before: float
    error_after: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(logits_NK: Logits, label_N: Ids, seed: int) -> Calibrated:
    """The temperature with the least cross-entropy of all rows; errors by halves, each of the other's."""
    halves = np.random.default_rng(seed).permutation(len(label_N)) % 2
    confidence = np.empty((2, len(label_N)), np.float32)
    for half in (0, 1):
        judged = halves == half
        fitted = fit_temperature(logits_NK[~judged], label_N[~judged])
        confidence[0, judged] = softmax(logits_NK[judged]).max(axis=1)
        confidence[1, judged] = softmax(logits_NK[judged], fitted).max(axis=1)
    correct = logits_NK.argmax(axis=1) == label_N
    before, after = (calibration(row, correct).error for row in confidence)
    return Calibrated(fit_temperature(logits_NK, label_N), len(label_N), before, after)


def fit_temperature(logits_NK: Logits, label_N: Ids) -> float:
    """The temperature between 0.05 and 20 with the least mean cross-entropy."""
    from scipy.optimize import minimize_scalar

    rows = np.arange(len(label_N))
    shifted = logits_NK - logits_NK.max(axis=1, keepdims=True)

    def cross_entropy(log_temperature: float) -> float:
        scaled = shifted / np.exp(log_temperature)
        return float((np.log(np.exp(scaled).sum(axis=1)) - scaled[rows, label_N]).mean())

    found = minimize_scalar(cross_entropy, bounds=tuple(np.log(BOUNDS)), method="bounded")
    return float(np.exp(found.x))
