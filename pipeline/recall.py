"""How good an index is: recall and latency against exact inner products, as NumPy computes them."""

from __future__ import annotations

import time
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

NUM_QUERIES = 256

Vectors = npt.NDArray[np.float32]


def measure(index: Any) -> dict[str, float]:
    """Recall against NumPy's exact inner products, on a sample of rows spread over the index.

    The row itself does not count. A neighbour counts as found if its score is at least that of the true
    k-th neighbour less rounding, so that equal vectors may stand for one another.
    """
    rng = np.random.default_rng(0)
    picked = np.sort(rng.choice(index.ntotal, min(NUM_QUERIES, index.ntotal), replace=False))
    queries = np.stack([index.reconstruct(int(n)) for n in picked])
    flat: Any = faiss.downcast_index(index.index)
    stored = faiss.rev_swig_ptr(flat.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
    k = min(101, index.ntotal)
    truth = np.full((len(picked), k), -np.inf, np.float32)
    for start in range(0, index.ntotal, 65_536):
        scores = queries @ stored[start : start + 65_536].T
        truth = -np.partition(-np.concatenate([truth, scores], axis=1), k - 1, axis=1)[:, :k]
    truth = -np.sort(-truth, axis=1)
    began = time.perf_counter()
    found = np.concatenate([index.search(query[None], k)[0] for query in queries])
    latency_ms = (time.perf_counter() - began) / len(queries) * 1000
    return {
        **{f"recall_at_{n}": _recall(found, truth, n) for n in (1, 10, 100)},
        "latency_ms": round(latency_ms, 4),
    }


def _recall(found: Vectors, truth: Vectors, k: int) -> float:
    """Share of the k true neighbours found, by score; column 0 is the row itself."""
    k = min(k, truth.shape[1] - 1)
    if k <= 0:
        return 1.0
    threshold = truth[:, k : k + 1] - 1e-5
    return float((found[:, 1 : k + 1] >= threshold).mean())
