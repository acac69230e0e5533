"""Verify: what is off is named with what mends it, and what is as it was is passed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import verify_ids
from pipeline.lease import acquire
from pipeline.shards import Shard
from pipeline.storage import FileInfo, Storage
from pipeline.verify import Verification, verify
from tests.made_output import archive, claimed, group, put_shard
from tests.running import cli


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return tmp_path / "in"


@pytest.fixture
def output(tmp_path: Path, corpus: Path) -> Storage:
    """Three archives in folders and a group of loose images, committed."""
    made = claimed(tmp_path / "out")
    for name in ("a.tar", "sub/b.tar", "sub/c d%20é.tar"):
        ids = [f"{name}#{n}" for n in range(5)]
        put_shard(made, archive(corpus, name), ids, [f"{name}#bad"])
    put_shard(made, group(corpus, ["x/1.png", "x/2.png", "x/3.png", "x/4.png"]), ["x/1.png", "x/2.png"])
    return made


def against_input(output: Storage) -> Verification:
    return verify(output, open_input=Storage)


def test_an_output_whose_input_is_as_it_was_passes(output: Storage) -> None:
    result = against_input(output)
    assert result.is_ok
    assert (result.num_shards, result.num_rows, result.num_rejects) == (4, 17, 3)
    assert result.to_json()["input"] == {
        "shards": 4,
        "unchanged": 4,
        "changed": 0,
        "gone": 0,
        "notes": [],
    }
    assert "input" not in verify(output).to_json()


def test_a_changed_archive_is_told_with_what_follows(output: Storage, corpus: Path) -> None:
    (corpus / "sub/b.tar").write_bytes(b"other images")
    result = against_input(output)
    assert (result.problems, result.is_ok) == ([], False)
    assert result.input
    assert (result.input.num_changed, result.input.num_unchanged) == (1, 3)
    (note,) = result.input.notes
    assert "in/sub/b.tar: changed" in note
    assert "next extract" in note
    assert verify(output).is_ok


def test_a_touched_archive_of_the_same_size_has_changed(output: Storage, corpus: Path) -> None:
    (corpus / "a.tar").write_bytes(b"IMAGES")
    assert [note.split(": ")[1][:7] for note in against_input(output).input.notes] == ["changed"]  # type: ignore[union-attr]


def test_a_gone_archive_is_told_with_what_follows(output: Storage, corpus: Path) -> None:
    (corpus / "sub/c d%20é.tar").unlink()
    found = against_input(output).input
    assert found
    assert (found.num_gone, found.num_unchanged) == (1, 3)
    assert "c d%20é.tar: it is gone" in found.notes[0]
    assert "input.on_deleted" in found.notes[0]


def test_an_unmounted_input_is_gone_whole(output: Storage, corpus: Path) -> None:
    corpus.rename(corpus.parent / "elsewhere")
    found = against_input(output).input
    assert found
    assert (found.num_gone, len(found.notes)) == (4, 4)


def test_a_group_names_its_changed_and_its_deleted_images(output: Storage, corpus: Path) -> None:
    (corpus / "x/2.png").write_bytes(b"another picture")
    (corpus / "x/3.png").unlink()
    (corpus / "x/new.png").write_bytes(b"new")
    found = against_input(output).input
    assert found
    assert (found.num_changed, found.num_gone) == (1, 0)
    changed, gone = found.notes
    assert "1 images (x/2.png) of images-0123456789ab changed" in changed
    assert "1 images (x/3.png) of images-0123456789ab gone" in gone


def test_a_manifest_is_looked_for_and_not_its_images(tmp_path: Path) -> None:
    output = claimed(tmp_path / "out")
    (tmp_path / "list.csv").write_text("uri\nabsent.png\n")
    shard = replace(group(tmp_path / "other", ["absent.png"]), format="manifest")
    put_shard(output, replace(shard, uri=Storage(str(tmp_path)).url("list.csv")), ["absent.png"])
    assert against_input(output).is_ok
    (tmp_path / "list.csv").unlink()
    assert [note.endswith("take them out") for note in against_input(output).input.notes] == [True]  # type: ignore[union-attr]


def test_each_root_is_listed_once_and_no_shard_is_asked_for(output: Storage) -> None:
    asked: list[str] = []

    class Counting(Storage):
        def find(self, folder: str = "") -> list[FileInfo]:
            asked.append(self.uri)
            return super().find(folder)

        def info(self, relative: str) -> FileInfo:
            raise AssertionError(relative)

    assert verify(output, open_input=Counting).is_ok
    assert len(asked) == 1


def test_ids_that_stand_twice_are_named_with_both_files(tmp_path: Path, corpus: Path) -> None:
    output = claimed(tmp_path / "out")
    one = put_shard(output, archive(corpus, "a.tar"), ["same", "own-a"])
    two = put_shard(output, archive(corpus, "b.tar"), ["own-b", "same"])
    (problem,) = verify(output).problems
    assert "image_id same is also in another row" in problem
    assert one.embeddings.path in problem
    assert two.embeddings.path in problem


def test_ids_are_held_against_each_other_in_passes_of_bounded_memory(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_ids, "IN_MEMORY", 7)
    monkeypatch.setattr(verify_ids, "_BLOCK", 5)
    output = claimed(tmp_path / "out")
    for number in range(8):
        ids = [f"{number}-{n}" for n in range(9)]
        put_shard(output, archive(corpus, f"{number}.tar"), [*ids, f"twice-{number // 2}"])
    problems = verify(output).problems
    assert len(problems) == 4
    assert sorted(problem.split("image_id ")[1][:7] for problem in problems) == [
        f"twice-{n}" for n in range(4)
    ]


def test_a_damaged_file_is_named_and_the_others_are_still_checked(output: Storage) -> None:
    one, two, *_ = sorted((Path(output.root) / "embeddings").iterdir())
    one.write_bytes(one.read_bytes()[:-9])
    two.unlink()
    result = verify(output)
    assert (result.num_shards, len(result.problems)) == (4, 2)
    assert f"{one.name}: not the file that was committed" in result.problems[0]
    assert f"{two.name}: missing" in result.problems[1]


def test_a_file_without_a_commit_is_off_unless_a_run_is_at_work(output: Storage) -> None:
    output.write_bytes("embeddings/stray-0123456789abcdef.parquet", b"not committed yet")
    lease = acquire(output, "run", 120)
    assert verify(output).is_ok
    lease.release()
    (problem,) = verify(output).problems
    assert "stray-0123456789abcdef.parquet: no commit names it" in problem


def test_the_columns_of_all_files_are_the_same(output: Storage, corpus: Path) -> None:
    other = archive(corpus, "zz.tar")
    commit = put_shard(output, other, ["z"])
    import pyarrow.parquet as pq

    path = Path(output.path(commit.embeddings.path))
    pq.write_table(pq.read_table(path, partitioning=None).drop_columns(["format"]), path)
    record = Path(output.path(f"commits/{commit.stem}.json"))
    values = json.loads(record.read_text())
    values["embeddings"] |= {"size_bytes": path.stat().st_size, "sha256": _sha256(path)}
    record.write_text(json.dumps(values))
    (problem,) = verify(output).problems
    assert f"{path.name}: its columns are not those of the other files" in problem


def _sha256(path: Path) -> str:
    from pipeline.storage import sha256_of

    return sha256_of(path)


def test_the_command_exits_3_for_a_changed_input_only_when_asked(output: Storage, corpus: Path) -> None:
    (corpus / "a.tar").unlink()
    assert cli("verify", output.root).returncode == 0
    done = cli("verify", output.root, "--input", "--json")
    assert done.returncode == 3
    values = json.loads(done.stdout)
    assert (values["ok"], values["problems"], values["input"]["gone"]) == (False, [], 1)
    assert "a.tar: it is gone from the input" in done.stderr
    assert "3 shards as they were done, 0 changed, 1 gone" in done.stderr


def test_a_shard_at_a_roots_top_and_one_with_an_odd_uri_find_their_root() -> None:
    from pipeline.verify_input import _root_of

    assert _root_of(Shard("b/a.tar", "s3://bucket/in/b/a.tar", "webdataset")) == (
        "s3://bucket/in",
        "b/a.tar",
    )
    assert _root_of(Shard("a.tar", "file:///in/other.tar", "webdataset")) == ("file:///in", "other.tar")
