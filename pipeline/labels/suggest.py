"""Which images to label next: uncertain ones, and unlike each other.

Enters: probabilities of the images without a label. Leaves: `labels/suggestions/<version>/` with
`suggestions.csv`, the most uncertain first, and a page of them. Of the images with the least margin, ten
times as many as are asked for are candidates; of these k-means++'s seeding takes some that are far from
each other, as in BADGE (Ash et al., arXiv 1906.03671): uncertain alone, they would be the same image many
times. Rows stream; candidates and their embeddings are held.
Shape suffixes: N rows, M candidates, D dimensions.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import schema
from pipeline.commits import CommitLog
from pipeline.config import LabelConfig
from pipeline.errors import InputError
from pipeline.fingerprint import require_fingerprint
from pipeline.index.vectors import normalize, usable
from pipeline.label_source import LabelSource
from pipeline.labelled_rows import VECTOR_ROWS, tables
from pipeline.labels.decide import Rule
from pipeline.labels.methods import METHODS, Method, open_known, vectors_of
from pipeline.labels.reviews import standing
from pipeline.labels.sheet import sheet
from pipeline.progress import iso_time
from pipeline.published import publish
from pipeline.storage import Storage, unique_name

FOLDER, FILE, SHEET = "labels/suggestions", "suggestions.csv", "suggestions.html"
WIDER = 10  # candidates for each that is asked for
_LEAST_WEIGHT = 1e-3

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Candidates:
    """The images (M,) with the least margins, by margin."""

    image_ids: list[str]
    labels: list[str]  # the best class
    margin_M: Vectors
    vectors_MD: Vectors

    def take(self, places: npt.NDArray[np.int64]) -> Candidates:
        return Candidates(
            [self.image_ids[n] for n in places],
            [self.labels[n] for n in places],
            self.margin_M[places],
            self.vectors_MD[places],
        )


def suggest(
    output: Storage, config: LabelConfig, number: int, input_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Choose `number` images without a known label, write and publish the list; returns the summary.

    `input_options` are storage options of the input, whose images the page shows. Uncertain is what
    `label.method` is uncertain of. Raises InputError where every image has a label.
    """
    started = time.time()
    fingerprint = require_fingerprint(output)
    known = None if config.labels is None else open_known(output, fingerprint, config)
    log = CommitLog(output)
    ready = METHODS[config.method](log, fingerprint, known, config)
    own = known if config.reference is None else None
    reviewed = pa.array(list(standing(output)), pa.string())
    found = _candidates(log, ready.method, own, reviewed, number * WIDER)
    if not found.image_ids:
        raise InputError(f"{output.uri} has no image without a label that could be suggested")
    chosen = found.take(_unlike(found, number, config.seed))
    version = unique_name()
    _write(output, f"{FOLDER}/{version}/{FILE}", chosen)
    captions = [
        (name, f"{label}? margin {margin:.3f}")
        for name, label, margin in zip(chosen.image_ids, chosen.labels, chosen.margin_M, strict=True)
    ]
    note = (
        f"{len(captions):,} images of {output.uri} whose labels would teach most; the most uncertain first."
    )
    page = sheet(log, "Images to label next", note, captions, input_options or {})
    output.write_bytes(f"{FOLDER}/{version}/{SHEET}", page.encode())
    summary = {
        "version": version,
        "suggestions": len(chosen.image_ids),
        "method": config.method,
        "fingerprint": fingerprint.digest,
        "made_at": iso_time(started),
        "seconds": round(time.time() - started, 3),
    }
    publish(output, FOLDER, version, summary)
    return summary


def _candidates(
    log: CommitLog, method: Method, known: LabelSource | None, reviewed: pa.Array, most: int
) -> Candidates:
    """The images without a label, and not `reviewed`, whose margins are the least, at most so many."""
    rule = Rule.of(method.classes, {}, 0, {})
    kept: Candidates | None = None
    columns = (schema.IMAGE_ID, "embedding", *method.columns, *(known.columns if known else ()))
    for stem, table in tables(log, columns, VECTOR_ROWS):
        if known is not None:
            table = table.filter(known.labels_of(table).is_null())
        if len(reviewed):
            table = table.filter(pc.invert(pc.is_in(table.column(schema.IMAGE_ID), reviewed)))
        vectors = vectors_of(table).astype(np.float32)
        whole = usable(vectors)
        table, vectors = table.filter(pa.array(whole)), vectors[whole]
        if not table.num_rows:
            continue
        rows = rule.columns(table.column(schema.IMAGE_ID).combine_chunks(), method(table, stem), "")
        score = rows.column("score").to_numpy()
        margin = rows.column("margin").to_numpy(zero_copy_only=False)
        margin = np.where(np.isnan(margin), score, margin).astype(np.float32)
        ids, labels = rows.column(schema.IMAGE_ID).to_pylist(), rows.column("label").to_pylist()
        more = Candidates(ids, labels, margin, normalize(vectors))
        kept = _least(more if kept is None else _joined(kept, more), most)
    return kept or Candidates([], [], np.empty(0, np.float32), np.empty((0, 1), np.float32))


def _joined(one: Candidates, other: Candidates) -> Candidates:
    return Candidates(
        one.image_ids + other.image_ids,
        one.labels + other.labels,
        np.concatenate([one.margin_M, other.margin_M]),
        np.concatenate([one.vectors_MD, other.vectors_MD]),
    )


def _least(candidates: Candidates, most: int) -> Candidates:
    return candidates.take(np.argsort(candidates.margin_M, kind="stable")[:most])


def _unlike(candidates: Candidates, number: int, seed: int) -> npt.NDArray[np.int64]:
    """Candidates by k-means++'s seeding: each next one the likelier the more uncertain and the farther
    from those that are chosen (squared distance of the unit vectors)."""
    total = len(candidates.image_ids)
    if total <= number:
        return np.arange(total)
    rng = np.random.default_rng(seed)
    weight_M = 1 - candidates.margin_M.astype(np.float64) + _LEAST_WEIGHT
    chosen = [0]  # the most uncertain
    far_M = np.full(total, np.inf)
    while len(chosen) < number:
        cosine_M = candidates.vectors_MD @ candidates.vectors_MD[chosen[-1]]
        far_M = np.minimum(far_M, np.maximum(0, 2 - 2 * cosine_M.astype(np.float64)))
        far_M[chosen[-1]] = 0
        chance_M = weight_M * far_M
        if not chance_M.any():  # what is left is the same as what is chosen
            chance_M = weight_M
            chance_M[chosen] = 0
        chosen.append(int(rng.choice(total, p=chance_M / chance_M.sum())))
    return np.sort(np.array(chosen))


def _write(output: Storage, path: str, chosen: Candidates) -> None:
    with output.replacing(path) as local, local.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["rank", schema.IMAGE_ID, "likely", "margin"])
        rows = zip(chosen.image_ids, chosen.labels, chosen.margin_M.tolist(), strict=True)
        for rank, (name, label, margin) in enumerate(rows, 1):
            writer.writerow([rank, name, label, f"{margin:.6f}"])
