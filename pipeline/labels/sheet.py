"""A page of images to look at, each with a line about it: suggestions and suspects.

Enters: image ids and captions. Leaves: HTML with thumbnails inside it, made from the originals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.commits import CommitLog
from pipeline.gallery import figure, page
from pipeline.labelled_rows import LABEL_ROWS, tables
from pipeline.originals import Originals
from pipeline.schema import IMAGE_ID, KEY, SHARD

MOST = 200  # images of a page


def sheet(
    log: CommitLog,
    title: str,
    note: str,
    captions: Sequence[tuple[str, str]],
    input_options: Mapping[str, Any],
) -> str:
    """The page of these (image id, caption), in their order; the first 200 of them."""
    shown = captions[:MOST]
    places = _places(log, [name for name, _ in shown])
    originals = Originals(log.output, input_options)
    figures = []
    for name, caption in shown:
        place = places.get(name)
        figures.append(figure(originals.read(*place) if place else None, name, caption))
    return page(title, note, f'<div class="hits">{"".join(figures)}</div>')


def _places(log: CommitLog, image_ids: list[str]) -> dict[str, tuple[str, str]]:
    """The shard and key of some images."""
    wanted = pa.array(image_ids, pa.string())
    found: dict[str, tuple[str, str]] = {}
    for _, table in tables(log, (IMAGE_ID, SHARD, KEY), LABEL_ROWS):
        for row in table.filter(pc.is_in(table.column(IMAGE_ID), wanted)).to_pylist():
            found[row[IMAGE_ID]] = (row[SHARD], row[KEY])
        if len(found) == len(image_ids):
            break
    return found
