"""How good a probe is, by rows that it was not trained on.

Enters: labelled embeddings (N, D). Leaves: probabilities by cross-validation, accuracies with confidence
intervals, a learning curve. Knows no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.errors import InputError
from pipeline.labels.decide import Probabilities, softmax
from pipeline.labels.probe import Linear, Matrix, train
from pipeline.quality import Ids, per_class

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)  # inverse regularisation, of standardised embeddings
CURVE = (0.05, 0.1, 0.2, 0.5, 1.0)  # shares of the labelled rows that the learning curve trains on
COMPARED_ROWS = 3000  # when strengths are compared
ALWAYS_TRAINED = -1
_Z = 1.96  # of a 95 % confidence interval


def check_labelled(label_N: Ids, where: str) -> None:
    """Raise InputError unless a probe can be trained and judged."""
    counts = np.bincount(label_N)
    if (counts > 0).sum() < 2:
        raise InputError(
            f"label.labels: {where} has labels of fewer than two classes; label some of another"
        )
    if counts.max() < 2:
        raise InputError(
            f"label.labels: {where} has one image of each class alone; a probe is judged on images that it "
            "was not trained on, so label two or more of some classes"
        )


def fold_of(label_N: Ids, folds: int, seed: int) -> Ids:
    """The part of the cross-validation that each row is judged in, each with its share of every class.

    Rows of a class that has a single one are always trained on, and never judged.
    """
    fold_N = np.full(len(label_N), ALWAYS_TRAINED, np.int32)
    rng = np.random.default_rng(seed)
    for number in np.unique(label_N):
        rows = rng.permutation(np.flatnonzero(label_N == number))
        if len(rows) > 1:
            fold_N[rows] = (np.arange(len(rows)) + rng.integers(folds)) % folds
    return fold_N


def cross_validated(
    vectors_ND: Matrix, label_N: Ids, fold_N: Ids, num_classes: int, strength: float
) -> tuple[Probabilities, dict[int, Linear]]:
    """Probabilities (N, K) of each row by a probe that has not seen it, and the probe of each fold.

    Nothing for rows that are never judged.
    """
    p_NK = np.zeros((len(label_N), num_classes), np.float32)
    probes = {}
    for fold in np.unique(fold_N[fold_N != ALWAYS_TRAINED]).tolist():
        judged = fold_N == fold
        probes[fold] = weight_KD, bias_K = train(
            vectors_ND[~judged], label_N[~judged], num_classes, strength
        )
        p_NK[judged] = softmax(vectors_ND[judged] @ weight_KD.T + bias_K)
    return p_NK, probes


def choose_strength(vectors_ND: Matrix, label_N: Ids, fold_N: Ids, num_classes: int, seed: int) -> float:
    """The strength with the least cross-entropy of rows that are judged.

    Strengths are compared on a few thousand rows, whatever their number.
    """
    some = np.random.default_rng(seed).permutation(len(label_N))[:COMPARED_ROWS]
    vectors_ND, label_N, fold_N = vectors_ND[some], label_N[some], fold_N[some]
    judged = np.flatnonzero(fold_N != ALWAYS_TRAINED)
    losses = []
    for strength in STRENGTHS:
        p_NK, _ = cross_validated(vectors_ND, label_N, fold_N, num_classes, strength)
        losses.append(-np.log(np.maximum(p_NK[judged, label_N[judged]], 1e-12)).sum())
    return STRENGTHS[int(np.argmin(losses))]


def learning_curve(
    vectors_ND: Matrix, label_N: Ids, fold_N: Ids, num_classes: int, strength: float, seed: int
) -> list[dict[str, Any]]:
    """Accuracy by how many rows are trained on: what more labels would bring."""
    rng = np.random.default_rng(seed)
    points = []
    for share in CURVE:
        sizes, right, total = [], 0, 0
        for fold in np.unique(fold_N[fold_N != ALWAYS_TRAINED]):
            judged = fold_N == fold
            rows = rng.permutation(np.flatnonzero(~judged))
            some = rows[: round(share * len(rows))]
            if len(np.unique(label_N[some])) < 2:
                continue
            weight_KD, bias_K = train(vectors_ND[some], label_N[some], num_classes, strength)
            said = (vectors_ND[judged] @ weight_KD.T + bias_K).argmax(axis=1)
            sizes.append(len(some))
            right += int((said == label_N[judged]).sum())
            total += int(judged.sum())
        if total:
            low, high = interval(right, total)
            mean = round(sum(sizes) / len(sizes))
            points.append({"labels": mean, "accuracy": right / total, "low": low, "high": high})
    return points


def interval(right: int, total: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson 1927)."""
    if not total:
        return 0.0, 1.0
    share, spread = right / total, _Z**2 / total
    centre = (share + spread / 2) / (1 + spread)
    width = _Z * (share * (1 - share) / total + spread / (4 * total)) ** 0.5 / (1 + spread)
    return max(0.0, centre - width), min(1.0, centre + width)


def judge(p_NK: Probabilities, label_N: Ids, fold_N: Ids, classes: Sequence[str]) -> dict[str, Any]:
    """Accuracy of cross-validated probabilities, over all and by class, with confidence intervals."""
    judged = fold_N != ALWAYS_TRAINED
    label, said = label_N[judged], p_NK[judged].argmax(axis=1).astype(np.int32)
    right = int((label == said).sum())
    low, high = interval(right, len(label))
    rows = per_class(label, said, classes)
    for row in rows:
        hits = round((row["recall"] or 0) * row["images"])
        row["recall_low"], row["recall_high"] = interval(hits, row["images"])
    return {
        "judged": len(label),
        "accuracy": right / max(1, len(label)),
        "accuracy_low": low,
        "accuracy_high": high,
        "per_class": rows,
    }
