"""Pairs of images at every similarity, as a page: to see where near-duplicates end, and set a threshold.

For a random sample of the images the nearest other one is looked up; some pairs of each band of cosines are
shown, with how many of the sample lie in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.dedup import open_searcher
from pipeline.errors import ConfigError
from pipeline.gallery import Row, gallery_page
from pipeline.originals import Originals
from pipeline.storage import Storage

SAMPLE_IMAGES = 5000
PAIRS_PER_BAND = 5
BANDS = (1.0, 0.995, 0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9, 0.85, 0.8)


def write_sample(output: Storage, path: Path, input_options: Mapping[str, Any]) -> dict[str, int]:
    """Write the page; returns how many images of the sample have their nearest in each band."""
    searcher = open_searcher(output)
    rng = np.random.default_rng(0)
    names = searcher.image_ids
    picked = sorted(rng.choice(len(names), min(SAMPLE_IMAGES, len(names)), replace=False).tolist())
    chosen = [names[n] for n in picked]
    pairs = []
    for name, found in zip(chosen, searcher.nearest_of_ids(chosen, 2), strict=True):
        other = next(((image_id, score) for image_id, score in found if image_id != name), None)
        if other is not None:
            pairs.append((min(other[1], 1.0), name, other[0]))
    rows, counts, originals = [], {}, Originals(output, input_options)
    for upper, lower in zip((float("inf"), *BANDS[:-1]), BANDS, strict=True):
        band = [pair for pair in pairs if lower <= pair[0] < upper]
        counts[f"{lower}"] = len(band)
        for score, name, other in [band[n] for n in rng.permutation(len(band))[:PAIRS_PER_BAND]]:
            own, near = searcher.hits_of({name: 1.0, other: score})
            image = originals.read(own.shard, own.key) if own.shard and own.key else None
            rows.append(Row(f"{name} ({len(band)} of {len(pairs)} from {lower:g} on)", image, [near]))
    note = (
        f"For {len(pairs):,} images of {output.uri} the nearest other one, by cosine. Take as "
        "dedup.threshold the least cosine at which both are still the same to you."
    )
    try:
        page = gallery_page("Pairs by similarity", note, rows, originals.read)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--sample: cannot write {path}: {error.strerror}") from error
    return counts
