"""The index against brute force, and its life from night to night, on outputs made directly of commits."""

from __future__ import annotations

import json
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.commits import CommitLog, remove_commits
from pipeline.config import IndexConfig
from pipeline.errors import BusyError, ConfigError, LimitError, OutputError, SearchError
from pipeline.index import build as build_module
from pipeline.index.build import build_index, roll_back_index
from pipeline.index.files import CURRENT, LEASE
from pipeline.index.record import IndexRecord, current_version, read_ids, read_record, versions
from pipeline.lease import acquire
from pipeline.search import Searcher
from pipeline.storage import Storage
from tests.vector_output import Vectors, commit_vectors, empty_output

DIM = 16
TYPES = ("exact", "ivf_flat", "ivf_sq8", "ivf_rabitq", "opq_ivf_pq", "hnsw", "IVF16,PQ8x4fs", "SQ8")
REFINED = "IVF16,SQ4,Refine(SQfp16)"


@pytest.fixture
def output(tmp_path: Path) -> Storage:
    return empty_output(tmp_path / "out")


def random_vectors(seed: int, count: int) -> Vectors:
    return np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32) * 7 + 1


def clustered(seed: int, count: int) -> Vectors:
    """Vectors that lie around forty centres, as embeddings do, the same for every seed."""
    centres = np.random.default_rng(99).normal(size=(40, DIM))
    rng = np.random.default_rng(seed)
    near = centres[rng.integers(40, size=count)] + 0.4 * rng.normal(size=(count, DIM))
    return (near * 3).astype(np.float32)


def config(kind: str = "auto", target: float = 0.9, **values: object) -> IndexConfig:
    return IndexConfig.model_validate({"type": kind, "target_recall": target, **values})


def committed(output: Storage) -> dict[str, Vectors]:
    """Image id to unit vector of every committed row that has a direction, from the files themselves."""
    log, rows = CommitLog(output), {}
    for commit in log.read(log.live):
        table = pq.read_table(output.path(commit.embeddings.path))
        for row in table.to_pylist():
            vector = np.array(row["embedding"], np.float64)
            if np.isfinite(vector).all() and vector.any():
                rows[row["image_id"]] = vector / np.linalg.norm(vector)
    return rows


def assert_of_committed_rows(output: Storage, least_recall: float = 0.9) -> None:
    """The served index has just the committed images, and answers as brute force over them does."""
    searcher, rows = Searcher(output), committed(output)
    assert sorted(searcher.image_ids) == sorted(rows)
    names, matrix = list(rows), np.stack(list(rows.values()))
    picked = np.arange(0, len(names), max(1, len(names) // 100))
    scores = matrix[picked] @ matrix.T
    found = searcher.nearest(matrix[picked].astype(np.float32), 10)
    right = 0
    for query, hits in zip(scores, found, strict=True):
        true = np.sort(query)[::-1][: min(10, len(names))]
        assert len(hits) == len(true)
        assert len({name for name, _ in hits}) == len(hits)
        right += sum(score >= true[-1] - 1e-5 for _, score in hits)
        for name, score in hits:
            assert score == pytest.approx(float(query[names.index(name)]), abs=2e-3)
    assert right / (len(found) * min(10, len(names))) >= least_recall


def test_an_exact_index_answers_like_brute_force_over_the_committed_rows(output: Storage) -> None:
    shards = {"a.tar": random_vectors(1, 130), "b.tar": random_vectors(2, 70)}
    for name, vectors in shards.items():
        commit_vectors(output, name, vectors)

    record = build_index(output)

    stored = np.concatenate([shards["a.tar"], shards["b.tar"]]).astype(np.float64)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    queries = stored[::9]
    expected = np.argsort(-(queries @ stored.T), axis=1)[:, :5]
    index = faiss.read_index(output.path(f"{record.folder}/index.faiss"))
    scores, ids = index.search(queries.astype(np.float32), 5)
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

    record = build_index(output)

    data = output.read_bytes(f"index/{current_version(output)}/index.json")
    values = json.loads(data)
    assert (values["type"], values["num_vectors"], values["dim"]) == ("exact", 300, DIM)
    assert values["metric"] == "cosine"
    assert values["recall_at_1"] == values["recall_at_10"] == values["recall_at_100"] == 1.0
    assert values["latency_ms"] > 0
    assert values["peak_memory_bytes"] > 10_000_000
    assert IndexRecord.from_json(data) == record


@pytest.mark.parametrize("kind", [*TYPES, REFINED])
def test_every_type_follows_rows_that_come_change_and_go(output: Storage, kind: str) -> None:
    for name in "abcd":
        commit_vectors(output, f"{name}.tar", clustered(ord(name), 300))
    build_index(output, config(kind))
    assert_of_committed_rows(output)
    log = CommitLog(output)
    changed = next(stem for stem in log.live if stem.startswith("b.tar"))
    gone = next(stem for stem in log.live if stem.startswith("c.tar"))
    commit_vectors(output, "b.tar", clustered(7, 290), supersedes=(changed,))
    commit_vectors(output, "e.tar", clustered(8, 310))
    remove_commits(output, [gone])

    record = build_index(output, config(kind))

    assert_of_committed_rows(output)
    if kind in ("exact", "ivf_flat", "ivf_sq8", "ivf_rabitq", "opq_ivf_pq"):
        assert record.reason == "follows its parent"
        index = faiss.read_index(output.path(f"{record.folder}/index.faiss"))
        assert index.ntotal == record.num_vectors == 1200


@pytest.mark.parametrize("kind", ["hnsw", REFINED])
def test_types_that_cannot_delete_keep_dead_rows_to_themselves_and_are_made_anew_at_a_tenth(
    output: Storage, kind: str
) -> None:
    for name in "abcdefghij":
        commit_vectors(output, f"{name}.tar", clustered(ord(name), 100))
    commit_vectors(output, "small.tar", clustered(1, 50))
    build_index(output, config(kind))
    stems = sorted(CommitLog(output).live)
    remove_commits(output, stems[-1:])

    record = build_index(output, config(kind))

    assert (record.num_dead, record.num_vectors) == (50, 1000)
    index = faiss.read_index(output.path(f"{record.folder}/index.faiss"))
    assert index.ntotal == 1050
    assert_of_committed_rows(output)

    remove_commits(output, stems[:1])
    record = build_index(output, config(kind))
    assert (record.num_dead, record.num_vectors) == (0, 900)
    assert "deleted images" in record.reason
    assert_of_committed_rows(output)


def test_ten_nights_end_with_just_the_committed_rows_and_the_recall_that_was_asked_for(
    output: Storage,
) -> None:
    rng = np.random.default_rng(3)
    names = [f"{number:03d}.tar" for number in range(40)]
    stems = {name: commit_vectors(output, name, clustered(n, 50)) for n, name in enumerate(names)}
    first = build_index(output, config("ivf_sq8", 0.95))
    for night in range(10):
        changed, gone = rng.choice(sorted(stems), 2, replace=False)
        stems[changed] = commit_vectors(
            output, changed, clustered(1000 + night, 50), supersedes=(stems[changed],)
        )
        remove_commits(output, [stems.pop(gone)])
        for number in range(2):
            name = f"night{night}-{number}.tar"
            stems[name] = commit_vectors(output, name, clustered(2000 + 10 * night + number, 50))

        record = build_index(output, config("ivf_sq8", 0.95))

        assert record.reason == "follows its parent"
        assert record.recall_at_10 >= 0.95
        assert_of_committed_rows(output, 0.95)
    assert record.num_vectors == first.num_vectors + 10 * 50
    assert record.next_id == first.next_id + 10 * 150


def test_appending_more_than_was_trained_on_trains_again(output: Storage) -> None:
    commit_vectors(output, "a.tar", clustered(1, 500))
    build_index(output, config("ivf_sq8"))
    commit_vectors(output, "b.tar", clustered(2, 600))

    assert "were trained on" in build_index(output, config("ivf_sq8")).reason


def test_lists_that_became_uneven_are_trained_again(output: Storage) -> None:
    commit_vectors(output, "a.tar", clustered(1, 1200))
    before = build_index(output, config("ivf_sq8"))
    lump = np.ones((900, DIM), np.float32) + clustered(5, 900) / 100
    commit_vectors(output, "b.tar", lump)

    record = build_index(output, config("ivf_sq8"))

    assert before.imbalance is not None
    assert record.parent is None
    assert_of_committed_rows(output)


def test_recall_is_measured_and_a_version_under_the_target_is_not_published(output: Storage) -> None:
    commit_vectors(output, "a.tar", random_vectors(1, 300))
    served = build_index(output)
    commit_vectors(output, "b.tar", random_vectors(2, 700))

    with pytest.raises(LimitError, match=r"recall@10 of the new index is 0\.\d+, under"):
        build_index(output, config("PQ1x2", 0.999))

    assert read_record(output) == served
    assert versions(output) == [served.version]


def test_vectors_without_a_direction_are_left_out_and_counted(output: Storage) -> None:
    vectors = random_vectors(1, 5)
    vectors[1] = 0
    vectors[3, 2] = np.nan
    commit_vectors(output, "a.tar", vectors)

    record = build_index(output)

    assert (record.num_vectors, record.num_excluded) == (3, 2)
    assert read_ids(output, record).column("image_id").to_pylist() == ["a.tar#0", "a.tar#2", "a.tar#4"]
    commit_vectors(output, "b.tar", np.zeros((2, DIM), np.float32))
    record = build_index(output)
    assert (record.num_vectors, record.num_excluded) == (3, 4)
    assert_of_committed_rows(output)


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


@pytest.mark.parametrize("step", ["open_faiss", "make_truth", "quality", "publish"])
def test_a_build_that_dies_leaves_the_served_version_as_it_was(
    output: Storage, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    commit_vectors(output, "a.tar", random_vectors(1, 5))
    served = build_index(output)
    commit_vectors(output, "b.tar", random_vectors(2, 5))

    def die(*arguments: object, **others: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_module, step, die)
        with pytest.raises(KeyboardInterrupt):
            build_index(output)

    assert read_record(output) == served
    assert len(Searcher(output).image_ids) == 5
    assert build_index(output).num_vectors == 10
    assert not output.exists("index/_build")


def test_old_versions_are_kept_by_count_and_with_them_the_vectors_they_need(output: Storage) -> None:
    made = []
    for number in range(5):
        commit_vectors(output, f"{number}.tar", random_vectors(number, 3))
        made.append(build_index(output, config(keep_versions=2)).version)

    assert versions(output) == made[-2:]
    vectors = [info.path for info in output.find("index/_vectors")]
    assert len(vectors) == 5
    for stem in CommitLog(output).live:
        remove_commits(output, [stem])
    commit_vectors(output, "new.tar", random_vectors(9, 3))
    for _ in range(2):
        commit_vectors(output, f"more{_}.tar", random_vectors(9, 3))
        build_index(output, config(keep_versions=1))
    assert len(list(output.find("index/_vectors"))) <= 2
    assert_of_committed_rows(output)


def test_a_rollback_serves_the_version_before_and_the_next_build_goes_on_from_there(
    output: Storage,
) -> None:
    commit_vectors(output, "a.tar", random_vectors(1, 5))
    first = build_index(output)
    with pytest.raises(SearchError, match="no whole version of the index before"):
        roll_back_index(output)
    commit_vectors(output, "b.tar", random_vectors(2, 5))
    build_index(output)

    assert roll_back_index(output) == first

    assert Searcher(output).record == first
    record = build_index(output)
    assert (record.num_vectors, record.parent) == (10, first.version)
    assert_of_committed_rows(output)


def test_a_reader_of_an_old_version_is_undisturbed_by_a_new_one(output: Storage) -> None:
    commit_vectors(output, "a.tar", clustered(1, 400))
    build_index(output, config("ivf_sq8"))
    searcher, query = Searcher(output), clustered(5, 1)
    before = Searcher(output).nearest(query, 5)
    [stem] = CommitLog(output).live
    commit_vectors(output, "a.tar", clustered(2, 300), supersedes=(stem,))
    build_index(output, config("ivf_sq8", keep_versions=1))

    assert len(list(output.find("index/_vectors"))) == 1  # those of the old version are deleted
    assert searcher.nearest(query, 5) == before


@pytest.mark.parametrize("name", ["index.faiss", "ids.parquet"])
def test_a_damaged_file_is_refused_before_it_is_parsed_and_made_again(output: Storage, name: str) -> None:
    commit_vectors(output, "a.tar", random_vectors(1, 5))
    record = build_index(output)
    path = Path(output.path(f"index/{record.version}/{name}"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))

    with pytest.raises(SearchError, match="missing or damaged"):
        Searcher(output)
    path.write_bytes(data[:-9])
    with pytest.raises(SearchError, match="missing or damaged"):
        Searcher(output)
    assert build_index(output).version != record.version
    assert_of_committed_rows(output)


def test_a_missing_index_and_an_empty_output_name_the_remedy(output: Storage, tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="run: cvt-pipeline index"):
        read_record(output)
    with pytest.raises(OutputError, match="run extract first"):
        build_index(output)
    with pytest.raises(OutputError, match="not an output of extract"):
        build_index(Storage(str(tmp_path / "elsewhere")))
    assert not output.exists(CURRENT)


def test_a_second_build_at_the_same_time_is_refused(output: Storage) -> None:
    commit_vectors(output, "a.tar", random_vectors(1, 5))
    lease = acquire(output, "other", 60, LEASE)
    with pytest.raises(BusyError, match="held by run other"):
        build_index(output)
    lease.release()
    assert build_index(output).num_vectors == 5


@pytest.mark.parametrize("kind", ["nonsense", "IVF99999,Flat"])
def test_a_type_that_faiss_does_not_know_or_cannot_train_is_a_config_error(
    output: Storage, kind: str
) -> None:
    commit_vectors(output, "a.tar", random_vectors(1, 50))
    with pytest.raises(ConfigError, match=r"index\.type"):
        build_index(output, config(kind))
    assert not output.exists(CURRENT)
