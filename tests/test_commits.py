"""Commits: a record makes a shard's files real, exactly once, whatever is killed when."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.commits import COMMITS, Commit, CommitLog, DataFile, clean, write_commit
from pipeline.errors import OutputError
from pipeline.shards import Shard
from pipeline.storage import STAGING, Storage


def make_commit(version: str, name: str = "a.tar", supersedes: tuple[str, ...] = ()) -> Commit:
    shard = Shard(name, f"file:///in/{name}", "webdataset", 1, version)
    stem = shard.stem("f")
    return Commit(
        stem=stem,
        shard=shard,
        fingerprint="f",
        num_samples=3,
        num_rows=2,
        num_rejects=1,
        rejects_by_reason={"empty": 1},
        embeddings=DataFile(f"embeddings/{stem}.parquet", 2, 10, "00"),
        rejects=DataFile(f"rejects/{stem}.parquet", 1, 5, "11"),
        supersedes=supersedes,
        run="r",
        committed_at="2024-01-01T00:00:00+00:00",
    )


def put_files(output: Storage, commit: Commit) -> None:
    output.write_bytes(commit.embeddings.path, b"rows")
    assert commit.rejects
    output.write_bytes(commit.rejects.path, b"rejects")


def put(output: Storage, commit: Commit) -> Commit:
    put_files(output, commit)
    write_commit(output, commit)
    return commit


def record_of(commit: Commit) -> str:
    return f"commits/{commit.stem}.json"


def files_of(*commits: Commit) -> list[str]:
    stems = [commit.stem for commit in commits]
    return sorted(
        [f"commits/{stem}.json" for stem in stems]
        + [f"{kind}/{stem}.parquet" for stem in stems for kind in ("embeddings", "rejects")]
    )


def present(output: Storage) -> list[str]:
    return [info.path for info in output.find()]


@pytest.fixture
def output(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def test_a_record_is_read_back_as_it_was_written(output: Storage) -> None:
    commit = put(output, make_commit("1"))
    assert CommitLog(output).read([commit.stem]) == [commit]
    assert Commit.from_json(commit.to_json()) == commit


def test_an_output_without_commits_has_none(output: Storage) -> None:
    log = CommitLog(output)
    assert (log.listed, log.live, clean(output, log)) == (frozenset(), frozenset(), 0)


def test_a_record_is_created_once_and_never_overwritten(output: Storage) -> None:
    commit = put(output, make_commit("1"))
    before = output.read_bytes(record_of(commit))
    with pytest.raises(FileExistsError):
        write_commit(output, make_commit("1", supersedes=("other",)))
    assert output.read_bytes(record_of(commit)) == before


def test_a_record_replaces_those_it_supersedes(output: Storage) -> None:
    old = put(output, make_commit("1"))
    new = put(output, make_commit("2", supersedes=(old.stem,)))
    assert present(output) == files_of(new)


def kill_before_cleaning(output: Storage, old: Commit, new: Commit, num_deleted: int) -> None:
    """As after a kill in write_commit: the new record exists, the old files are deleted in part."""
    put_files(output, new)
    output.create(record_of(new), new.to_json())
    for path in [record_of(old), old.embeddings.path, f"rejects/{old.stem}.parquet"][:num_deleted]:
        output.delete(path)


@pytest.mark.parametrize("num_deleted", [0, 1, 2, 3])
def test_a_kill_between_the_new_record_and_the_end_of_the_old_one_is_mended(
    output: Storage, num_deleted: int
) -> None:
    other = put(output, make_commit("1", "b.tar"))
    old = put(output, make_commit("1"))
    new = make_commit("2", supersedes=(old.stem,))
    kill_before_cleaning(output, old, new, num_deleted)
    log = CommitLog(output)
    assert log.live == {new.stem, other.stem}
    clean(output, log)
    assert present(output) == files_of(new, other)
    assert CommitLog(output).live == {new.stem, other.stem}


def test_a_kill_while_cleaning_never_brings_a_superseded_record_back(
    output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = put(output, make_commit("1"))
    new = make_commit("2", supersedes=(old.stem,))
    kill_before_cleaning(output, old, new, 0)
    deleted: list[str] = []
    delete = Storage.delete

    def delete_once(self: Storage, relative: str) -> None:
        if deleted:
            raise KeyboardInterrupt
        deleted.append(relative)
        delete(self, relative)

    monkeypatch.setattr(Storage, "delete", delete_once)
    with pytest.raises(KeyboardInterrupt):
        clean(output, CommitLog(output))
    assert deleted == [record_of(old)]
    assert CommitLog(output).live == {new.stem}


def test_cleaning_removes_what_no_commit_stands_for_and_nothing_live(output: Storage) -> None:
    live = put(output, make_commit("1"))
    orphan = make_commit("1", "orphan.tar")
    put_files(output, orphan)
    output.write_bytes(f"{STAGING}/run/part.parquet", b"x")
    output.write_bytes(f"{COMMITS}/.tmp-of-a-killed-run", b"{")
    output.write_bytes("reports/r.json", b"{}")
    output.write_bytes("index/CURRENT", b"x")
    assert clean(output, CommitLog(output)) == 4
    assert present(output) == sorted([*files_of(live), "index/CURRENT", "reports/r.json"])
    assert not (Path(output.root) / STAGING).exists()


def test_shards_whose_names_are_cut_alike_do_not_supersede_each_other(output: Storage) -> None:
    one = put(output, make_commit("1", "x" * 160 + "a"))
    two = put(output, make_commit("1", "x" * 160 + "b"))
    assert CommitLog(output).live == {one.stem, two.stem}


def test_only_shards_with_several_records_are_looked_into(output: Storage) -> None:
    for number in range(3):
        output.write_bytes(f"commits/{make_commit('1', f'{number}.tar').stem}.json", b"unreadable")
    assert len(CommitLog(output).live) == 3


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b'{"rejects": null}', b"null"])
def test_a_record_that_is_none_is_told_with_its_place(output: Storage, data: bytes) -> None:
    output.write_bytes("commits/x-0123456789abcdef.json", data)
    with pytest.raises(OutputError, match=r"commits/x-0123456789abcdef\.json: not a commit record"):
        CommitLog(output).read(["x-0123456789abcdef"])
