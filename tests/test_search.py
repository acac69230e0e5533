"""Search by vector, by id and by file, on indexes made directly of commits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import SearchError
from pipeline.index import engine as engine_module
from pipeline.index.build import build_index
from pipeline.query import Queries, find, read_query, read_vectors_file, write_hits
from pipeline.search import Searcher
from pipeline.storage import Storage
from tests.test_index import DIM, clustered, config, output, random_vectors
from tests.vector_output import Vectors, commit_vectors

__all__ = ["output"]  # the fixture


@pytest.fixture
def searcher(output: Storage) -> Searcher:
    commit_vectors(output, "a.tar", random_vectors(1, 40))
    commit_vectors(output, "b.tar", random_vectors(2, 30))
    build_index(output)
    return Searcher(output)


def test_hits_carry_what_was_committed_beside_the_vector(searcher: Searcher) -> None:
    hit = searcher.by_vector(random_vectors(2, 30)[7], k=3)[0]

    assert (hit.image_id, hit.shard, hit.key) == ("b.tar#7", "b.tar", "7")
    assert hit.label == "label of b.tar#7"
    assert hit.score == pytest.approx(1.0, abs=1e-6)


def test_scores_are_cosines_whatever_the_length_of_the_query(searcher: Searcher) -> None:
    query, stored = random_vectors(9, 1)[0], random_vectors(1, 40).astype(np.float64)

    hits = searcher.by_vector(query * 1000, k=70)

    cosines = stored @ query / np.linalg.norm(stored, axis=1) / np.linalg.norm(query.astype(np.float64))
    found = {hit.image_id: hit.score for hit in hits}
    assert len(found) == 70
    for number, cosine in enumerate(cosines):
        assert found[f"a.tar#{number}"] == pytest.approx(cosine, abs=1e-5)


def test_an_image_finds_itself_first_even_among_exact_copies(output: Storage) -> None:
    vectors = random_vectors(1, 6)
    vectors[:] = vectors[0]
    commit_vectors(output, "a.tar", vectors)
    build_index(output)

    for number in range(6):
        assert Searcher(output).by_id(f"a.tar#{number}", k=2)[0].image_id == f"a.tar#{number}"


def test_more_neighbours_than_there_are_images_gives_them_all(searcher: Searcher) -> None:
    assert len(searcher.by_id("a.tar#0", k=1000)) == 70


def test_an_unknown_id_and_an_unusable_vector_are_told(searcher: Searcher) -> None:
    with pytest.raises(SearchError, match=r"no image a\.tar#99"):
        searcher.by_id("a.tar#99")
    with pytest.raises(SearchError, match=f"has 3 numbers, the index {DIM}"):
        searcher.by_vector(np.ones(3, np.float32))
    with pytest.raises(SearchError, match="zero or not finite"):
        searcher.by_vector(np.zeros(DIM, np.float32))
    with pytest.raises(SearchError, match="zero or not finite"):
        searcher.by_vector(np.full(DIM, np.nan, np.float32))


def test_a_shard_that_was_redone_since_still_gives_the_id(searcher: Searcher, output: Storage) -> None:
    (stem,) = [shard.stem for shard in searcher.record.shards if shard.stem.startswith("b.tar")]
    output.delete(f"embeddings/{stem}.parquet")

    hit = searcher.by_vector(random_vectors(2, 30)[7], k=1)[0]

    assert hit.image_id == "b.tar#7"
    assert hit.shard is None


def test_a_vector_file_is_read_without_ever_unpickling(tmp_path: Path) -> None:
    good, pickled, wide = tmp_path / "good.npy", tmp_path / "pickled.npy", tmp_path / "wide.npy"
    np.save(good, np.arange(DIM, dtype=np.float64)[None])
    np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(wide, np.ones((2, DIM)))

    names, vectors = read_vectors_file(good)
    assert names == [str(good)]
    assert vectors.tolist() == [list(range(DIM))]
    assert read_vectors_file(wide)[0] == [f"{wide}#0", f"{wide}#1"]
    with pytest.raises(SearchError, match=r"cannot read the query vector"):
        read_vectors_file(pickled)


def test_a_query_image_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match=r"nothing\.jpg"):
        read_query(str(tmp_path / "nothing.jpg"))


def brute_force(vectors: Vectors, query: Vectors, passing: list[int], k: int) -> set[str]:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    order = sorted(passing, key=lambda n: -float(unit[n] @ query))
    return {f"a.tar#{n}" for n in order[:k]}


@pytest.mark.parametrize("kind", ["exact", "ivf_sq8", "ivf_rabitq", "hnsw", "SQ8"])
@pytest.mark.parametrize("every", [2, 100, 2000])
def test_a_filter_gives_the_nearest_of_those_that_pass(
    output: Storage, monkeypatch: pytest.MonkeyPatch, kind: str, every: int
) -> None:
    monkeypatch.setattr(engine_module, "BRUTE_FORCE_ROWS", 30)
    vectors = clustered(1, 4000)
    commit_vectors(output, "a.tar", vectors, columns={"number": list(range(4000))})
    build_index(output, config(kind))
    searcher, passing = Searcher(output), list(range(0, 4000, every))
    found = total = 0
    for query in clustered(2, 40):
        hits = searcher.nearest(query[None], 10, f"number % {every} = 0")[0]
        true = brute_force(vectors, query, passing, 10)
        assert len(hits) == len(true)
        found += len(true & {name for name, _ in hits})
        total += len(true)
    assert found >= 0.95 * total


def test_a_filter_whose_images_all_lie_far_from_the_query_still_gives_the_nearest_of_them(
    output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "BRUTE_FORCE_ROWS", 30)
    vectors = clustered(1, 3000)
    away = vectors @ vectors[0] < 0  # the half of the images that looks another way
    commit_vectors(output, "a.tar", vectors, columns={"away": away.tolist()})
    build_index(output, config("ivf_sq8"))

    hits = Searcher(output).nearest(vectors[:1], 10, "away")[0]

    true = brute_force(vectors, vectors[0], np.flatnonzero(away).tolist(), 10)
    assert len(true & {name for name, _ in hits}) >= 9


def test_a_filter_that_leaves_the_query_out_leaves_it_out_of_its_own_neighbours(searcher: Searcher) -> None:
    hits = searcher.by_id("a.tar#3", 5, where="key <> '3'")
    assert len(hits) == 5
    assert all(hit.key != "3" for hit in hits)
    assert searcher.by_id("a.tar#3", 5, where="shard = 'a.tar'")[0].image_id == "a.tar#3"
    assert searcher.by_id("a.tar#3", 5, where="key = 'nothing'") == []


def test_many_queries_are_answered_into_a_parquet_file(searcher: Searcher, output: Storage) -> None:
    folder = Path(output.root)
    np.save(folder / "many.npy", random_vectors(2, 30))
    table = pa.table({"image_id": ["x", "y"], "embedding": random_vectors(1, 2).tolist()})
    pq.write_table(table, folder / "many.parquet")

    assert write_hits(output, Queries(vectors=folder / "many.npy"), folder / "hits.parquet", k=3) == (
        30,
        90,
    )

    hits = pq.read_table(folder / "hits.parquet").to_pylist()
    assert [row["rank"] for row in hits[:4]] == [1, 2, 3, 1]
    assert [row["image_id"] for row in hits[::3]] == [f"b.tar#{n}" for n in range(30)]
    assert hits[0]["score"] == pytest.approx(1.0, abs=1e-6)
    write_hits(output, Queries(vectors=folder / "many.parquet"), folder / "hits.parquet", k=2)
    names = pq.read_table(folder / "hits.parquet").column("query").to_pylist()
    assert names == ["x", "x", "y", "y"]
    write_hits(output, Queries(image_ids=("a.tar#1", "b.tar#2")), folder / "hits.parquet", k=1)
    assert pq.read_table(folder / "hits.parquet").column("image_id").to_pylist() == ["a.tar#1", "b.tar#2"]


def test_a_query_that_fails_leaves_no_file_of_hits(searcher: Searcher, output: Storage) -> None:
    folder = Path(output.root)
    with pytest.raises(SearchError, match="no image nowhere"):
        write_hits(output, Queries(image_ids=("a.tar#1", "nowhere")), folder / "hits.parquet", k=1)
    assert not (folder / "hits.parquet").exists()


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"image_id": ["x"]}, "has no column embedding"),
        ({"embedding": [[1.0, 2.0], [1.0]]}, "of one length"),
        ({"embedding": ["text"]}, "of one length"),
        ({"embedding": [None]}, "of one length"),
    ],
)
def test_a_parquet_file_without_usable_vectors_is_told(
    tmp_path: Path, columns: dict[str, list[object]], said: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "queries.parquet")
    with pytest.raises(SearchError, match=said):
        read_vectors_file(tmp_path / "queries.parquet")


def test_answers_come_one_for_each_query(searcher: Searcher, output: Storage) -> None:
    answers = list(find(output, Queries(image_ids=("a.tar#1", "b.tar#2")), k=2))
    assert [(answer.query, answer.hits[0].image_id) for answer in answers] == [
        ("a.tar#1", "a.tar#1"),
        ("b.tar#2", "b.tar#2"),
    ]
