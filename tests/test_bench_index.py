"""The index's benchmark: what its figures are made from. Nothing here asks how fast anything is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.commits import CommitLog
from pipeline.storage import Storage
from tests.bench.bench_index import FIGURES, FailedError, measured
from tests.bench.index_corpus import Corpus, corpus_in

ROOT = Path(__file__).parents[1]
ROWS, DIM = 3000, 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return corpus_in(tmp_path_factory.mktemp("work"), ROWS, DIM)


def exact_cosines(corpus: Corpus) -> Any:
    queries = corpus.queries.astype(np.float64)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    return queries @ corpus.vectors().astype(np.float64).T


def test_the_corpus_is_an_output_whose_rows_are_found_by_their_ids(corpus: Corpus) -> None:
    output = Storage(str(corpus.output))
    log = CommitLog(output)
    commits = log.read(log.live)
    files = [pq.read_table(output.path(commit.embeddings.path)) for commit in commits]
    ids = [image_id for table in files for image_id in table.column("image_id").to_pylist()]

    assert [corpus.position(image_id) for image_id in ids] == list(range(ROWS))
    lengths = np.linalg.norm(files[0].column("embedding").to_pylist(), axis=1)
    assert lengths.std() > 0.1
    np.testing.assert_allclose(np.linalg.norm(corpus.vectors(), axis=1), 1, atol=1e-6)


def test_a_corpus_is_made_once_and_is_the_same_elsewhere(corpus: Corpus, tmp_path: Path) -> None:
    before = corpus.output.stat().st_ctime_ns
    assert corpus_in(corpus.folder.parent, ROWS, DIM).output.stat().st_ctime_ns == before

    other = corpus_in(tmp_path, ROWS, DIM)
    assert (other.vectors() == corpus.vectors()).all()
    assert (other.queries == corpus.queries).all()


def test_the_truth_is_that_of_brute_force_and_ties_may_stand_for_one_another(corpus: Corpus) -> None:
    cosines = exact_cosines(corpus)
    best = np.argsort(-cosines, axis=1)[:, :10]

    assert corpus.recall_at_10(best.tolist()) == 1.0
    assert corpus.recall_at_10(best[:, ::-1].tolist()) == 1.0
    assert corpus.recall_at_10(best[:, :7].tolist()) == pytest.approx(0.7)
    assert corpus.recall_at_10([[row[0]] * 10 for row in best.tolist()]) == pytest.approx(0.1)
    worst = np.argsort(cosines, axis=1)[:, :10]
    assert corpus.recall_at_10(worst.tolist()) == 0.0


@pytest.mark.slow
def test_one_run_prints_the_figures_of_all_and_null_for_rivals_that_are_absent(corpus: Corpus) -> None:
    words = [
        "--rows",
        ROWS,
        "--dim",
        DIM,
        "--memory-budget",
        "1GB",
        "--json",
        "--rivals",
        "brute,autofaiss",
    ]
    environment = {**os.environ, "CVT_BENCH_AUTOFAISS_PYTHON": ""}

    done = subprocess.run(
        [sys.executable, "tests/bench/bench_index.py", *map(str, words), "--work", corpus.folder.parent],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    )

    result = json.loads(done.stdout)
    assert {*FIGURES, "rows", "dim", "memory_budget", "hardware", "versions", "rivals"} <= result.keys()
    assert result["type"] == "exact"
    assert result["recall_at_10"] == 1.0
    assert 0 < result["build_s_inside"] < result["build_s"]
    assert min(result[name] for name in FIGURES[1:]) > 0
    brute_force = result["rivals"].pop("brute_force")
    assert brute_force["recall_at_10"] == 1.0
    assert list(brute_force) == list(FIGURES)
    assert result["rivals"] == {"faiss_ivf_sq8": None, "autofaiss": None}
    assert [path.name for path in corpus.folder.parent.iterdir()] == [corpus.folder.name]
    assert not (corpus.output / "index").exists()


def test_memory_is_that_of_children_too_and_not_that_of_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(200_000_000))
    child = "import time; block = bytearray(100_000_000); time.sleep(3)"
    parent = (
        f"import mmap, subprocess, sys; file = open({str(tmp_path / 'file')!r}, 'rb')\n"
        "pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ); sum(pages[::4096])\n"
        f"subprocess.run([sys.executable, '-c', {child!r}]); print('{{}}')"
    )

    told, cost = measured([sys.executable, "-c", parent], num_threads=1)

    assert told == {}
    assert 100_000_000 < cost["peak_bytes"] < 150_000_000
    assert cost["wall_s"] > 3


def test_a_process_that_fails_or_takes_too_long_is_told_with_its_last_words() -> None:
    with pytest.raises(FailedError, match="exit 3: out of luck"):
        measured([sys.executable, "-c", "import sys; sys.stderr.write('out of luck'); sys.exit(3)"], 1)
    with pytest.raises(FailedError, match="not done after 0 s"):
        measured(["sleep", "60"], 1, timeout_s=0.1)
