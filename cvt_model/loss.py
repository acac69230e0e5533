"""The loss of a classifier, by the kind of problem, as transformers decides and computes it.

What enters: logits and labels. What leaves: a scalar. It must not know the network.
"""

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cvt_model.config import ProblemType


def classification_loss(
    logits_BK: Tensor, labels: Tensor, num_labels: int, problem_type: ProblemType | None = None
) -> Tensor:
    """The mean loss over the batch, a scalar.

    - regression: mean squared error; labels (B,) or (B, 1) with one label, else (B, K)
    - single_label_classification: cross-entropy; class numbers (B,), integers, -100 to leave one out
    - multi_label_classification: binary cross-entropy; floats (B, K) from 0 to 1

    None decides by the labels. Raises ValueError for labels of another shape or dtype.
    """
    if num_labels == 0:
        raise ValueError("labels: the network has no classifier (num_labels is 0), so there is no loss")
    problem_type = problem_type or guess_problem_type(num_labels, labels)
    batch_size = logits_BK.shape[0]
    if problem_type == "multi_label_classification":
        check_labels(labels, problem_type, ((batch_size, num_labels),), floating=True)
        return F.binary_cross_entropy_with_logits(logits_BK, labels)
    column = ((batch_size,), (batch_size, 1))
    if problem_type == "single_label_classification":
        check_labels(labels, problem_type, column, floating=False)
        return F.cross_entropy(logits_BK, labels.reshape(-1).long())
    check_labels(labels, problem_type, column if num_labels == 1 else ((batch_size, num_labels),))
    return F.mse_loss(logits_BK, labels.reshape(logits_BK.shape))


def guess_problem_type(num_labels: int, labels: Tensor) -> ProblemType:
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def check_labels(
    labels: Tensor, problem_type: str, shapes: tuple[tuple[int, ...], ...], floating: bool | None = None
) -> None:
    if floating is not None and floating != labels.is_floating_point():
        raise ValueError(
            f"labels: dtype {labels.dtype} does not suit {problem_type}, which takes "
            f"{'floats from 0 to 1' if floating else 'whole class numbers'}"
        )
    if tuple(labels.shape) not in shapes:
        wanted = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"labels: shape {tuple(labels.shape)} is not {wanted}, as {problem_type} needs")
