"""How an index is searched: the cheapest settings that reach its target, and what they reach.

A step of the ladder doubles what is read (nprobe, efSearch); for each step the least `k_factor` that
suffices follows from one long list of candidates, ranked by exact cosines. Of all that reach the aim the
one that reads least is taken, not the fastest as measured, so that equal builds are equal. The aim lies
above the target, so that a version stays above it while the corpus drifts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import faiss
import numpy as np

from pipeline.index.brute_force import cosines
from pipeline.index.engine import MIN_NEIGHBOURS, Engine, searching
from pipeline.index.lists import one_thread
from pipeline.index.record import Settings
from pipeline.index.truth import RECALL_AT, Truth, is_hit, share_found, without_self
from pipeline.index.vectors import Vectors

K = MIN_NEIGHBOURS
K_FACTORS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
_TUNING_QUERIES = 256
_TIMED_QUERIES = 128
_PAGE_BYTES = 4096
_GAIN = 1e-3  # less from a doubling means that it is not the ladder that limits


def aim_of(target: float) -> float:
    """The recall to tune for: a fifth of what the target lets pass."""
    return 1 - (1 - target) / 5


def tune(engine: Engine, truth: Truth, target: float) -> Settings:
    """The settings to search with: of those that reach the aim the cheapest, else those that find most."""
    some = slice(0, _TUNING_QUERIES)
    truth = Truth(truth.queries[some], truth.ids[some], truth.scores[some], truth.floor[some])
    if not len(truth.queries):
        return next(_ladder(engine))
    aim, tried = aim_of(target), []
    best = -1.0
    for step in _ladder(engine):
        before = best
        for settings, recall in _with_k_factor(engine.with_settings(step), truth, aim):
            tried.append((recall, settings))
            best = max(best, recall)
        if best >= aim and best - before < _GAIN:
            break
    reaching = [settings for recall, settings in tried if recall >= aim]
    if not reaching:
        return max(tried, key=lambda pair: pair[0])[1]
    return min(reaching, key=lambda settings: _bytes_read(engine, settings))


def quality(engine: Engine, truth: Truth) -> dict[str, float]:
    """recall_at_1, _10 and _100, and the median milliseconds of one query on one thread, by name."""
    queries = engine.store.take(truth.queries)
    recalls = {}
    for k in RECALL_AT:
        answers = without_self(truth.queries, *engine.search(queries, k + 1))
        recalls[f"recall_at_{k}"] = round(share_found(truth, engine.store, answers[1], k), 6)
    return {**recalls, "latency_ms": round(latency_ms(engine, queries[:_TIMED_QUERIES]), 4)}


def latency_ms(engine: Engine, queries_QD: Vectors) -> float:
    """Median milliseconds of a search for ten neighbours, one query at a time on one thread."""
    seconds = []
    with one_thread():
        for query in queries_QD:
            began = time.perf_counter()
            engine.search(query[None], K)
            seconds.append(time.perf_counter() - began)
    return float(np.median(seconds)) * 1000 if seconds else 0.0


def _bytes_read(engine: Engine, settings: Settings) -> float:
    """About what a query reads: its lists, and each candidate's vector with the pages around it."""
    candidates = settings.k_factor * K * (4 * engine.store.dim + _PAGE_BYTES)
    inner = searching(engine.index)
    if not isinstance(inner, faiss.IndexIVF):
        return candidates + (settings.ef_search or 0) * _PAGE_BYTES
    return float(candidates + (settings.nprobe or 1) / inner.nlist * inner.ntotal * inner.code_size)


def _ladder(engine: Engine) -> Iterator[Settings]:
    """Settings that read more and more; one step where a type has nothing to set."""
    inner = searching(engine.index)
    if isinstance(inner, faiss.IndexIVF):
        value = 1
        while value < inner.nlist:
            yield Settings(nprobe=value)
            value *= 2
        yield Settings(nprobe=inner.nlist)
    elif isinstance(inner, faiss.IndexHNSW):
        for value in (16, 32, 64, 128, 256, 512, 1024):
            yield Settings(ef_search=value)
    else:
        yield Settings()


def _with_k_factor(engine: Engine, truth: Truth, aim: float) -> Iterator[tuple[Settings, float]]:
    """The least k_factor with which a step reaches the aim, or the largest, and its recall@10."""
    outer = faiss.downcast_index(engine.index)
    factors: Any = K_FACTORS
    if isinstance(outer, faiss.IndexRefine):
        for factor in factors:
            settings = replace(engine.settings, k_factor=factor)
            recall = _searched(engine.with_settings(settings), truth)
            if recall >= aim or factor == factors[-1]:
                yield settings, recall
                return
    queries = engine.store.take(truth.queries)
    number = min(K * factors[-1], engine.index.ntotal - 1) + 1
    scores, ids = engine.candidates(queries, number)
    if _are_exact(engine, queries, scores, ids):
        yield engine.settings, _searched(engine, truth)
        return
    _, found = without_self(truth.queries, scores, ids)
    hits = np.cumsum(is_hit(truth, engine.store, found, K), axis=1)
    possible = np.maximum(np.minimum(K, (truth.ids >= 0).sum(axis=1)), 1)
    for factor in factors:
        reached = hits[:, min(K * factor, found.shape[1]) - 1] if found.shape[1] else possible
        recall = float((np.minimum(reached, possible) / possible).mean())
        if recall >= aim or factor == factors[-1]:
            yield replace(engine.settings, k_factor=factor), recall
            return


def _searched(engine: Engine, truth: Truth) -> float:
    answers = without_self(truth.queries, *engine.search(engine.store.take(truth.queries), K + 1))
    return share_found(truth, engine.store, answers[1], K)


def _are_exact(engine: Engine, queries: Vectors, scores: Vectors, ids: Any) -> bool:
    """Whether FAISS's scores are the cosines themselves, so that ranking again would change nothing."""
    exact = cosines(engine.store, queries, ids[:, :K])
    return bool(np.abs(np.where(ids[:, :K] < 0, 0, scores[:, :K] - exact)).max(initial=0) < 1e-5)
