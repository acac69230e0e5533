"""How good labels are: accuracy by class, and whether probabilities mean what they say.

Enters: NumPy arrays of labels, of what was said and of its probability. Leaves: plain values for a report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BINS = 15
MOST_CONFUSED = 100  # classes of a confusion matrix that is written out

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Calibration:
    """The expected calibration error, and the bins it is made of: (images, mean probability, accuracy)."""

    error: float
    bins: tuple[tuple[int, float, float], ...]


def calibration(confidence: Floats, correct: Flags, num_bins: int = BINS) -> Calibration:
    """Expected calibration error of top-1 (Guo et al. 2017, arXiv 1706.04599), in bins of equal width.

    `confidence` is the probability of what was said (images,), `correct` whether it was right (images,).
    """
    places = np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    count = np.bincount(places, minlength=num_bins)
    total = np.bincount(places, weights=confidence, minlength=num_bins)
    right = np.bincount(places, weights=correct, minlength=num_bins)
    filled = np.maximum(count, 1)
    gap = np.abs(total / filled - right / filled)
    error = float((gap * count).sum() / max(1, count.sum()))
    bins = zip(count.tolist(), (total / filled).tolist(), (right / filled).tolist(), strict=True)
    return Calibration(error, tuple(bins))


def per_class(labels: Ids, said: Ids, names: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall and F1 of each class; None where a class was never said, or has no image.

    A negative number in `said` stands for none of the classes.
    """
    actual = np.bincount(labels, minlength=len(names))
    claimed = np.bincount(said[said >= 0], minlength=len(names))
    right = np.bincount(labels[labels == said], minlength=len(names))
    rows = []
    for number, name in enumerate(names):
        hits, support, times = int(right[number]), int(actual[number]), int(claimed[number])
        rows.append(
            {
                "class": name,
                "images": support,
                "precision": hits / times if times else None,
                "recall": hits / support if support else None,
                "f1": 2 * hits / (support + times) if support + times else None,
            }
        )
    return rows


def class_order(labels: set[str]) -> list[str]:
    """Labels in the order of their class ids: numbers by value, else by the alphabet."""
    if all(label.isdecimal() for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def confusion(labels: Ids, said: Ids, num_classes: int) -> list[list[int]] | None:
    """Images by their label (rows) and by what was said of them (columns); None of too many classes."""
    if num_classes > MOST_CONFUSED:
        return None
    counts = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(counts, (labels, said), 1)
    rows: list[list[int]] = counts.tolist()
    return rows
