"""Given labels that are probably wrong: confident learning over cross-validated probabilities.

Enters: an output and labels of its images. Leaves: `labels/suspects/<version>/suspects.parquet`, every
labelled image, the most suspicious first, and a page of those. After Northcutt, Jiang and Chuang
(arXiv 1911.00068): an image is flagged where some other class is as likely as that class usually is of its
own images; ranked is by how much likelier the likeliest other class is than the given one. No image is
judged by a probe that has seen it, and none that is alone in its class. Rows stream; a few numbers of each
labelled image are held.
Shape suffixes: N labelled rows, K classes, F folds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.commits import CommitLog
from pipeline.config import LabelConfig
from pipeline.errors import ConfigError
from pipeline.fingerprint import require_fingerprint
from pipeline.labelled_rows import NO_CLASS, VECTOR_ROWS, tables
from pipeline.labels.cross_validation import (
    ALWAYS_TRAINED,
    check_labelled,
    choose_strength,
    cross_validated,
    fold_of,
)
from pipeline.labels.decide import Probabilities, softmax
from pipeline.labels.methods import chosen_rows, open_wanted, read_classes, vectors_of
from pipeline.labels.probe import Linear, train
from pipeline.labels.sheet import MOST, sheet
from pipeline.progress import iso_time
from pipeline.published import publish
from pipeline.quality import Flags, Floats, Ids
from pipeline.storage import Storage, unique_name

FOLDER, FILE, SHEET = "labels/suspects", "suspects.parquet", "suspects.html"
_ROWS = 65_536
_NEVER = 2.0  # a probability

Folds = dict[int, Linear]
"""The probes, each trained without the rows of its fold."""


@dataclass(frozen=True)
class Judged:
    """What is known of every labelled row (N,)."""

    given: Ids
    suggested: Ids  # the likeliest other class
    p_given: Floats
    p_suggested: Floats
    flagged: Flags


def find_suspects(
    output: Storage, config: LabelConfig, input_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Judge every given label, write and publish what was found; returns the summary.

    `input_options` are storage options of the input, whose images the page shows.

    Raises InputError where labels are missing or too few.
    """
    started = time.time()
    if config.reference is not None:
        raise ConfigError("label.reference: suspects are looked for among the output's own labels alone")
    fingerprint = require_fingerprint(output)
    log = CommitLog(output)
    labels, classes = read_classes(log, open_wanted(output, fingerprint, config))
    label = labels.as_classes(classes)
    check_labelled(label[label != NO_CLASS], output.uri)
    probes, thresholds_K, fold_N = _train(log, label, config)
    judged, ids = _judge(log, label, fold_N, probes, thresholds_K)
    order = np.argsort(judged.p_given - judged.p_suggested, kind="stable")
    version = unique_name()
    _write(output, f"{FOLDER}/{version}/{FILE}", judged, ids, order, classes)
    flagged = int(judged.flagged.sum())
    captions = [
        (ids[n].as_py(), f"{classes[judged.given[n]]}, or {classes[judged.suggested[n]]}?")
        for n in order[:MOST].tolist()
    ]
    note = f"{flagged:,} of {len(order):,} labels of {output.uri} are probably wrong; the likeliest first."
    page = sheet(log, "Suspicious labels", note, captions, input_options or {})
    output.write_bytes(f"{FOLDER}/{version}/{SHEET}", page.encode())
    summary = {
        "version": version,
        "labelled": len(judged.given),
        "flagged": flagged,
        "share": round(flagged / max(1, len(judged.given)), 6),
        "classes": classes,
        "fingerprint": fingerprint.digest,
        "made_at": iso_time(started),
        "seconds": round(time.time() - started, 3),
    }
    publish(output, FOLDER, version, summary)
    return summary


def _train(log: CommitLog, label: Ids, config: LabelConfig) -> tuple[Folds, Floats, Ids]:
    """The folds' probes, how likely classes usually are of their own images (K,), the fold of each row."""
    num_classes = int(label.max()) + 1
    fold = np.full(len(label), ALWAYS_TRAINED, np.int32)
    fold[label != NO_CLASS] = fold_of(label[label != NO_CLASS], config.folds, config.seed)
    rows, vectors = chosen_rows(log, label, ("embedding",), vectors_of, config)
    whole = np.isfinite(vectors).all(axis=1)
    rows, vectors = rows[whole], vectors[whole].astype(np.float32)
    given, folds = label[rows], fold[rows]
    strength = choose_strength(vectors, given, folds, num_classes, config.seed)
    p_NK, probes = cross_validated(vectors, given, folds, num_classes, strength)
    for number in set(range(config.folds)) - set(probes):  # of which no row was drawn
        probes[number] = train(vectors, given, num_classes, strength)
    judged = np.flatnonzero(folds != ALWAYS_TRAINED)
    own = np.bincount(given[judged], weights=p_NK[judged, given[judged]], minlength=num_classes)
    count = np.bincount(given[judged], minlength=num_classes)
    usual_K = np.where(count > 0, own / np.maximum(count, 1), _NEVER)
    return probes, usual_K.astype(np.float32), fold


def _judge(
    log: CommitLog, label: Ids, fold: Ids, probes: Folds, thresholds_K: Floats
) -> tuple[Judged, pa.ChunkedArray]:
    """Every labelled row, in the order of the files, and their ids."""
    parts: list[tuple[npt.NDArray[Any], ...]] = []
    ids: list[pa.Array] = []
    seen = 0
    for _, table in tables(log, (schema.IMAGE_ID, "embedding"), VECTOR_ROWS):
        rows = slice(seen, seen + table.num_rows)
        seen += table.num_rows
        vectors = vectors_of(table).astype(np.float32)
        usable = (fold[rows] != ALWAYS_TRAINED) & np.isfinite(vectors).all(axis=1)
        vectors, given, folds = vectors[usable], label[rows][usable], fold[rows][usable]
        p_NK = np.zeros((len(given), len(thresholds_K)), np.float32)
        for number in np.unique(folds):
            mine = folds == number
            weight_KD, bias_K = probes[int(number)]
            p_NK[mine] = softmax(vectors[mine] @ weight_KD.T + bias_K)
        parts.append((given, *_held_against(given, p_NK, thresholds_K)))
        ids += table.column(schema.IMAGE_ID).filter(pa.array(usable)).chunks
    return Judged(*(np.concatenate(part) for part in zip(*parts, strict=True))), pa.chunked_array(ids)


def _held_against(
    given: Ids, p_NK: Probabilities, thresholds_K: Floats
) -> tuple[Ids, Floats, Floats, Flags]:
    """Given labels against probabilities: the likeliest other class, both probabilities, flags."""
    rows = np.arange(len(given))
    p_given = p_NK[rows, given]
    others_NK = p_NK.copy()
    others_NK[rows, given] = -1
    suggested = others_NK.argmax(axis=1).astype(np.int32)
    # Confident joint: of the classes that are as likely as usual of their own, the likeliest is another.
    confident_NK = np.where(p_NK >= thresholds_K, p_NK, -1)
    likeliest = confident_NK.argmax(axis=1)
    flagged = (confident_NK.max(axis=1) > 0) & (likeliest != given)
    return suggested, p_given, others_NK.max(axis=1), flagged


def _write(
    output: Storage,
    path: str,
    judged: Judged,
    ids: pa.ChunkedArray,
    order: npt.NDArray[np.int64],
    classes: list[str],
) -> None:
    names, found = pa.array(classes, pa.string()), ids.combine_chunks()
    with (
        output.replacing(path) as local,
        pq.ParquetWriter(local, schema.SUSPECTS, compression="zstd") as writer,
    ):
        for start in range(0, len(order), _ROWS):
            some = order[start : start + _ROWS]
            columns = [
                pa.array(np.arange(start + 1, start + len(some) + 1)),
                found.take(pa.array(some)),
                names.take(pa.array(judged.given[some])),
                names.take(pa.array(judged.suggested[some])),
                pa.array(judged.p_given[some]),
                pa.array(judged.p_suggested[some]),
                pa.array(judged.flagged[some]),
            ]
            writer.write_table(pa.table(columns, schema.SUSPECTS))
