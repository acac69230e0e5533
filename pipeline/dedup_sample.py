"""Pairs of images at every similarity, as a page: to see where near-duplicates end, and set a threshold.

For a random sample of the images the nearest other one is looked up; some pairs of each band of cosines are
shown, with how many of the sample lie in it, and how many from there on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.dedup import open_searcher
from pipeline.errors import ConfigError
from pipeline.gallery import figure, page
from pipeline.originals import Originals
from pipeline.search import Hit, Searcher
from pipeline.storage import Storage

SAMPLE_IMAGES = 5000
PAIRS_PER_BAND = 4
# Where each band begins; the first is of vectors that are equal but for rounding.
BANDS = (0.9999, 0.995, 0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9, 0.85, 0.8, -1.0)

Pair = tuple[float, str, str]


def write_sample(output: Storage, path: Path, input_options: Mapping[str, Any]) -> dict[str, int]:
    """Write the page; returns how many images of the sample have their nearest in each band.

    Bands are named by where they begin. Raises SearchError where there is no index of the committed rows.
    """
    searcher, _ = open_searcher(output)
    pairs, counts, bands = _nearest_pairs(searcher), {}, []
    originals, seen = Originals(output, input_options), 0
    for upper, lower in zip((float("inf"), *BANDS[:-1]), BANDS, strict=True):
        band = [pair for pair in pairs if lower <= pair[0] < upper]
        counts[f"{lower:g}"] = len(band)
        seen += len(band)
        if band:
            heading = _heading(upper, lower, len(band), seen, len(pairs))
            cards = [_card(pair, searcher, originals) for pair in _some_of(band)]
            bands.append(f'<h2>{heading}</h2><div class="pairs">{"".join(cards)}</div>')
    note = (
        f"The nearest other image of {len(pairs):,} images of {output.uri}, drawn at random, by the cosine "
        "of their embeddings. Take as dedup.threshold the least cosine at which both are still the same "
        "image to you."
    )
    try:
        path.write_text(page("Pairs by similarity", note, "".join(bands), _STYLE), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--sample: cannot write {path}: {error.strerror}") from error
    return counts


def _nearest_pairs(searcher: Searcher) -> list[Pair]:
    """For each image of the sample the cosine to its nearest other one, its id and the other's."""
    rng, names = np.random.default_rng(0), searcher.image_ids
    picked = sorted(rng.choice(len(names), min(SAMPLE_IMAGES, len(names)), replace=False).tolist())
    chosen = [names[n] for n in picked]
    pairs = []
    for name, found in zip(chosen, searcher.nearest_of_ids(chosen, 2), strict=True):
        other = next(((image_id, score) for image_id, score in found if image_id != name), None)
        if other is not None:
            pairs.append((min(other[1], 1.0), name, other[0]))
    return pairs


def _some_of(band: Sequence[Pair]) -> list[Pair]:
    """A few pairs of a band at random, the most similar first, none of them twice the other way round."""
    unlike = list({frozenset(pair[1:]): pair for pair in band}.values())
    picked = np.random.default_rng(0).permutation(len(unlike))[:PAIRS_PER_BAND]
    return sorted((unlike[n] for n in picked), reverse=True)


def _heading(upper: float, lower: float, count: int, seen: int, total: int) -> str:
    images = "1 image" if count == 1 else f"{count:,} images"
    if lower == BANDS[-1]:
        return f"under {upper:g} <span>{images}</span>"
    width = f"{lower:g} and more" if upper > 1 else f"{lower:g} to {upper:g}"
    share = f"{seen:,} of {total:,} ({seen / total:.1%})"
    return f"{width} <span>{images}; with another at {lower:g} and more: {share}</span>"


def _card(pair: Pair, searcher: Searcher, originals: Originals) -> str:
    score, name, other = pair
    figures = (
        figure(
            originals.read(hit.shard, hit.key) if hit.shard and hit.key else None,
            hit.image_id,
            _size(hit),
        )
        for hit in searcher.hits_of({name: score, other: score})
    )
    return f'<div class="pair"><b>{score:.5f}</b>{"".join(figures)}</div>'


def _size(hit: Hit) -> str:
    return f"{hit.width} × {hit.height}" if hit.width and hit.height else ""


_STYLE = """h2 { font-size: 1.1rem; margin: 0; padding: 1.25rem 0 .75rem; border-top: 1px solid #8884 }
h2 span { font-weight: normal; font-size: .9rem; opacity: .7; margin-left: .75rem }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 1rem;
  margin-bottom: 1.5rem }
.pair { display: grid; grid-template-columns: 1fr 1fr; align-content: start; gap: .25rem .5rem;
  padding: .6rem; border: 1px solid #8884; border-radius: .75rem }
.pair > b { grid-column: 1 / 3 }
.pair img { object-fit: contain }
.pair figcaption b { font-weight: normal }
.pair figcaption span { white-space: normal; overflow-wrap: anywhere }
"""
