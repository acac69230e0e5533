"""What the output's own classifier said: its stored logits as probabilities.

Enters: rows of embeddings/. Leaves: probabilities (N, K). Runs no model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import InputError
from pipeline.fingerprint import Fingerprint
from pipeline.labelled_rows import matrix
from pipeline.labels.decide import Probabilities, softmax

METHOD = "head"
COLUMNS = ("label_id", "score", "logits", "top_ids", "top_logits")


def classes_of(fingerprint: Fingerprint, uri: str) -> list[str]:
    """The classifier's classes by their ids. Raises InputError where the model has no classifier."""
    named = {int(number): name for number, name in fingerprint.model_config.get("id2label", {}).items()}
    if not named:
        raise InputError(f"label.method: the model of {uri} has no classifier; use neighbours or probe")
    return [named.get(number, f"LABEL_{number}") for number in range(max(named) + 1)]


class Head:
    """Probabilities by the classifier, at a temperature."""

    method = METHOD
    columns = COLUMNS

    def __init__(self, classes: Sequence[str], temperature: float = 1.0) -> None:
        self.classes = tuple(classes)
        self._temperature = temperature

    def __call__(self, table: pa.Table, stem: str) -> Probabilities:
        """Probabilities (N, K); of what an output leaves out, nothing is made up: it is 0.

        They are 0 too of an image whose logits are not finite numbers.
        """
        with np.errstate(invalid="ignore"):
            p_NK = self._probabilities(table)
        p_NK[~np.isfinite(p_NK).all(axis=1)] = 0
        return p_NK

    def _probabilities(self, table: pa.Table) -> Probabilities:
        if "label_id" not in table.column_names:
            raise InputError("label.method: the output has no label columns; use neighbours or probe")
        if "logits" in table.column_names:
            return softmax(matrix(table.column("logits")), self._temperature)
        p_NK = np.zeros((table.num_rows, len(self.classes)), np.float32)
        rows = np.arange(table.num_rows)
        if "top_logits" in table.column_names:
            logits_NT = matrix(table.column("top_logits")).astype(np.float32)
            score = table.column("score").to_numpy()[:, None]
            # The best one's probability is of all classes, so that it gives the others theirs.
            p_NK[rows[:, None], matrix(table.column("top_ids"))] = (
                np.exp(logits_NT - logits_NT.max(axis=1, keepdims=True)) * score
            )
        else:
            p_NK[rows, table.column("label_id").to_numpy()] = table.column("score").to_numpy()
        return p_NK


def logits_of(table: pa.Table) -> npt.NDArray[np.float32] | None:
    """Every logit (N, K) of some rows; None where the output does not have them all."""
    if "logits" not in table.column_names:
        return None
    return matrix(table.column("logits")).astype(np.float32)
