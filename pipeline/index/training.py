"""Training: from a random sample over all rows, none of them held out, within the memory planned."""

from __future__ import annotations

import faiss
import numpy as np

from pipeline.errors import ConfigError
from pipeline.index import lists
from pipeline.index.kinds import Choice
from pipeline.index.truth import is_held_out
from pipeline.index.vectors import BLOCK_ROWS, Ids, Vectors, VectorStore

_KMEANS_ROUNDS = 10
_ENCODER_ROWS = 32_768
_OPQ_ROUNDS, _OPQ_ROWS = 8, 16_384


def train(index: faiss.Index, choice: Choice, store: VectorStore, live: Ids) -> None:
    """Train on a random sample over all rows but the held-out ones."""
    if index.is_trained:
        return
    eligible = live[~is_held_out(live)]
    size = min(choice.num_training, len(eligible))
    sample = store.take(np.sort(np.random.default_rng(0).choice(eligible, size, replace=False)))
    ivf = lists.ivf_of(index)
    if ivf is not None:
        ivf.cp.niter = _KMEANS_ROUNDS
    outer = faiss.downcast_index(index)
    try:
        if isinstance(outer, faiss.IndexPreTransform):
            for number in range(outer.chain.size()):
                sample = _transformed(faiss.downcast_VectorTransform(outer.chain.at(number)), sample)
            _train_inner(faiss.downcast_index(outer.index), sample)
            outer.is_trained = index.is_trained = True
        else:
            _train_inner(outer, sample)
    except RuntimeError as error:
        raise ConfigError(
            f"index.type: {choice.factory} cannot be trained on {size:,} vectors "
            f"({str(error).rpartition(': ')[2].strip()}); index.type=auto takes what suits their number"
        ) from error


def _train_inner(index: faiss.Index, sample: Vectors) -> None:
    """Train; the encoder of an IVF index on fewer rows than its lists, since it copies what it is given."""
    if isinstance(index, faiss.IndexIVF):
        index.train_q1(len(sample), faiss.swig_ptr(sample), False, index.metric_type)
        sample = sample[:_ENCODER_ROWS]
    index.train(sample)


def _transformed(transform: faiss.VectorTransform, sample: Vectors) -> Vectors:
    """The sample after a transform, trained on it; in place where the width stays, for the memory."""
    if isinstance(transform, faiss.OPQMatrix):  # its defaults take as long as all the rest
        transform.niter, transform.max_train_points = _OPQ_ROUNDS, _OPQ_ROWS
    if not transform.is_trained:
        transform.train(sample)
    if transform.d_out != transform.d_in:
        return np.ascontiguousarray(transform.apply(sample))
    for start in range(0, len(sample), BLOCK_ROWS):
        some = slice(start, start + BLOCK_ROWS)
        sample[some] = transform.apply(np.ascontiguousarray(sample[some]))
    return sample
