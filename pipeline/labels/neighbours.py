"""Votes of the nearest labelled images.

Enters: rows of embeddings/, and an index whose images have known labels. Leaves: each class's share of the
votes (N, K). An image never votes for itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.index.vectors import normalize, usable
from pipeline.labelled_rows import NO_CLASS, matrix
from pipeline.labels.decide import Probabilities
from pipeline.neighbour_quality import faiss_ids, vote_weights, without
from pipeline.quality import Ids
from pipeline.schema import IMAGE_ID
from pipeline.search import Searcher

METHOD = "neighbours"


class Neighbours:
    """Shares of the k nearest labelled images' votes, each weighing by its cosine."""

    method = METHOD
    columns = (IMAGE_ID, "embedding")

    def __init__(
        self, searcher: Searcher, by_faiss_id: Ids, classes: Sequence[str], k: int, *, own: bool
    ) -> None:
        """`by_faiss_id` has the class of each indexed image; `own` says that the rows are indexed too."""
        self.classes = tuple(classes)
        self._searcher, self._by_faiss_id, self._k, self._own = searcher, by_faiss_id, k, own
        self._labelled = by_faiss_id != NO_CLASS

    def __call__(self, table: pa.Table, stem: str) -> Probabilities:
        """Shares (N, K); nothing for a row whose embedding can be compared with none."""
        p_NK = np.zeros((table.num_rows, len(self.classes)), np.float32)
        vectors = matrix(table.column("embedding")).astype(np.float32)
        rows = np.flatnonzero(usable(vectors))
        if not len(rows):
            return p_NK
        queries = normalize(vectors[rows])
        scores, ids = self._searcher.engine.search(queries, self._k + self._own, only=self._labelled)
        if self._own:
            own = faiss_ids(table.take(pa.array(rows)), stem, self._searcher)
            scores, ids = without(scores, ids, own)
        classes = np.where(ids < 0, NO_CLASS, self._by_faiss_id[ids])
        weights = vote_weights(classes, scores)
        for column in range(classes.shape[1]):
            np.add.at(p_NK, (rows, np.maximum(classes[:, column], 0)), weights[:, column])
        total = p_NK.sum(axis=1, keepdims=True)
        np.divide(p_NK, total, out=p_NK, where=total > 0)
        return p_NK
