"""Search by vector, by id and by file, on indexes made directly of commits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import SearchError
from pipeline.index.build import build_index
from pipeline.query import read_query, read_vectors_file
from pipeline.search import Searcher
from pipeline.storage import Storage
from tests.test_index import DIM, commit_vectors, output, random_vectors

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
