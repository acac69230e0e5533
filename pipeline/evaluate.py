"""How good an output is, by labels: its classifier, its probabilities, its neighbours.

Enters: a labelled output with an index, and perhaps another, labelled, to look for neighbours in. Leaves:
`evaluation/<name>.json` and `.html`. Holds a few numbers of each image, never its embedding.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.classifier_quality import Classifier, ask_classifier, classifier_values
from pipeline.commits import CommitLog
from pipeline.errors import FingerprintError, InputError
from pipeline.evaluation_page import evaluation_page
from pipeline.fingerprint import Fingerprint, require_fingerprint
from pipeline.label_source import LabelSource
from pipeline.labelled_rows import NO_CLASS, read_labels
from pipeline.neighbour_quality import (
    DEPTH,
    Neighbours,
    ask_neighbours,
    choose,
    classes_by_faiss_id,
    neighbour_values,
    num_not_indexed,
)
from pipeline.progress import iso_time
from pipeline.quality import Ids, class_order, per_class
from pipeline.search import Searcher
from pipeline.storage import Storage, unique_name

FOLDER = "evaluation"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """Where neighbours are looked for, with their labels; the output itself where none is named."""

    output: Storage
    labels: LabelSource


def evaluate(
    output: Storage,
    labels: LabelSource,
    reference: Reference | None,
    *,
    k: int = 20,
    most_queries: int = 10_000,
) -> dict[str, Any]:
    """Judge an output, and write what was found; the values are returned.

    Neighbours of an image of the output itself leave it out. Raises InputError where no image has a label,
    or none that has one is indexed, SearchError where there is no index to look for neighbours in.
    """
    started = time.time()
    fingerprint = require_fingerprint(output)
    place, known = (output, labels) if reference is None else (reference.output, reference.labels)
    check_alike(output, fingerprint, place, "--reference")
    searcher = Searcher(place)
    log = CommitLog(output)
    found = read_labels(log, labels)
    if not any(found.names):
        raise InputError(
            f"--labels: none of the {found.num_images:,} images of {output.uri} has a label there"
        )
    classes, class_of_id, named_ids = _classes(found.names, fingerprint)
    label = found.as_classes(classes)
    num_ids = len(fingerprint.model_config["id2label"])
    classifier = ask_classifier(log, label, class_of_id, num_ids) if class_of_id else None
    own = is_same(place, output)
    there = log if own else CommitLog(place)
    others = found if known is labels else read_labels(there, known)
    voting = list(dict.fromkeys((*classes, *others.names)))  # those that only the reference has vote too
    by_faiss_id, not_indexed = _voters(there, others.as_classes(voting), searcher)
    chosen = choose(label, most_queries)
    neighbours = ask_neighbours(log, label, chosen, searcher, by_faiss_id, k, own=own)
    values = {
        "output": output.uri,
        "reference": there.output.uri,
        "made_at": iso_time(started),
        "fingerprint": fingerprint.digest,
        "model": fingerprint.source,
        "precision": fingerprint.precision,
        "images": found.num_images,
        "labelled": int((label != NO_CLASS).sum()),
        "queries": len(neighbours.label),
        "not_indexed": not_indexed,
        "classes": classes,
        "labels_are_ids_of": named_ids,
        **classifier_values(label[label != NO_CLASS], classifier, classes),
        **neighbour_values(neighbours, k),
        "per_class": _per_class(label[label != NO_CLASS], classifier, neighbours, classes),
        "seconds": round(time.time() - started, 2),
    }
    return {**values, "report": _write(output, values)}


def _write(output: Storage, values: dict[str, Any]) -> str:
    """Put the values and their page into the output; returns the page's URL."""
    path = f"{FOLDER}/{unique_name()}"
    output.write_bytes(f"{path}.html", evaluation_page(values).encode())
    output.write_bytes(f"{path}.json", (json.dumps(values, indent=1) + "\n").encode())
    return output.url(f"{path}.html")


def is_same(one: Storage, other: Storage) -> bool:
    """Whether two outputs are one, however each is written."""
    return one.url("").rstrip("/") == other.url("").rstrip("/")


def check_alike(output: Storage, fingerprint: Fingerprint, place: Storage, named: str) -> None:
    """Raise FingerprintError where the embeddings of two outputs cannot be compared."""
    other = require_fingerprint(place)
    for part in ("weights_sha256", "preprocessing", "embedding"):
        if getattr(fingerprint, part) != getattr(other, part):
            raise FingerprintError(
                f"{named}: {place.uri} was made with another {part} than {output.uri}; "
                "their embeddings cannot be compared"
            )


def _classes(
    found: list[str], fingerprint: Fingerprint
) -> tuple[list[str], dict[int, int], dict[str, str] | None]:
    """Class names, and the class of each of the classifier's ids; no ids where it knows none of them.

    The labels may be the classifier's names, or its ids: then the last is what it calls each of them.
    """
    names = {int(number): label for number, label in fingerprint.model_config["id2label"].items()}
    if set(found) & set(names.values()):
        ordered = [name for name in dict.fromkeys(names[n] for n in sorted(names)) if name in found]
        ordered += class_order(set(found) - set(ordered))
        place = {name: number for number, name in enumerate(ordered)}
        return ordered, {number: place[name] for number, name in names.items() if name in place}, None
    ordered = class_order(set(found))
    if all(label.isdecimal() and int(label) in names for label in found):
        place_of_id = {int(label): place for place, label in enumerate(ordered)}
        return ordered, place_of_id, {label: names[int(label)] for label in ordered}
    return ordered, {}, None


def _voters(log: CommitLog, label: Ids, searcher: Searcher) -> tuple[Ids, int]:
    """The class of each indexed image, and how many labelled ones the index lacks, which is told."""
    by_faiss_id, uri = classes_by_faiss_id(log, label, searcher), log.output.uri
    if not (by_faiss_id != NO_CLASS).any():
        raise InputError(
            f"--labels: no image in the index of {uri} has a label there; if it is older than the output, "
            f"run: cvt-pipeline index {uri}"
        )
    not_indexed = num_not_indexed(log, label, searcher)
    if not_indexed:
        logger.warning(
            "%s: %s labelled images are not in the index, so they are nobody's neighbours; "
            "run: cvt-pipeline index %s",
            uri,
            f"{not_indexed:,}",
            uri,
        )
    return by_faiss_id, not_indexed


def _per_class(
    label: Ids, classifier: Classifier | None, neighbours: Neighbours, classes: list[str]
) -> list[dict[str, Any]]:
    said = np.full_like(label, NO_CLASS) if classifier is None else classifier.said
    rows = per_class(label, said, classes)
    asked = np.bincount(neighbours.label, minlength=len(classes)).tolist()
    right = np.bincount(neighbours.label[neighbours.voted == neighbours.label], minlength=len(classes))
    precision = np.bincount(neighbours.label, weights=neighbours.precision, minlength=len(classes))
    for number, (row, count) in enumerate(zip(rows, asked, strict=True)):
        row["knn_accuracy"] = float(right[number] / count) if count else None
        row[f"map_at_{DEPTH}"] = float(precision[number] / count) if count else None
        if classifier is None:
            row |= dict.fromkeys(("precision", "recall", "f1"))
    return rows
