"""What the nearest neighbours of labelled images say of them: votes, recall and average precision.

Enters: the classes of an output's images, and an index with the classes of its own. Leaves: a few numbers
for each image that is asked. An image without a label is nobody's neighbour: else the figures would say
how many are labelled. Must not know where labels come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.commits import CommitLog
from pipeline.errors import InputError
from pipeline.index.vectors import Vectors, normalize, usable
from pipeline.labelled_rows import LABEL_ROWS, NO_CLASS, VECTOR_ROWS, matrix, tables
from pipeline.quality import Flags, Floats, Ids
from pipeline.schema import IMAGE_ID
from pipeline.search import Searcher

DEPTH = 100  # of the neighbours that mean average precision looks at
RECALL_AT = (1, 5, 10)
TEMPERATURE = 0.07  # of the neighbours' votes, as DINO's evaluation has it (arXiv 2104.14294)

Numbers = npt.NDArray[np.int64]
Matrix = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Neighbours:
    """What the nearest neighbours of the queries say (Q,)."""

    label: Ids  # of the queries themselves
    voted: Ids
    precision: Floats  # average precision within DEPTH
    found: dict[int, Flags]  # whether one of the k nearest has the label, by k


def classes_by_faiss_id(log: CommitLog, label: Ids, searcher: Searcher) -> Ids:
    """The class of each indexed image, by its faiss id."""
    classes = np.full(searcher.record.next_id, NO_CLASS, np.int32)
    seen = 0
    for stem, table in tables(log, (IMAGE_ID,), LABEL_ROWS):
        ids = faiss_ids(table, stem, searcher)
        mine = label[seen : seen + len(ids)]
        seen += len(ids)
        classes[ids[ids >= 0]] = mine[ids >= 0]
    return classes


def num_not_indexed(log: CommitLog, label: Ids, searcher: Searcher) -> int:
    """How many labelled images are of commits that the index does not have yet."""
    indexed = frozenset(searcher.record.commits)
    seen = number = 0
    for commit in log.stream(log.live):
        mine = label[seen : seen + commit.num_rows]
        seen += len(mine)
        number += 0 if commit.stem in indexed else int((mine != NO_CLASS).sum())
    return number


def faiss_ids(table: pa.Table, stem: str, searcher: Searcher) -> Numbers:
    """The faiss ids of some rows of a commit, -1 where they are not indexed."""
    names, ids = searcher.ids_of_shard(stem)
    places = pc.index_in(table.column(IMAGE_ID).combine_chunks(), value_set=names)
    places = pc.fill_null(places, -1).to_numpy(zero_copy_only=False)
    return np.where(places < 0, -1, ids[places] if len(ids) else -1)


def choose(label: Ids, most: int) -> Numbers:
    """The labelled images that are asked for neighbours: all, or a seeded choice."""
    labelled = np.flatnonzero(label != NO_CLASS)
    if len(labelled) <= most:
        return labelled
    return np.sort(np.random.default_rng(0).choice(labelled, most, replace=False))


def ask_neighbours(
    log: CommitLog,
    label: Ids,
    chosen: Numbers,
    searcher: Searcher,
    by_faiss_id: Ids,
    k: int,
    *,
    own: bool,
) -> Neighbours:
    """Look for the nearest labelled images of the chosen ones, a few thousand at a time.

    Raises InputError where no chosen image has an embedding that can be compared.
    """
    parts: list[tuple[Ids, Ids, Floats, Matrix]] = []
    labelled = by_faiss_id != NO_CLASS
    per_class = np.bincount(by_faiss_id[labelled], minlength=int(label.max()) + 1)
    depth = min(max(k, DEPTH), int(labelled.sum())) + own
    only = None if labelled.sum() == searcher.record.num_vectors else labelled  # None is quicker
    seen = 0
    for stem, table in tables(log, (IMAGE_ID, "embedding"), VECTOR_ROWS):
        rows = chosen[(chosen >= seen) & (chosen < seen + table.num_rows)]
        table, seen = table.take(pa.array(rows - seen)), seen + table.num_rows
        vectors = matrix(table.column("embedding")).astype(np.float32)
        whole = usable(vectors)
        table, rows, vectors = table.filter(pa.array(whole)), rows[whole], vectors[whole]
        if not len(rows):
            continue
        mine = label[rows]
        there = per_class[mine]
        scores, ids = searcher.engine.search(normalize(vectors), depth, only=only)
        if own:
            itself = faiss_ids(table, stem, searcher)
            scores, ids = without(scores, ids, itself)
            there = there - ((itself >= 0) & (by_faiss_id[itself] == mine))
        neighbours = np.where(ids < 0, NO_CLASS, by_faiss_id[ids])
        relevant = neighbours == mine[:, None]
        parts.append((mine, _vote(neighbours[:, :k], scores[:, :k]), _precision(relevant, there), relevant))
    if not parts:
        raise InputError(f"--labels: no labelled image of {log.output.uri} has an embedding to compare")
    mine, voted, precision, relevant = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Neighbours(mine, voted, precision, {k: np.any(relevant[:, :k], axis=1) for k in RECALL_AT})


def without(scores: Vectors, ids: Numbers, own: Numbers) -> tuple[Any, Any]:
    """Neighbours without the image itself, or without the last where it is not among them.

    `own` are faiss ids, -1 of an image that is not indexed.
    """
    is_own = (ids == own[:, None]) & (own >= 0)[:, None]
    is_own[~is_own.any(axis=1), -1] = True
    shape = len(ids), ids.shape[1] - 1
    return scores[~is_own].reshape(shape), ids[~is_own].reshape(shape)


def vote_weights(neighbours: Ids, scores: Vectors) -> Vectors:
    """What each neighbour's vote weighs: exp(cosine / TEMPERATURE), and nothing without a class."""
    return np.exp((scores - 1) / TEMPERATURE) * (neighbours != NO_CLASS)  # type: ignore[no-any-return]


def _vote(neighbours: Ids, scores: Vectors) -> Ids:
    """The class with the most votes, by `vote_weights`; NO_CLASS without any.

    Only the classes of a row's own neighbours are counted: there may be as many classes as images.
    """
    rows = np.arange(len(neighbours))[:, None]
    order = np.argsort(neighbours, axis=1, kind="stable")
    classes = neighbours[rows, order]
    number = np.cumsum(np.diff(classes, axis=1, prepend=classes[:, :1]) != 0, axis=1)  # within the row
    votes = np.zeros(classes.shape)
    np.add.at(votes, (rows, number), vote_weights(neighbours, scores)[rows, order])
    most = np.argmax(number == votes.argmax(axis=1)[:, None], axis=1)
    return np.where(votes.any(axis=1), classes[rows[:, 0], most], NO_CLASS).astype(np.int32)


def _precision(relevant: Matrix, there: Numbers) -> Floats:
    """Average precision of each row within DEPTH; `there` is how many of its class could be found."""
    relevant = relevant[:, :DEPTH]
    ranks = np.arange(1, relevant.shape[1] + 1)
    summed = (relevant * np.cumsum(relevant, axis=1) / ranks).sum(axis=1)
    precision: Floats = np.divide(summed, np.clip(there, 1, DEPTH), dtype=np.float64).astype(np.float32)
    return precision


def neighbour_values(neighbours: Neighbours, k: int) -> dict[str, Any]:
    right = neighbours.voted == neighbours.label
    return {
        "k": k,
        "knn_accuracy": float(right.mean()),
        **{f"recall_at_{k}": float(found.mean()) for k, found in neighbours.found.items()},
        f"map_at_{DEPTH}": float(neighbours.precision.mean()),
    }
