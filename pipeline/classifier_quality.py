"""What an output's classifier said of its labelled images, held against their labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.commits import CommitLog
from pipeline.labelled_rows import NO_CLASS, VECTOR_ROWS, matrix, tables
from pipeline.quality import Flags, Floats, Ids, calibration, confusion

TOP = 5


@dataclass(frozen=True)
class Classifier:
    """What a classifier said of the labelled images (N,)."""

    said: Ids  # NO_CLASS where no image has that class
    confidence: Floats
    in_top5: Flags | None  # None where fewer candidates than that were kept of each image


def ask_classifier(
    log: CommitLog, label: Ids, class_of_id: dict[int, int], num_ids: int
) -> Classifier | None:
    """What the output's columns say of the labelled images; None where there are no such columns.

    The classifier has `num_ids` classes, of which `class_of_id` names those that images have.
    """
    size = max(class_of_id) + 2
    translated = np.full(size, NO_CLASS, np.int32)
    translated[list(class_of_id)] = list(class_of_id.values())

    def classes_of(ids: npt.NDArray[Any]) -> Ids:
        # The last place stands for classes that no image has.
        return cast(Ids, translated[np.minimum(ids, size - 1)])

    parts: list[tuple[Ids, Floats, Flags]] = []
    seen, kept = 0, TOP
    for _, table in tables(log, ("label_id", "score", "logits", "top_ids"), VECTOR_ROWS):
        if "label_id" not in table.column_names:
            return None
        mine = label[seen : seen + table.num_rows]
        seen += table.num_rows
        table = table.filter(pa.array(mine != NO_CLASS))
        said = table.column("label_id").to_numpy()
        best = said[:, None]
        if "logits" in table.column_names:
            best = np.argsort(-matrix(table.column("logits")), axis=1, kind="stable")[:, :TOP]
        elif "top_ids" in table.column_names:
            best = matrix(table.column("top_ids"))[:, :TOP]
        kept = min(kept, best.shape[1])
        in_top5 = (classes_of(best) == mine[mine != NO_CLASS, None]).any(axis=1)
        parts.append((classes_of(said), table.column("score").to_numpy(), in_top5))
    said, confidence, in_top5 = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Classifier(said, confidence, in_top5 if kept >= min(TOP, num_ids) else None)


def classifier_values(label: Ids, classifier: Classifier | None, classes: list[str]) -> dict[str, Any]:
    if classifier is None:
        return dict.fromkeys(
            ("top1", "top5", "calibration_error", "calibration_bins", "confusion", "said_otherwise")
        )
    right = classifier.said == label
    calibrated = calibration(classifier.confidence, right)
    inside = classifier.said != NO_CLASS
    return {
        "top1": float(right.mean()),
        "top5": None if classifier.in_top5 is None else float(classifier.in_top5.mean()),
        "calibration_error": calibrated.error,
        "calibration_bins": calibrated.bins,
        "confusion": confusion(label[inside], classifier.said[inside], len(classes)),
        "said_otherwise": np.bincount(label[~inside], minlength=len(classes)).tolist(),
    }
