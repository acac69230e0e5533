"""The index against brute force, and its life cycle, on outputs made directly of commits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest


from pipeline.errors import OutputError, SearchError
from pipeline.index.build import build_index
from pipeline.storage import Storage
from tests.vector_output import Vectors, commit_vectors, empty_output

DIM = 16


@pytest.fixture
def output(tmp_path: Path) -> Storage:
    return empty_output(tmp_path / "out")


def random_vectors(seed: int, count: int) -> Vectors:
    return np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32) * 7 + 1


def test_an_index_answers_like_brute_force_over_the_committed_rows(output: Storage) -> None:
    shards = {"a.tar": random_vectors(1, 130), "b.tar": random_vectors(2, 70)}
    for name, vectors in shards.items():
        commit_vectors(output, name, vectors)

    record = build_index(output)

    stored = np.concatenate([shards["a.tar"], shards["b.tar"]]).astype(np.float64)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    queries = stored[::9]
    expected = np.argsort(-(queries @ stored.T), axis=1)[:, :5]
    scores, ids = load_faiss(output, record).search(queries.astype(np.float32), 5)
    assert (ids == expected).all()
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ stored.T, expected, axis=1), atol=1e-6)


def test_ids_name_every_committed_image_once_in_the_order_of_the_index(output: Storage) -> None:
    commit_vectors(output, "a.tar", random_vectors(1, 3))
    commit_vectors(output, "b.tar", random_vectors(2, 2))

    record = build_index(output)

    table = pq.read_table(output.path(f"index/{current_version(output)}/ids.parquet"))
    assert table.column_names == ["faiss_id", "image_id"]
    assert table.column("faiss_id").to_pylist() == [0, 1, 2, 3, 4]
    assert table.column("image_id").to_pylist() == ["a.tar#0", "a.tar#1", "a.tar#2", "b.tar#0", "b.tar#1"]
    assert [(shard.first_id, shard.num_vectors) for shard in record.shards] == [(0, 3), (3, 2)]


def test_the_record_tells_type_size_and_quality_under_the_contracts_names(output: Storage) -> None:
    commit_vectors(output, "a.tar", random_vectors(1, 300))

    build_index(output)

    values = json.loads(output.read_bytes(f"index/{current_version(output)}/index.json"))
    assert (values["type"], values["num_vectors"], values["dim"]) == ("exact", 300, DIM)
    assert values["metric"] == "cosine"
    assert values["recall_at_1"] == values["recall_at_10"] == values["recall_at_100"] == 1.0
    assert values["latency_ms"] > 0


def test_recall_is_measured_and_not_assumed(output: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    commit_vectors(output, "a.tar", random_vectors(1, 300))

    class Forgetful:
        def __init__(self, index: object) -> None:
            self._index = index

        def __getattr__(self, name: str) -> object:
            return getattr(self._index, name)

        def search(self, query: Vectors, k: int) -> tuple[Vectors, object]:
            scores, ids = self._index.search(query, k)  # type: ignore[attr-defined]
            scores[:, 2:] = -1.0
            return scores, ids

    add_all = index_module._add_all

    def forgetful(*arguments: object) -> tuple[object, object, object]:
        index, shards, excluded = add_all(*arguments)  # type: ignore[arg-type]
        return Forgetful(index), shards, excluded

    monkeypatch.setattr(index_module, "_add_all", forgetful)
    monkeypatch.setattr(index_module.faiss, "write_index", lambda index, path: Path(path).write_bytes(b""))

    record = build_index(output)

    assert record.recall_at_1 == 1.0
    assert record.recall_at_10 == pytest.approx(0.1)
    assert record.recall_at_100 == pytest.approx(0.01)


def test_vectors_without_a_direction_are_left_out_and_counted(output: Storage) -> None:
    vectors = random_vectors(1, 5)
    vectors[1] = 0
    vectors[3, 2] = np.nan
    commit_vectors(output, "a.tar", vectors)

    record = build_index(output)

    assert (record.num_vectors, record.num_excluded) == (3, 2)
    ids = pq.read_table(output.path(f"index/{record.version}/ids.parquet")).column("image_id").to_pylist()
    assert ids == ["a.tar#0", "a.tar#2", "a.tar#4"]


def test_an_index_of_the_same_commits_is_not_built_again_and_new_commits_make_a_new_version(
    output: Storage,
) -> None:
    commit_vectors(output, "a.tar", random_vectors(1, 5))
    first = build_index(output)

    assert build_index(output) == first

    commit_vectors(output, "b.tar", random_vectors(2, 5))
    second = build_index(output)
    assert second.version != first.version
    assert second.num_vectors == 10
    assert current_version(output) == second.version


def test_rows_of_a_superseded_shard_are_gone_from_the_next_version(output: Storage) -> None:
    old = commit_vectors(output, "a.tar", random_vectors(1, 5))
    build_index(output)
    commit_vectors(output, "a.tar", random_vectors(3, 4), supersedes=(old,))

    assert build_index(output).num_vectors == 4


def test_a_build_that_dies_leaves_the_served_version_as_it_was(
    output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_vectors(output, "a.tar", random_vectors(1, 5))
    served = build_index(output)
    commit_vectors(output, "b.tar", random_vectors(2, 5))

    def die(index: object, path: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index_module.faiss, "write_index", die)
        with pytest.raises(KeyboardInterrupt):
            build_index(output)

    assert read_record(output) == served
    assert load_faiss(output, served).ntotal == 5
    assert build_index(output).num_vectors == 10


def test_old_versions_are_kept_by_count(output: Storage) -> None:
    versions = []
    for number in range(4):
        commit_vectors(output, f"{number}.tar", random_vectors(number, 3))
        versions.append(build_index(output).version)

    kept = {info.path.split("/")[1] for info in output.find("index") if info.path.count("/") == 2}
    assert versions[-1] in kept
    assert len(kept) == index_module.KEEP_VERSIONS


def test_a_damaged_index_file_is_refused_before_it_is_parsed(output: Storage) -> None:
    commit_vectors(output, "a.tar", random_vectors(1, 5))
    record = build_index(output)
    path = Path(output.path(f"index/{record.version}/index.faiss"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))

    with pytest.raises(SearchError, match="missing or damaged"):
        load_faiss(output, record)


def test_a_missing_index_and_an_empty_output_name_the_remedy(output: Storage, tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="run: cvt-pipeline index"):
        read_record(output)
    with pytest.raises(OutputError, match="run extract first"):
        build_index(output)
    with pytest.raises(OutputError, match="not an output of extract"):
        build_index(Storage(str(tmp_path / "elsewhere")))
    assert not output.exists(CURRENT)
