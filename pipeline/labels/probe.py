"""A linear probe: a classifier on embeddings, trained on a labelled few.

Enters: embeddings (N, D) with classes. Leaves: weights, saved as safetensors, so that nothing is ever
unpickled. How good they are is told by cross_validation.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pipeline.errors import FingerprintError, InputError
from pipeline.labelled_rows import matrix
from pipeline.labels.decide import Probabilities, softmax
from pipeline.quality import Ids

METHOD = "probe"
SOLVER = {"max_iter": 300, "tol": 1e-3}
_NEVER = -1e4  # a logit
_HEADER = "cvt-pipeline"

Matrix = npt.NDArray[np.float32]
Linear = tuple[Matrix, Matrix]
"""A weight (K, D) and a bias (K,)."""


@dataclass(frozen=True)
class Probe:
    """Probabilities by a linear map of the embedding; callable on rows as every method of labelling is."""

    weight_KD: Matrix
    bias_K: Matrix
    classes: tuple[str, ...]
    fingerprint: str

    method = METHOD
    columns = ("embedding",)

    def __call__(self, table: pa.Table, stem: str) -> Probabilities:
        return self.probabilities(matrix(table.column("embedding")).astype(np.float32))

    def probabilities(self, vectors_ND: Matrix) -> Probabilities:
        """Probabilities (N, K); nothing for an embedding that is not finite."""
        whole = np.isfinite(vectors_ND).all(axis=1)
        p_NK = np.zeros((len(vectors_ND), len(self.classes)), np.float32)
        p_NK[whole] = softmax(vectors_ND[whole] @ self.weight_KD.T + self.bias_K)
        return p_NK

    def to_bytes(self) -> bytes:
        """A safetensors file; its header has the classes and the fingerprint of the embeddings."""
        facts = {"classes": self.classes, "fingerprint": self.fingerprint}
        tensors = {"weight": self.weight_KD, "bias": self.bias_K}
        return save(tensors, {_HEADER: json.dumps(facts)})

    @classmethod
    def read(cls, path: Path, fingerprint: str) -> Probe:
        """A saved probe. Raises InputError for another file, FingerprintError for other embeddings."""
        try:
            with safe_open(path, "np") as file:
                facts = json.loads((file.metadata() or {})[_HEADER])
                weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
            probe = cls(weight, bias, tuple(facts["classes"]), facts["fingerprint"])
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise InputError(f"label.probe: {path} is not a saved probe ({error})") from error
        if probe.fingerprint != fingerprint:
            raise FingerprintError(
                f"label.probe: {path} was trained on embeddings made otherwise than the output's; "
                "train it anew, with label.labels"
            )
        return probe


def train(vectors_ND: Matrix, label_N: Ids, num_classes: int, strength: float) -> Linear:
    """A logistic regression of standardised embeddings; a class without a row is never said."""
    from sklearn.linear_model import LogisticRegression

    weight_KD = np.zeros((num_classes, vectors_ND.shape[1]), np.float32)
    bias_K = np.full(num_classes, _NEVER, np.float32)
    if label_N.min() == label_N.max():  # a part of a cross-validation may have one class alone
        bias_K[label_N[0]] = 0
        return weight_KD, bias_K
    mean_D, scale_D = vectors_ND.mean(axis=0), vectors_ND.std(axis=0) + 1e-6
    fitted = LogisticRegression(C=strength, **SOLVER).fit((vectors_ND - mean_D) / scale_D, label_N)
    weight, bias = fitted.coef_, fitted.intercept_
    if len(weight) == 1:  # scikit-learn has one row for two classes
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight_KD[fitted.classes_] = weight / scale_D
    bias_K[fitted.classes_] = bias - (weight / scale_D) @ mean_D
    return weight_KD, bias_K
