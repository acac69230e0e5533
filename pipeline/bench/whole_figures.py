"""Figures of the whole, from what was seen in each round. Measures nothing.

Enters: rounds. Leaves: numbers by name, of JSON's types; `whole.py` says what they mean.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.bench.corpus import TAR_IMAGES
from pipeline.bench.rounds import Spread

RUN_S = 30.0  # of work for a run, by the ceiling
MIN_IMAGES = 200
MAX_IMAGES = 100_000

SPEEDS = (
    "read_images_per_s", "read_bytes_per_s",
    "decode_images_per_s_core", "decode_fast_images_per_s_core", "decode_images_per_s",
    "model_images_per_s", "write_images_per_s", "run_images_per_s", "pipeline_images_per_s",
)  # fmt: skip


@dataclass
class Round:
    """What one round saw: speeds pass by pass, ratios and facts."""

    speeds: dict[str, list[float]] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(self.speeds[name])

    def note_ceiling(self, *, on_gpu: bool) -> float:
        """What the stages, each as fast as alone, could do together."""
        self.ratios["ceiling_images_per_s"] = ceiling(
            self.median("decode_images_per_s"), self.median("model_images_per_s"), on_gpu=on_gpu
        )
        return self.ratios["ceiling_images_per_s"]

    def note_run(self, images_per_s: float) -> None:
        self.speeds["run_images_per_s"] = [images_per_s]
        self.ratios["fraction_of_ceiling"] = images_per_s / self.ratios["ceiling_images_per_s"]

    def note_rival(self, speeds: list[float]) -> None:
        self.speeds["pipeline_images_per_s"] = speeds
        self.ratios["ratio_pipeline"] = self.median("run_images_per_s") / statistics.median(speeds)


def ceiling(decode_images_per_s: float, model_images_per_s: float, *, on_gpu: bool) -> float:
    """On a CPU both take the same cores, so that their times add; on a GPU they overlap."""
    if on_gpu:
        return min(decode_images_per_s, model_images_per_s)
    return 1 / (1 / decode_images_per_s + 1 / model_images_per_s)


def images_for_a_run(ceiling_images_per_s: float) -> int:
    """Enough for RUN_S of work, in whole tars."""
    wanted = min(max(MIN_IMAGES, RUN_S * ceiling_images_per_s), MAX_IMAGES)
    return math.ceil(wanted / TAR_IMAGES) * TAR_IMAGES


def figures(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians over all rounds, of speeds with the least and the most; facts are the last round's."""
    found: dict[str, Any] = {}
    for name in SPEEDS:
        seen = [speed for one in rounds for speed in one.speeds.get(name, ())]
        found |= spread_figures(name, seen)
    for name in (
        "ceiling_images_per_s",
        "fraction_of_ceiling",
        "ratio_pipeline",
        "decode_ratio_fast",
        "decode_ratio_fast_12mp",
    ):
        ratios = [one.ratios[name] for one in rounds if name in one.ratios]
        found[name] = statistics.median(ratios) if ratios else None
    return found | rounds[-1].facts


def spread_figures(name: str, seen: Sequence[float]) -> Mapping[str, float | None]:
    names = (name, f"{name}_min", f"{name}_max")
    if not seen:
        return dict.fromkeys(names)
    spread = Spread.of(seen)
    return dict(zip(names, (spread.median, spread.low, spread.high), strict=True))
