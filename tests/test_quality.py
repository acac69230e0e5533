"""Figures about labels, held against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.quality import calibration, class_order, confusion, per_class


def test_calibration_is_the_gap_of_each_band_weighed_by_its_images():
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55], np.float32)
    correct = np.array([1, 1, 0, 1, 0, 1], np.bool_)
    found = calibration(confidence, correct, num_bins=10)
    assert found.error == pytest.approx((4 * abs(0.95 - 0.75) + 2 * abs(0.55 - 0.5)) / 6, abs=1e-6)
    assert [bin_[0] for bin_ in found.bins] == [0, 0, 0, 0, 0, 2, 0, 0, 0, 4]


def test_a_perfect_classifier_is_calibrated_and_an_overconfident_one_is_not():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 1, 50_000).astype(np.float32)
    assert calibration(confidence, rng.random(50_000) < confidence).error < 0.01
    assert calibration(confidence, rng.random(50_000) < confidence - 0.2).error == pytest.approx(
        0.2, abs=0.01
    )
    assert calibration(np.ones(3, np.float32), np.ones(3, np.bool_)).error == 0


def test_classes_have_precision_recall_and_f1():
    labels = np.array([0, 0, 0, 1, 1, 2], np.int32)
    said = np.array([0, 0, 1, 1, -1, 0], np.int32)
    rows = {row["class"]: row for row in per_class(labels, said, ["a", "b", "c", "d"])}
    assert rows["a"] == {
        "class": "a",
        "images": 3,
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(2 / 3),
    }
    assert (rows["b"]["precision"], rows["b"]["recall"]) == (0.5, 0.5)
    assert (rows["c"]["precision"], rows["c"]["recall"]) == (None, 0)
    assert rows["d"]["recall"] is None


def test_confusion_counts_labels_down_and_answers_across():
    counts = confusion(np.array([0, 0, 1], np.int32), np.array([0, 1, 1], np.int32), 2)
    assert counts == [[1, 1], [0, 1]]
    assert confusion(np.zeros(1, np.int32), np.zeros(1, np.int32), 101) is None


def test_numbers_are_ordered_by_value_and_names_by_the_alphabet():
    assert class_order({"10", "9", "1"}) == ["1", "9", "10"]
    assert class_order({"cat", "10", "ant"}) == ["10", "ant", "cat"]
