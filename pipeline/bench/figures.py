"""Figures of a benchmark, from the seconds and the features that it recorded.

Enters: seconds an image by form, round by round; features. Leaves: numbers of JSON's types, null where
there is nothing to compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cvt_model.backends import FeatureArrays
from pipeline.bench.rounds import Spread, ratio

# Ours and a rival: what the ratio of the two is called.
RATIOS = {
    "ratio": ("ours", "transformers_eager"),
    "ratio_torch": ("ours_torch", "transformers_eager"),
    "ratio_compiled": ("ours", "transformers_compiled"),
    "ratio_openvino": ("ours", "transformers_openvino"),
    "ratio_onnxruntime": ("ours", "transformers_onnxruntime"),
}


def speed_figures(image_s: Sequence[float], flops: int, peak: float) -> dict[str, Any]:
    """Images a second with their spread; operations a second are those of the published network."""
    spread = Spread.of([1 / seconds for seconds in image_s])
    achieved = spread.median * flops
    return {
        "images_per_s": spread.median,
        "images_per_s_min": spread.low,
        "images_per_s_max": spread.high,
        "gflops": achieved / 1e9,
        "share_of_peak": achieved / peak,
    }


def all_ratios(
    image_s: Mapping[str, Sequence[float]], precisions: Sequence[str]
) -> dict[str, float | None]:
    """Every ratio by its name; null where one of the two did not run."""
    found: dict[str, float | None] = {}
    for name, (ours, rival) in RATIOS.items():
        for precision in precisions:
            key = f"{ours}_{precision}"
            if key not in image_s:
                key = f"ours_{precision}"  # it is torch that `auto` means
            found[f"{name}_{precision}"] = ratio_of(image_s, key, f"{rival}_{precision}")
    return found


def ratio_of(image_s: Mapping[str, Sequence[float]], ours: str, rival: str) -> float | None:
    return ratio(image_s[ours], image_s[rival]) if ours in image_s and rival in image_s else None


def agreement(features: FeatureArrays, truth: FeatureArrays) -> dict[str, float | None]:
    """How far logits and embeddings are from the truth, over the images that both have."""
    count = min(len(features.embedding), len(truth.embedding))
    logits = np.abs(features.logits[:count] - truth.logits[:count])
    return {
        "images_compared": count,
        "max_abs_logit_difference": float(logits.max()) if logits.size else None,
        "min_cosine": float(cosines(features.embedding[:count], truth.embedding[:count]).min()),
    }


def cosines(a_BD: np.ndarray, b_BD: np.ndarray) -> np.ndarray:
    """Of each row of the one with the same row of the other, float64 (B,)."""
    a_BD, b_BD = a_BD.astype(np.float64), b_BD.astype(np.float64)
    norms_B = np.linalg.norm(a_BD, axis=1) * np.linalg.norm(b_BD, axis=1)
    return np.asarray((a_BD * b_BD).sum(axis=1) / norms_B)
