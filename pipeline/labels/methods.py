"""The methods of labelling made ready: what each needs is found, trained and judged.

Enters: an output, and where labels are known. Leaves: something that gives probabilities for rows. Holds
the labelled rows that a probe or a calibration looks at, and a number of every image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import schema
from pipeline.commits import CommitLog
from pipeline.config import LabelConfig
from pipeline.errors import ConfigError, InputError
from pipeline.evaluate import check_alike, is_same
from pipeline.fingerprint import Fingerprint, require_fingerprint
from pipeline.label_source import LabelSource, open_labels
from pipeline.labelled_rows import NO_CLASS, VECTOR_ROWS, Labels, matrix, read_labels, tables
from pipeline.labels.cross_validation import (
    check_labelled,
    choose_strength,
    cross_validated,
    fold_of,
    judge,
    learning_curve,
)
from pipeline.labels.decide import Probabilities
from pipeline.labels.head import Head, classes_of, logits_of
from pipeline.labels.neighbours import Neighbours
from pipeline.labels.probe import Probe, train
from pipeline.labels.temperature import LEAST_ROWS, calibrate
from pipeline.neighbour_quality import classes_by_faiss_id
from pipeline.quality import Ids, class_order
from pipeline.search import Searcher
from pipeline.storage import Storage, parent_and_name

PROBE = "probe.safetensors"
_LEAST_OF_A_CLASS = 50  # where rows are drawn

Numbers = npt.NDArray[np.int64]


class Method(Protocol):
    """How labels are made: probabilities (N, K) of some rows that have these columns."""

    @property
    def method(self) -> str: ...
    @property
    def columns(self) -> tuple[str, ...]: ...
    @property
    def classes(self) -> tuple[str, ...]: ...

    def __call__(self, table: pa.Table, stem: str) -> Probabilities: ...


@dataclass(frozen=True)
class Ready:
    """A method that can begin, what is to be told of it, and files to keep beside the labels."""

    method: Method
    facts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


def open_known(output: Storage, fingerprint: Fingerprint, config: LabelConfig) -> LabelSource:
    """The labels that `label.labels` names, of the output's images or the reference's."""
    assert config.labels is not None
    if config.reference is None:
        return open_labels(config.labels, fingerprint, output)
    place = _reference(output, config)
    return open_labels(config.labels, require_fingerprint(place), place)


def open_wanted(output: Storage, fingerprint: Fingerprint, config: LabelConfig) -> LabelSource:
    """The labels that `label.labels` names. Raises ConfigError where it names none."""
    return _wanted(None if config.labels is None else open_known(output, fingerprint, config))


def _reference(output: Storage, config: LabelConfig) -> Storage:
    if config.reference is None:
        return output
    return Storage(config.reference, output.options_for(config.reference))


def _labelled(log: CommitLog, fingerprint: Fingerprint, config: LabelConfig) -> CommitLog:
    """The rows whose labels are known: the output's own, or the reference's."""
    if config.reference is None:
        return log
    place = _reference(log.output, config)
    if is_same(place, log.output):
        return log
    check_alike(log.output, fingerprint, place, "label.reference")
    return CommitLog(place)


def _wanted(known: LabelSource | None) -> LabelSource:
    if known is None:
        raise ConfigError(
            "label.labels: this needs images whose label is known; name a .csv, .jsonl or .parquet file "
            "with image_id and label, a metadata column of the output, or folder"
        )
    return known


def _head(
    log: CommitLog, fingerprint: Fingerprint, known: LabelSource | None, config: LabelConfig
) -> Ready:
    classes = classes_of(fingerprint, log.output.uri)
    if config.reference is not None:
        raise ConfigError("label.reference: the head needs none; leave it out, or use neighbours or probe")
    if known is None:
        return Ready(Head(classes))
    labels = read_labels(log, known)
    if not set(labels.names) & set(classes):
        raise InputError(
            f"label.labels: none of these labels is a class of the model ({', '.join(labels.names[:5])}); "
            "the head can be calibrated by labels of its own classes alone"
        )
    # A class whose name another has too is none that a label could mean.
    names = Counter(classes)
    label = labels.as_classes([name if names[name] == 1 else "" for name in classes])
    rows, logits = chosen_rows(log, label, ("logits",), logits_of, config)
    whole = np.isfinite(logits).all(axis=1)
    rows, logits = rows[whole], logits[whole]
    if len(rows) < LEAST_ROWS:
        raise InputError(
            f"label.labels: {len(rows)} images of {log.output.uri} with all their logits have a label, a "
            f"calibration needs {LEAST_ROWS}; logits are kept with output.logits=full"
        )
    found = calibrate(logits, label[rows], config.seed)
    return Ready(Head(classes, found.temperature), {"calibration": found.to_json()})


def _neighbours(
    log: CommitLog, fingerprint: Fingerprint, known: LabelSource | None, config: LabelConfig
) -> Ready:
    known, there = _wanted(known), _labelled(log, fingerprint, config)
    labels, classes = read_classes(there, known)
    place = there.output
    searcher = Searcher(place)
    by_faiss_id = classes_by_faiss_id(there, labels.as_classes(classes), searcher)
    num_labelled = int((by_faiss_id != NO_CLASS).sum())
    if not num_labelled:
        raise InputError(f"label.labels: no indexed image of {place.uri} has a label")
    own = there is log
    facts = {"reference": place.uri, "reference_images": num_labelled}
    return Ready(Neighbours(searcher, by_faiss_id, classes, config.k, own=own), facts)


def _probe(
    log: CommitLog, fingerprint: Fingerprint, known: LabelSource | None, config: LabelConfig
) -> Ready:
    if config.probe is not None:
        folder, name = parent_and_name(config.probe)
        with Storage(folder, log.output.options_for(config.probe)).local_copy(name) as path:
            return Ready(Probe.read(path, fingerprint.digest), {"probe": config.probe})
    known, there = _wanted(known), _labelled(log, fingerprint, config)
    labels, classes = read_classes(there, known)
    label = labels.as_classes(classes)
    rows, vectors = chosen_rows(there, label, ("embedding",), vectors_of, config)
    vectors, chosen = vectors.astype(np.float32), label[rows]
    whole = np.isfinite(vectors).all(axis=1)
    vectors, chosen = vectors[whole], chosen[whole]
    check_labelled(chosen, there.output.uri)
    fold = fold_of(chosen, config.folds, config.seed)
    strength = choose_strength(vectors, chosen, fold, len(classes), config.seed)
    p, _ = cross_validated(vectors, chosen, fold, len(classes), strength)
    curve = learning_curve(vectors, chosen, fold, len(classes), strength, config.seed)
    probe = Probe(*train(vectors, chosen, len(classes), strength), tuple(classes), fingerprint.digest)
    facts = {
        "labelled": int((label != NO_CLASS).sum()),
        "trained_on": len(chosen),
        "strength": strength,
        "cross_validation": judge(p, chosen, fold, classes),
        "learning_curve": curve,
    }
    return Ready(probe, facts, {PROBE: probe.to_bytes()})


METHODS: dict[str, Callable[..., Ready]] = {"head": _head, "neighbours": _neighbours, "probe": _probe}


def read_classes(log: CommitLog, known: LabelSource) -> tuple[Labels, list[str]]:
    labels = read_labels(log, known)
    if not labels.names:
        raise InputError(
            f"label.labels: none of the {labels.num_images:,} images of {log.output.uri} has a label there"
        )
    return labels, class_order(set(labels.names))


def vectors_of(table: pa.Table) -> npt.NDArray[Any]:
    return matrix(table.column("embedding"))


def _drawn(rows: Numbers, label: Ids, config: LabelConfig) -> Numbers:
    """At most `label.most_labelled` rows at random, but some of every class."""
    if len(rows) <= config.most_labelled:
        return rows
    kinds, keys = label[rows], np.random.default_rng(config.seed).permutation(len(rows))
    order = np.lexsort((keys, kinds))
    place_in_class = np.empty(len(rows), np.int64)
    place_in_class[order] = np.arange(len(rows)) - np.searchsorted(kinds[order], kinds[order])
    least = min(_LEAST_OF_A_CLASS, config.most_labelled // len(np.unique(kinds)))
    keys[place_in_class < least] = -1
    return np.sort(rows[np.argsort(keys, kind="stable")[: config.most_labelled]])


def chosen_rows(
    log: CommitLog,
    label: Ids,
    columns: tuple[str, ...],
    read: Callable[[pa.Table], npt.NDArray[Any] | None],
    config: LabelConfig,
) -> tuple[Numbers, npt.NDArray[Any]]:
    """Labelled rows, at most `label.most_labelled` by seed, and what `read` takes from each."""
    rows = _drawn(np.flatnonzero(label != NO_CLASS), label, config)
    there, values, seen = [], [], 0
    for _, table in tables(log, (schema.IMAGE_ID, *columns), VECTOR_ROWS):
        mine = rows[(rows >= seen) & (rows < seen + table.num_rows)]
        taken = table.take(pa.array(mine - seen))
        seen += table.num_rows
        found = read(taken) if len(mine) else None
        if found is not None:
            there.append(mine)
            values.append(found)
    if not there:
        return rows[:0], np.empty((0, 1))
    return np.concatenate(there), np.concatenate(values)
