"""Groups of duplicates against brute force over the committed files, and what is published of them."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import dedup as dedup_module
from pipeline import published as published_module
from pipeline import schema
from pipeline.commits import CommitLog
from pipeline.config import DedupConfig, IndexConfig
from pipeline.dedup import DedupSummary, find_duplicates
from pipeline.dedup_sample import write_sample
from pipeline.errors import ConfigError, SearchError
from pipeline.index import engine as engine_module
from pipeline.index.build import build_index
from pipeline.storage import Storage
from tests.conftest import encode, make_image
from tests.running import cli, write_tar
from tests.vector_output import Vectors, commit_vectors, digests_of, empty_output

DIM = 16


@pytest.fixture
def output(tmp_path: Path) -> Storage:
    return empty_output(tmp_path / "out")


@pytest.fixture
def by_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours come from FAISS, as those of many images do, and not from a look at each row."""
    monkeypatch.setattr(engine_module, "BRUTE_FORCE_ROWS", 0)


def directions(seed: int, count: int) -> Vectors:
    """Random unit vectors, hardly two of them near each other."""
    rows = np.random.default_rng(seed).normal(size=(count, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def copies(originals: Vectors, count: int, noise: float, seed: int = 0) -> Vectors:
    """`count` rows, each a random one of `originals`, disturbed."""
    rng = np.random.default_rng(seed)
    picked = originals[rng.integers(len(originals), size=count)]
    return (picked + noise * rng.normal(size=picked.shape)).astype(np.float32)


def beside(vector: Vectors, cosine: float) -> Vectors:
    """A unit vector with this cosine to another one."""
    other = directions(77, 1)[0].astype(np.float64)
    other -= (other @ vector) * vector
    return np.asarray(cosine * vector + (1 - cosine**2) ** 0.5 * other / np.linalg.norm(other), np.float32)


def commit(
    output: Storage, name: str, vectors: Vectors, contents: list[str] | None = None, **columns: Any
) -> str:
    """Commit images; those with the same `contents` are the same bytes."""
    if contents is not None:
        columns["sha256"] = digests_of(contents)
    return commit_vectors(output, name, vectors, columns=columns)


def found(output: Storage, threshold: float = 0.95) -> DedupSummary:
    return find_duplicates(output, DedupConfig(threshold=threshold))


def published(output: Storage) -> list[dict[str, Any]]:
    """The rows of the version that CURRENT names."""
    return pq.read_table(output.path(f"dedup/{version_of(output)}/groups.parquet")).to_pylist()


def version_of(output: Storage) -> str:
    return output.read_bytes("dedup/CURRENT").decode()


def groups_in(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The ids of each group, by its number."""
    numbers = sorted({row["group"] for row in rows})
    assert numbers == list(range(len(numbers)))
    return [[row["image_id"] for row in rows if row["group"] == number] for number in numbers]


def committed(output: Storage) -> list[dict[str, Any]]:
    log = CommitLog(output)
    tables = (pq.read_table(output.path(record.embeddings.path)) for record in log.read(log.live))
    return list(chain.from_iterable(table.to_pylist() for table in tables))


def groups_by_brute_force(output: Storage, threshold: float) -> set[frozenset[str]]:
    """A walk from image to image, by the same bytes and by cosines in float64, over all pairs."""
    rows = committed(output)
    vectors = np.array([row["embedding"] for row in rows], np.float64)
    with np.errstate(invalid="ignore"):
        cosines = np.nan_to_num((unit := vectors / np.linalg.norm(vectors, axis=1, keepdims=True)) @ unit.T)
    assert np.abs(cosines - threshold).min() > 1e-6, "rounding decides; take another seed"
    digests = np.array([int.from_bytes(row["sha256"][:8]) for row in rows], np.uint64)
    joined = (cosines > threshold) | (digests[:, None] == digests)
    groups, left = set(), set(range(len(rows)))
    while left:
        group, border = set(), {min(left)}
        while border:
            group |= border
            border = set(np.flatnonzero(joined[sorted(border)].any(axis=0)).tolist()) - group
        left -= group
        if len(group) > 1:
            groups.add(frozenset(rows[n]["image_id"] for n in group))
    return groups


def assert_as_by_brute_force(output: Storage, threshold: float) -> list[list[str]]:
    found(output, threshold)
    groups = groups_in(published(output))
    assert {frozenset(group) for group in groups} == groups_by_brute_force(output, threshold)
    assert sum(map(len, groups)) == len(set(chain.from_iterable(groups)))
    return groups


@pytest.mark.parametrize("kind", ["exact", "ivf_sq8", "hnsw"])
@pytest.mark.usefixtures("by_index")
def test_groups_are_what_brute_force_over_all_pairs_finds(output: Storage, kind: str) -> None:
    originals = directions(1, 700)
    commit(output, "a.tar", originals)
    commit(output, "b.tar", copies(originals, 400, 0.03))
    commit(output, "c.tar", copies(originals[:40], 600, 0.05, seed=1))
    build_index(output, IndexConfig(type=kind, target_recall=0.99))

    groups = assert_as_by_brute_force(output, 0.96)

    assert len(groups) > 200
    assert len(groups[0]) > 10


@pytest.mark.parametrize("threshold", [0.8, 0.9, 0.97])
def test_groups_follow_the_threshold_also_where_they_are_chains(output: Storage, threshold: float) -> None:
    for name in "abc":
        commit(output, f"{name}.tar", copies(directions(2, 30), 300, 0.09, seed=ord(name)))
    build_index(output)

    assert_as_by_brute_force(output, threshold)


def test_the_same_bytes_are_a_group_across_shards_whatever_their_vectors(output: Storage) -> None:
    vectors = directions(1, 8)
    first, second = vectors[:4].copy(), vectors[4:].copy()
    first[2], second[2], second[3] = 0, 0, np.nan
    commit(output, "a.tar", first, ["one", "two", "black", "broken"])
    commit(output, "b.tar", second, ["other", "one", "black", "broken too"])
    commit(output, "zero.tar", np.zeros((2, DIM), np.float32), ["black", "nothing"])
    build_index(output)

    summary = found(output)

    assert groups_in(published(output)) == [["a.tar#2", "b.tar#2", "zero.tar#0"], ["a.tar#0", "b.tar#1"]]
    assert [row["similarity"] for row in published(output)] == [1] * 5
    assert (summary.images, summary.same_bytes, summary.removable) == (10, 3, 3)


def test_near_duplicates_of_the_same_bytes_are_of_their_group(output: Storage) -> None:
    one, other = directions(1, 2)
    commit(output, "a.tar", np.stack([one, beside(one, 0.96), other]), ["x", "y", "z"])
    commit(output, "b.tar", np.stack([other, beside(one, 0.96), other]), ["z", "y", "z2"])
    build_index(output)

    summary = found(output)

    assert groups_in(published(output)) == [
        ["a.tar#0", "a.tar#1", "b.tar#1"],
        ["a.tar#2", "b.tar#0", "b.tar#2"],
    ]
    assert (summary.same_bytes, summary.removable) == (2, 4)


def test_hundreds_of_images_within_the_threshold_of_each_other_are_one_group(output: Storage) -> None:
    large, small = (copies(directions(n, 1), 600 // n, 0.01) for n in (1, 4))
    commit(output, "a.tar", np.concatenate([large[:300], directions(2, 100), small[:70]]))
    commit(output, "b.tar", np.concatenate([small[70:], large[300:]]))
    build_index(output)

    groups = assert_as_by_brute_force(output, 0.95)

    assert [len(group) for group in groups[:2]] == [600, 150]


@pytest.mark.parametrize("kind", ["exact", "ivf_sq8"])
@pytest.mark.usefixtures("by_index")
def test_lumps_larger_than_any_list_of_neighbours_are_joined_where_they_touch(
    output: Storage, kind: str
) -> None:
    near = directions(1, 1)[0]
    lumps = [near, beside(near, 0.951), beside(near, 0.6), directions(3, 1)[0]]
    assert float(lumps[1] @ lumps[2]) < 0.9
    for number, vector in enumerate(lumps):
        commit(output, f"{number}.tar", np.tile(vector, (400, 1)))
    commit(output, "others.tar", directions(2, 900))
    build_index(output, IndexConfig(type=kind, target_recall=0.5))

    found(output)

    groups = groups_in(published(output))
    assert [len(group) for group in groups] == [800, 400, 400]
    assert {image_id.split("#")[0] for image_id in groups[0]} == {"0.tar", "1.tar"}


def test_equal_vectors_reach_a_threshold_of_one(output: Storage) -> None:
    vectors = directions(1, 50)
    commit(output, "a.tar", vectors)
    commit(output, "b.tar", vectors * 3)
    commit(output, "c.tar", np.stack([beside(vector, 0.9999) for vector in vectors]))
    build_index(output)

    found(output, threshold=1)

    pairs = {frozenset([f"a.tar#{number}", f"b.tar#{number}"]) for number in range(50)}
    assert {frozenset(group) for group in groups_in(published(output))} == pairs


def test_the_image_with_the_most_pixels_stands_for_its_group_and_others_tell_how_near_they_are(
    output: Storage,
) -> None:
    one, two = directions(1, 2)
    near = [one, beside(one, 0.96), beside(one, 0.99), two, two, two]
    sizes = {"width": pa.array([10, 40, 20, 5, 8, 4], pa.int32()), "height": [10, 2, 20, 4, 4, 8]}
    commit(output, "a.tar", np.stack(near), **sizes)
    huge = [60_000, 60_000]  # more pixels than an int32 counts
    apart = directions(9, 1)[0]
    commit(output, "b.tar", np.stack([apart, beside(apart, 0.97)]), width=huge, height=[60_000, 60_001])
    build_index(output)

    found(output)

    rows = published(output)
    assert [(row["group"], row["image_id"], row["representative"]) for row in rows] == [
        (0, "a.tar#2", True),
        (0, "a.tar#0", False),
        (0, "a.tar#1", False),
        (1, "a.tar#4", True),
        (1, "a.tar#5", False),
        (1, "a.tar#3", False),
        (2, "b.tar#1", True),
        (2, "b.tar#0", False),
    ]
    expected = [1, 0.99, float(near[1] @ near[2]), 1, 1, 1, 1, 0.97]
    assert [row["similarity"] for row in rows] == pytest.approx(expected, abs=1e-5)
    assert max(row["similarity"] for row in rows) <= 1


def test_groups_of_an_index_that_followed_the_corpus_are_of_the_live_rows(output: Storage) -> None:
    originals = directions(1, 400)
    old = [commit(output, f"{name}.tar", copies(originals, 300, 0.03, ord(name))) for name in "abcd"]
    build_index(output, IndexConfig(type="hnsw"))
    commit_vectors(output, "b.tar", copies(originals, 310, 0.03, 9), supersedes=(old[1],))
    record = build_index(output, IndexConfig(type="ivf_flat"))
    commit_vectors(output, "e.tar", copies(originals, 50, 0.03, 10), supersedes=(old[2],))
    record = build_index(output, IndexConfig(type="ivf_flat"))
    assert len(record.segments) > 1

    assert_as_by_brute_force(output, 0.95)


def test_the_summary_counts_what_the_groups_hold(output: Storage) -> None:
    originals = directions(1, 100)
    commit(output, "a.tar", originals, [f"image {number}" for number in range(100)])
    contents = [f"image {number}" for number in range(20)] + list("0123456789")
    commit(output, "b.tar", originals[:30], contents)
    commit(output, "c.tar", originals[:5])
    record = build_index(output)

    summary = found(output, 0.99)

    rows = published(output)
    assert (summary.images, summary.groups, summary.images_in_groups) == (135, 30, 65)
    assert (summary.same_bytes, summary.removable) == (20, 35)
    assert summary.share_removable == pytest.approx(35 / 135, abs=1e-6)
    assert len(rows) == summary.images_in_groups
    assert len(groups_in(rows)[0]) == 3
    assert (summary.index, summary.threshold) == (record.version, 0.99)
    stored = json.loads(output.read_bytes(f"dedup/{summary.version}/summary.json"))
    assert stored == summary.to_json()
    assert version_of(output) == summary.version


def test_without_a_group_there_is_an_empty_file_with_the_columns(output: Storage) -> None:
    commit(output, "a.tar", np.eye(DIM, dtype=np.float32))
    build_index(output)

    summary = found(output)

    table = pq.read_table(output.path(f"dedup/{version_of(output)}/groups.parquet"))
    assert table.num_rows == summary.groups == summary.removable == summary.share_removable == 0
    assert table.schema == schema.DUPLICATES


def test_groups_are_written_in_pieces_that_fit_together(
    output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        commit(output, f"{name}.tar", copies(directions(1, 60), 100, 0.02, ord(name)))
    build_index(output)
    found(output)
    at_once = published(output)

    monkeypatch.setattr(dedup_module, "_ROWS_AT_ONCE", 7)
    found(output)

    assert published(output) == at_once


def test_three_versions_are_kept_and_of_killed_ones_none_older(output: Storage) -> None:
    commit(output, "a.tar", directions(1, 4))
    build_index(output)
    output.write_bytes("dedup/20200101T000000.000000Z-killed/groups.parquet", b"half")
    output.write_bytes("dedup/90000101T000000.000000Z-other/groups.parquet", b"in the making")

    made = [found(output).version for _ in range(5)]

    assert made == sorted(made)
    assert sorted(path.name for path in Path(output.path("dedup")).iterdir() if path.is_dir()) == [
        *made[-3:],
        "90000101T000000.000000Z-other",
    ]
    assert version_of(output) == made[-1]


@pytest.mark.parametrize("step", ["join_near", "_groups", "_write", "_drop_old"])
def test_a_dedup_that_dies_leaves_a_whole_version_served(
    output: Storage, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    commit(output, "a.tar", np.tile(directions(1, 3), (2, 1)))
    build_index(output)
    served = found(output).version
    before = published(output)

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(published_module if step == "_drop_old" else dedup_module, step, die)
        with pytest.raises(KeyboardInterrupt):
            found(output, 0.9)

    assert (version_of(output) == served) == (step != "_drop_old")
    assert published(output) == before
    assert found(output).groups == 3


def test_a_dedup_that_dies_while_it_writes_leaves_the_served_version(
    output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(output, "a.tar", np.tile(directions(1, 3), (2, 1)))
    build_index(output)
    served = found(output).version
    for name in ("groups.parquet", "summary.json", "CURRENT"):
        replacing = Storage.replacing

        def failing(self: Storage, relative: str, name: str = name) -> Any:
            if relative.endswith(name):
                raise KeyboardInterrupt
            return replacing(self, relative)  # noqa: B023 - the same each time

        with monkeypatch.context() as patch:
            patch.setattr(Storage, "replacing", failing)
            with pytest.raises(KeyboardInterrupt):
                found(output)
        assert version_of(output) == served
        assert len(groups_in(published(output))) == 3


def test_an_index_that_is_not_of_the_committed_rows_is_refused_with_the_remedy(output: Storage) -> None:
    commit(output, "a.tar", directions(1, 4))
    with pytest.raises(SearchError, match=r"no index; run: cvt-pipeline index"):
        found(output)
    build_index(output)
    commit(output, "b.tar", directions(2, 4))
    with pytest.raises(SearchError, match=r"not of its committed images; run: cvt-pipeline index"):
        found(output)
    build_index(output)
    assert found(output).images == 8
    output.delete(f"commits/{max(CommitLog(output).live)}.json")
    with pytest.raises(SearchError, match="run: cvt-pipeline index"):
        found(output)


def test_a_committed_file_that_goes_away_meanwhile_is_told_and_nothing_is_published(
    output: Storage,
) -> None:
    stem = commit(output, "a.tar", directions(1, 4))
    build_index(output)
    output.delete(f"embeddings/{stem}.parquet")

    with pytest.raises(SearchError, match=r"went away meanwhile.*run: cvt-pipeline index"):
        found(output)
    assert not output.exists("dedup")


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """An index of forty images that can be seen, and of their vectors, twenty of them near one another."""
    folder = tmp_path_factory.mktemp("pictured")
    images = [(f"{number}.png", encode(make_image(number % 20))) for number in range(40)]
    uri = f"file://{write_tar(folder / 'in' / 'a.tar', images)}"
    output = empty_output(folder / "out")
    cosines = [0.99999, 0.9972, 0.993, 0.985, 0.961, 0.93, 0.87, 0.5]
    vectors = directions(1, 20)
    seconds = [beside(vector, cosines[number % 8]) for number, vector in enumerate(vectors)]
    commit_vectors(output, "a.tar", np.concatenate([vectors, np.stack(seconds)]), uri=uri)
    build_index(output)
    return output


def test_the_command_prints_the_summary_and_publishes_the_groups(pictured: Storage) -> None:
    done = cli("dedup", pictured.root, "dedup.threshold=0.98", "--json")

    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["images"], summary["groups"], summary["threshold"]) == (40, 12, 0.98)
    assert f"dedup/{summary['version']}/groups.parquet" in done.stderr
    assert "12 could go (30.0%)" in done.stderr
    assert groups_in(published(pictured))


def test_the_sample_shows_pairs_of_each_band_and_how_many_reach_it(
    pictured: Storage, tmp_path: Path
) -> None:
    done = cli("dedup", pictured.root, "--sample", tmp_path / "page.html", "--json")

    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert sum(counts.values()) == 40
    assert {name: count for name, count in counts.items() if name in ("0.9999", "0.98", "0.97")} == {
        "0.9999": 6,
        "0.98": 6,
        "0.97": 0,
    }
    page = (tmp_path / "page.html").read_text()
    assert page.count("<h2>") == sum(count > 0 for count in counts.values())
    assert page.count('<div class="pair">') * 2 == page.count("data:image/jpeg;base64,") > 20
    assert "<h2>0.9999 and more" in page
    assert "at 0.995 and more: 12 of 40 (30.0%)" in page
    assert "no preview" not in page
    assert "http" not in page


def test_bad_arguments_and_an_output_without_an_index_are_refused(
    pictured: Storage, tmp_path: Path
) -> None:
    commit(empty_output(tmp_path / "out"), "a.tar", directions(1, 3))

    for words, mention in (
        ([pictured.root, "dedup.threshold=2"], "dedup.threshold: found 2"),
        ([tmp_path / "out"], "run: cvt-pipeline index"),
    ):
        done = cli("dedup", *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert mention in done.stderr
    with pytest.raises(ConfigError, match=r"--sample: cannot write .*page\.html"):
        write_sample(pictured, tmp_path / "nowhere/page.html", {})
