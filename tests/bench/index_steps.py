"""The steps of the index's benchmark: each runs in a process of its own and prints a line of JSON last.

    python tests/bench/index_steps.py '{"do": "search_faiss", "corpus": […], "folder": "…"}'

A file by itself, since autofaiss's environment has neither this project nor its other packages.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np

if TYPE_CHECKING or __package__:
    from tests.bench.index_corpus import Corpus, K, Vectors, normalized
else:  # a script; autofaiss's environment has another package of the name `tests`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from index_corpus import Corpus, K, Vectors, normalized

NUM_CORES, NUM_WARM_UP, NUM_BATCHES = 2, 100, 3
TRAIN_ROWS_PER_LIST, NUM_TUNING_QUERIES = 40, 256
AVAILABLE_TO_BUDGET = (1.2, 2, 4, 8, 16)  # what autofaiss is told that it may take to build, until it does

Figures = dict[str, Any]


class FailedError(Exception):
    """A contender's process that failed or took too long, with its last words."""


def build_brute_force(corpus: Corpus, folder: Path, step: Figures) -> Figures:
    index = faiss.IndexFlatIP(corpus.dim)
    index.add(corpus.vectors())
    faiss.write_index(index, str(folder / "index.faiss"))
    return {"type": "Flat"}


def build_faiss_ivf_sq8(corpus: Corpus, folder: Path, step: Figures) -> Figures:
    vectors, rng = corpus.vectors(), np.random.default_rng(0)
    num_lists = 2 ** round(np.log2(4 * corpus.num_rows**0.5))
    index = faiss.index_factory(corpus.dim, f"IVF{num_lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    num_train = min(corpus.num_rows, TRAIN_ROWS_PER_LIST * num_lists)
    index.train(vectors[rng.choice(corpus.num_rows, num_train, replace=False)])
    index.add(vectors)
    began = time.perf_counter()
    nprobe = least_nprobe(index, vectors, num_lists, step["target_recall"])
    tune_s = round(time.perf_counter() - began, 2)
    faiss.write_index(index, str(folder / "index.faiss"))
    return {"type": f"IVF{num_lists},SQ8", "parameters": f"nprobe={nprobe}", "tune_s": tune_s}


def least_nprobe(index: Any, vectors: Vectors, num_lists: int, target_recall: float) -> int:
    """The least power of two with which rows find their neighbours, themselves not counted."""
    num_queries = min(len(vectors), NUM_TUNING_QUERIES)
    own = np.random.default_rng(1).choice(len(vectors), num_queries, replace=False)
    _, true = faiss.knn(vectors[own], vectors, K + 1, metric=faiss.METRIC_INNER_PRODUCT)
    nprobe = 1
    while True:
        index.nprobe = nprobe
        _, found = index.search(vectors[own], K + 1)
        pairs = zip(found.tolist(), true.tolist(), own.tolist(), strict=True)
        hits = sum(len(set(a) & set(b) - {row}) for a, b, row in pairs)
        if hits >= target_recall * K * len(own) or nprobe >= num_lists:
            return nprobe
        nprobe *= 2


def build_autofaiss(corpus: Corpus, folder: Path, step: Figures) -> Figures:
    from autofaiss import build_index  # type: ignore[import-not-found]

    for factor in AVAILABLE_TO_BUDGET:
        available = int(step["memory_budget"] * factor)
        index, told = build_index(
            embeddings=str(corpus.folder / "npy"),
            index_path=str(folder / "index.faiss"),
            index_infos_path=str(folder / "infos.json"),
            max_index_memory_usage=f"{step['memory_budget']}B",
            current_memory_available=f"{available}B",
            metric_type="ip",
            nb_cores=NUM_CORES,
        )
        if index is not None:
            break
    else:
        raise FailedError("autofaiss refused this budget, whatever it was told to be available")
    found = {"type": told["index_key"], "parameters": told["index_param"], "memory_available": available}
    return {**found, "versions": versions_of(("autofaiss", "faiss-cpu", "numpy"))}


def search_faiss(corpus: Corpus, folder: Path, step: Figures) -> Figures:
    index = faiss.read_index(str(folder / "index.faiss"))
    if step.get("parameters"):  # not all of them are in the file
        faiss.ParameterSpace().set_index_parameters(index, step["parameters"])
    return timed(lambda queries: index.search(normalized(queries), K)[1].tolist(), int, corpus, step)


def search_ours(corpus: Corpus, folder: Path, step: Figures) -> Figures:
    from pipeline.search import Searcher
    from pipeline.storage import Storage

    searcher = Searcher(Storage(str(folder)))
    return timed(
        lambda queries: searcher.nearest(queries, K), lambda hit: corpus.position(hit[0]), corpus, step
    )


def timed(
    search: Callable[[Vectors], list[Any]], position: Callable[[Any], int], corpus: Corpus, step: Figures
) -> Figures:
    """On one thread the latency and recall of single queries, on more how many a second in one call."""
    faiss.omp_set_num_threads(step["num_threads"])

    def elapsed(queries_QD: Vectors) -> tuple[list[Any], float]:
        began = time.perf_counter()
        found = search(queries_QD)
        return found, time.perf_counter() - began

    if step["num_threads"] > 1:
        batches_s = [elapsed(corpus.queries)[1] for _ in range(1 + NUM_BATCHES)]
        return {"queries_per_s": round(len(corpus.queries) / float(np.median(batches_s[1:])), 1)}
    for query in corpus.queries[:NUM_WARM_UP]:
        search(query[None])
    answers = [elapsed(query[None]) for query in corpus.queries]
    times_ms = [1000 * seconds for _, seconds in answers]
    return {
        "recall_at_10": corpus.recall_at_10([map(position, hits) for [hits], _ in answers]),
        "latency_ms": round(float(np.median(times_ms)), 4),
        "latency_p95_ms": round(float(np.percentile(times_ms, 95)), 4),
    }


def versions_of(distributions: Iterable[str]) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in distributions}


STEPS = {
    step.__name__: step
    for step in (build_brute_force, build_faiss_ivf_sq8, build_autofaiss, search_faiss, search_ours)
}


def run_step(step: Figures) -> None:
    corpus = Corpus(Path(step["corpus"][0]), *step["corpus"][1:])
    with contextlib.redirect_stdout(sys.stderr):
        result = STEPS[step["do"]](corpus, Path(step["folder"]), step)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    run_step(json.loads(sys.argv[1]))
