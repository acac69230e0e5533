"""Probabilities to labels: coarser classes, thresholds, the next best.

Enters: probabilities (N, K). Leaves: columns of a version's labels. Knows no files.
Shape suffixes: N rows, K classes, G labels after the map to coarser ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.schema import IMAGE_ID, LABELS

UNKNOWN = "unknown"
UNKNOWN_ID = -1

Probabilities = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rule:
    """How probabilities of classes become labels; `Rule.of` makes one."""

    labels: tuple[str, ...]  # G
    group_K: npt.NDArray[np.int64]  # the label that each class belongs to
    threshold_G: npt.NDArray[np.float32]

    @classmethod
    def of(
        cls,
        classes: Sequence[str],
        coarser: Mapping[str, str],
        threshold: float,
        thresholds: Mapping[str, float],
    ) -> Rule:
        """The rule for these classes. Raises ConfigError for a name that is none of them."""
        _check("label.coarser", coarser, classes)
        names = [coarser.get(name, name) for name in classes] if coarser else list(classes)
        labels = tuple(dict.fromkeys(names)) if coarser else tuple(names)  # a head may have a name twice
        place = {name: number for number, name in enumerate(labels)}
        groups = [place[name] for name in names] if coarser else range(len(names))
        _check("label.thresholds", thresholds, labels)
        least = [thresholds.get(name, threshold) for name in labels]
        return cls(labels, np.array(groups, np.int64), np.array(least, np.float32))

    def columns(self, image_ids: pa.Array, probabilities_NK: Probabilities, method: str) -> pa.Table:
        """Rows of LABELS. A row without any probability is unknown, with a score of 0."""
        p_NG = self._grouped(probabilities_NK)
        rows = np.arange(len(p_NG))
        best = p_NG.argmax(axis=1)
        score = p_NG[rows, best]
        rest_NG = p_NG.copy()
        rest_NG[rows, best] = -1
        second = rest_NG.argmax(axis=1)
        next_score = rest_NG[rows, second]
        known = (score > 0) & (score >= self.threshold_G[best])
        names = np.array([*self.labels, UNKNOWN], dtype=object)
        runner_up = np.where(known, second, best)
        has_next = np.where(known, next_score > 0, score > 0)
        columns = {
            IMAGE_ID: image_ids,
            "label": pa.array(names[np.where(known, best, len(self.labels))], pa.string()),
            "label_id": pa.array(np.where(known, best, UNKNOWN_ID), pa.int32()),
            "score": pa.array(score, pa.float32()),
            "margin": pa.array(score - next_score, pa.float32(), mask=next_score <= 0),
            "runner_up": pa.array(names[runner_up], pa.string(), mask=~has_next),
            "method": pa.array([method] * len(rows), pa.string()),
        }
        return pa.table(columns, LABELS)

    def _grouped(self, p_NK: Probabilities) -> Probabilities:
        """Probabilities of labels: the sums of their classes'."""
        if len(self.labels) == p_NK.shape[1]:  # groups of one, in their order
            return p_NK
        order = np.argsort(self.group_K, kind="stable")
        starts = np.searchsorted(self.group_K[order], np.arange(len(self.labels)))
        return np.add.reduceat(p_NK[:, order], starts, axis=1)


def _check(key: str, given: Mapping[str, object], known: Sequence[str]) -> None:
    unknown = [name for name in given if name not in set(known)]
    if unknown:
        some = ", ".join(list(dict.fromkeys(known))[:10]) + (", …" if len(set(known)) > 10 else "")
        raise ConfigError(f"{key}: there is no class {', '.join(unknown[:5])}; the classes are {some}")


def softmax(logits_NK: npt.NDArray[np.floating], temperature: float = 1.0) -> Probabilities:
    """Probabilities (N, K) of logits, in float32."""
    scaled = logits_NK.astype(np.float32) / np.float32(temperature)
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    probabilities: Probabilities = powers / powers.sum(axis=1, keepdims=True)
    return probabilities
