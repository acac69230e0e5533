"""Which loss a classifier has, and which labels it refuses; values against transformers: test_model."""

import math

import pytest
import torch

from cvt_model.loss import classification_loss

REGRESSION, SINGLE, MULTI = (
    "regression",
    "single_label_classification",
    "multi_label_classification",
)
LOGITS = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]])
HALF = math.log(2)  # the cross-entropy of a coin


def test_integer_labels_mean_classes_of_whatever_width():
    expected = pytest.approx((HALF - math.log(0.75)) / 2)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        labels = torch.tensor([0, 1], dtype=dtype)
        assert classification_loss(LOGITS, labels, 2).item() == expected
        assert classification_loss(LOGITS, labels[:, None], 2).item() == expected


def test_a_label_of_minus_100_is_left_out():
    labels = torch.tensor([0, -100])
    assert classification_loss(LOGITS, labels, 2).item() == pytest.approx(HALF)


def test_float_labels_mean_several_classes_at_once():
    labels = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    expected = (3 * HALF - math.log(0.75)) / 4
    assert classification_loss(LOGITS, labels, 2).item() == pytest.approx(expected)


@pytest.mark.parametrize("labels", [[1.0, 2.0], [[1.0], [2.0]], [1, 2]])
def test_one_label_means_regression(labels):
    logits = torch.tensor([[3.0], [5.0]])
    assert classification_loss(logits, torch.tensor(labels), 1).item() == pytest.approx((4 + 9) / 2)


def test_a_named_problem_holds_whatever_the_labels():
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    expected = (1 + math.log(3) ** 2) / 4
    assert classification_loss(LOGITS, labels, 2, REGRESSION).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("labels", "num_labels", "problem_type", "message"),
    [
        (torch.zeros(2, dtype=torch.long), 0, None, "no classifier"),
        (torch.zeros(3, dtype=torch.long), 2, None, r"shape \(3,\) is not \(2,\) or \(2, 1\), as single"),
        (torch.zeros(2, 2, dtype=torch.long), 2, None, r"shape \(2, 2\) is not \(2,\) or \(2, 1\)"),
        (torch.zeros((), dtype=torch.long), 2, None, r"shape \(\) is not"),
        (torch.zeros(2), 2, SINGLE, "dtype torch.float32 does not suit single_label"),
        (torch.zeros(2, 2, dtype=torch.long), 2, MULTI, "dtype torch.int64 does not suit multi_label"),
        (torch.zeros(2), 2, None, r"shape \(2,\) is not \(2, 2\), as multi_label"),
        (torch.zeros(1, 2), 2, REGRESSION, r"shape \(1, 2\) is not \(2, 2\), as regression"),
        (torch.zeros(2), 2, REGRESSION, r"shape \(2,\) is not \(2, 2\), as regression"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels, num_labels, problem_type, message):
    with pytest.raises(ValueError, match=f"^labels: .*{message}"):
        classification_loss(LOGITS[:, : max(num_labels, 1)], labels, num_labels, problem_type)
