"""The plan: new and changed shards are work, the rest is left alone, groups never reshuffle."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.commits import Commit, CommitLog, DataFile, write_commit
from pipeline.errors import InputError
from pipeline.plan import Plan, Rules, plan_files, plan_members
from pipeline.shards import FileInfo, Listing, Member, Shard, Work
from pipeline.storage import Storage


@pytest.fixture
def output(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "out"))


def commit_all(output: Storage, *works: Work) -> None:
    for work in works:
        record = Commit(
            stem=work.stem,
            shard=work.shard,
            fingerprint="f",
            num_samples=0,
            num_rows=0,
            num_rejects=0,
            rejects_by_reason={},
            embeddings=DataFile(f"embeddings/{work.stem}.parquet", 0, 0, ""),
            rejects=None,
            supersedes=work.supersedes,
            run="r",
            committed_at="",
        )
        write_commit(output, record)


def files(folder: str = "/in", **versions: str) -> Listing:
    infos = tuple(FileInfo(f"{name}.tar", 10, version) for name, version in sorted(versions.items()))
    return Listing(Storage(folder), "webdataset", infos)


NOW = 1_000_000.0


def plan_of(output: Storage, listing: Listing, **rules: Any) -> Plan:
    return plan_files(listing, CommitLog(output), "f", Rules(NOW, **rules))


def counts(plan: Plan) -> tuple[int, int, int, int]:
    return plan.num_new, plan.num_changed, plan.num_done, plan.num_deleted


def test_every_archive_is_a_shard_in_the_listings_order(output: Storage) -> None:
    plan = plan_of(output, files(a="1", b="1"))
    assert [work.shard.name for work in plan.work] == ["a.tar", "b.tar"]
    assert plan.work[0].shard.uri == "file:///in/a.tar"
    assert (counts(plan), plan.size_bytes) == ((2, 0, 0, 0), 20)


def test_only_new_and_changed_archives_are_work(output: Storage) -> None:
    commit_all(output, *plan_of(output, files(a="1", b="1", c="1")).work)
    assert counts(plan_of(output, files(a="1", b="1", c="1"))) == (0, 0, 3, 0)
    plan = plan_of(output, files(a="1", b="2", d="1"))
    assert counts(plan) == (1, 1, 1, 1)
    changed, new = plan.work
    assert (changed.shard.name, new.shard.name) == ("b.tar", "d.tar")
    assert changed.supersedes == (Shard("b.tar", "file:///in/b.tar", "webdataset", 10, "1").stem("f"),)
    assert new.supersedes == ()
    commit_all(output, *plan.work)
    assert counts(plan_of(output, files(a="1", b="2", d="1"))) == (0, 0, 3, 1)


def test_archives_whose_names_are_cut_alike_are_not_taken_for_each_other(output: Storage) -> None:
    one, two = "x" * 160 + "a", "x" * 160 + "b"
    commit_all(output, *plan_of(output, files(**{one: "1"})).work)
    plan = plan_of(output, files(**{one: "1", two: "1"}))
    assert counts(plan) == (1, 0, 1, 0)
    assert plan.work[0].supersedes == ()


def test_the_same_names_from_another_root_are_refused(output: Storage) -> None:
    commit_all(output, *plan_of(output, files("/in", a="1")).work)
    with pytest.raises(InputError, match=r"already holds a\.tar from file:///in/a\.tar"):
        plan_of(output, files("/other", a="1"))


def test_a_plan_takes_time_in_proportion_to_the_corpus(output: Storage) -> None:
    listing = Listing(
        Storage("/in"), "webdataset", tuple(FileInfo(f"{n}.tar", 1, "1") for n in range(20_000))
    )
    stems = (Shard(i.path, f"file:///in/{i.path}", "webdataset", 1, "1").stem("f") for i in listing.files)
    log = CommitLog(output)
    log.__dict__["listed"] = frozenset(stems)
    started = time.process_time()
    assert plan_files(listing, log, "f", Rules(NOW)).num_done == 20_000
    assert time.process_time() - started < 30


def members(*names: str, version: str = "1") -> list[Member]:
    return [Member(name, 1, version) for name in names]


def plan_images(
    output: Storage,
    found: list[Member],
    group_size: int = 3,
    folder: str = "/in",
    layout: str = "images",
    young: str = "",
    **rules: Any,
) -> Plan:
    infos = tuple(FileInfo(m.path, 1, m.version, NOW - 1 if m.path in young else 0) for m in found)
    if layout == "manifest":
        infos = (FileInfo("m.csv", 1, "1"),)
    listing = Listing(Storage(folder), layout, infos)
    return plan_members(listing, found, CommitLog(output), "f", Rules(NOW, group_size=group_size, **rules))


def groups(plan: Plan) -> list[str]:
    return ["".join(member.path for member in work.shard.members) for work in plan.work]


def test_loose_images_are_grouped_in_order(output: Storage) -> None:
    plan = plan_images(output, members(*"abcdefgh"))
    assert groups(plan) == ["abc", "def", "gh"]
    assert len({work.shard.name for work in plan.work}) == 3
    assert all(work.shard.name.startswith("images-") for work in plan.work)
    assert plan.work == plan_images(output, members(*"abcdefgh")).work


@pytest.mark.parametrize("done", [[0], [1], [2], [0, 2], [0, 1]])
def test_a_run_that_was_killed_goes_on_with_the_same_groups(output: Storage, done: list[int]) -> None:
    whole = plan_images(output, members(*"abcdefgh"))
    commit_all(output, *(whole.work[number] for number in done))
    left = plan_images(output, members(*"abcdefgh"))
    assert left.work == tuple(work for n, work in enumerate(whole.work) if n not in done)
    assert left.num_done == len(done)


def test_new_images_form_new_groups_and_committed_ones_stay(output: Storage) -> None:
    first = plan_images(output, members(*"bdfh"))
    commit_all(output, *first.work)
    plan = plan_images(output, members(*"abcdefghi"))
    assert groups(plan) == ["ace", "gi"]
    assert (plan.num_done, plan.num_changed, plan.num_deleted) == (2, 0, 0)
    commit_all(output, *plan.work)
    assert counts(plan_images(output, members(*"abcdefghi"), group_size=5)) == (0, 0, 4, 0)


def test_a_group_with_a_changed_member_is_redone_under_its_name_and_the_rest_is_carried(
    output: Storage,
) -> None:
    first = plan_images(output, members(*"abcdef"))
    commit_all(output, *first.work)
    found = [*members(*"ac"), Member("b", 1, "2"), *members(*"def")]
    plan = plan_images(output, found)
    (work,) = plan.work
    assert groups(plan) == ["abc"]
    assert work.shard.name == first.work[0].shard.name
    assert work.stem != first.work[0].stem
    assert work.supersedes == (first.work[0].stem,)
    assert work.carried == {"a", "c"}
    assert (plan.num_new, plan.num_changed, plan.num_done) == (0, 1, 1)
    commit_all(output, work)
    assert counts(plan_images(output, found)) == (0, 0, 2, 0)


def test_a_deleted_member_keeps_its_rows(output: Storage) -> None:
    commit_all(output, *plan_images(output, members(*"abc")).work)
    plan = plan_images(output, members(*"ac"))
    assert counts(plan) == (0, 0, 1, 1)
    (work,) = plan_images(output, [*members("a"), Member("c", 1, "2")]).work
    assert work.carried == {"a", "b"}
    assert [member.path for member in work.shard.members] == ["a", "b", "c"]


def test_the_same_images_from_another_root_are_refused_and_other_ones_are_not(output: Storage) -> None:
    commit_all(output, *plan_images(output, members(*"abc")).work)
    with pytest.raises(InputError, match=r"already holds a from file:///in"):
        plan_images(output, members(*"a"), folder="/other")
    assert groups(plan_images(output, members(*"xyz"), folder="/other")) == ["xyz"]


def test_repeated_uris_of_a_manifest_are_members_of_their_own(output: Storage) -> None:
    found = [Member("a", 0, "", 0), Member("a", 0, "", 1), Member("b", 0, "", 0), Member("a", 0, "", 2)]
    plan = plan_images(output, found, group_size=2, layout="manifest")
    assert len({work.stem for work in plan.work}) == 2
    commit_all(output, *plan.work)
    assert counts(plan_images(output, found, group_size=2, layout="manifest")) == (0, 0, 2, 0)
    changed = [*found[:3], dataclasses.replace(found[3], version="2")]
    (work,) = plan_images(output, changed, group_size=2, layout="manifest").work
    assert work.carried == {"b"}


def stem(name: str, version: str = "1") -> str:
    return Shard(f"{name}.tar", f"file:///in/{name}.tar", "webdataset", 10, version).stem("f")


def test_shards_that_are_gone_are_removed_only_where_the_config_says_so(output: Storage) -> None:
    commit_all(output, *plan_of(output, files(a="1", b="1", c="1", d="1")).work)
    left = files(a="1", b="1", c="1")
    assert plan_of(output, left, max_deleted_fraction=1).removed == ()
    plan = plan_of(output, left, remove_deleted=True, max_deleted_fraction=0.25)
    assert (plan.removed, counts(plan), plan.refusal) == ((stem("d"),), (0, 0, 3, 1), "")


def test_a_listing_that_shrinks_too_much_removes_nothing_and_says_so(output: Storage) -> None:
    commit_all(output, *plan_of(output, files(a="1", b="1", c="1", d="1")).work)
    plan = plan_of(output, files(a="1", e="1"), remove_deleted=True, max_deleted_fraction=0.7)
    assert (plan.removed, counts(plan)) == ((), (1, 0, 1, 3))
    assert "3 of 4 committed shards are gone" in plan.refusal
    assert "limits.max_deleted_fraction = 0.7" in plan.refusal


def test_a_changed_shard_is_not_taken_for_a_deleted_one(output: Storage) -> None:
    commit_all(output, *plan_of(output, files(a="1", b="1")).work)
    rules: dict[str, Any] = {"remove_deleted": True, "max_deleted_fraction": 1}
    assert plan_of(output, files(a="2", b="1"), **rules).removed == ()
    assert plan_of(output, files(a="2", b="1"), ignore=("a.tar",), **rules).removed == ()
    young = tuple(dataclasses.replace(info, modified=NOW) for info in files(a="2", b="1").files)
    listing = Listing(Storage("/in"), "webdataset", young)
    assert plan_of(output, listing, min_age_s=60, **rules).removed == ()


def test_young_archives_wait_and_old_ones_do_not(output: Storage) -> None:
    commit_all(output, *plan_of(output, files(b="1", d="1")).work)
    ages = {"a.tar": 59.0, "b.tar": 59.0, "c.tar": 61.0, "d.tar": 1.0}
    versions = files(a="1", b="2", c="1", d="1").files
    infos = tuple(dataclasses.replace(info, modified=NOW - ages[info.path]) for info in versions)
    plan = plan_of(output, Listing(Storage("/in"), "webdataset", infos), min_age_s=60)
    assert ([work.shard.name for work in plan.work], plan.num_young) == (["c.tar"], 2)
    assert (plan.num_done, plan.num_deleted) == (1, 0)


def test_ignored_shards_are_left_out_whether_new_or_changed(output: Storage) -> None:
    commit_all(output, *plan_of(output, files(a="1", b="1")).work)
    plan = plan_of(output, files(a="2", b="2", bad1="1", bad2="1"), ignore=("b.tar", "bad*.tar"))
    assert [work.shard.name for work in plan.work] == ["a.tar"]
    assert plan.ignored == ("b.tar", "bad1.tar", "bad2.tar")
    assert (plan.num_done, plan.num_deleted) == (0, 0)


def test_a_group_loses_its_deleted_members_and_copies_the_others(output: Storage) -> None:
    first = plan_images(output, members(*"abcdef"))
    commit_all(output, *first.work)
    plan = plan_images(output, members(*"acdef"), remove_deleted=True, max_deleted_fraction=0.2)
    (work,) = plan.work
    assert (groups(plan), work.carried, work.supersedes) == (["ac"], {"a", "c"}, (first.work[0].stem,))
    assert (plan.removed, plan.num_deleted) == ((), 1)
    commit_all(output, work)
    assert counts(plan_images(output, members(*"acdef"), remove_deleted=True)) == (0, 0, 2, 0)


def test_a_group_without_members_left_is_removed(output: Storage) -> None:
    first = plan_images(output, members(*"abcdef"))
    commit_all(output, *first.work)
    plan = plan_images(output, members(*"abc"), remove_deleted=True, max_deleted_fraction=0.5)
    assert (plan.work, plan.removed, plan.num_done) == ((), (first.work[1].stem,), 1)
    refused = plan_images(output, members(*"abc"), remove_deleted=True, max_deleted_fraction=0.4)
    assert (refused.work, refused.removed) == ((), ())
    assert "3 of 6 committed images are gone" in refused.refusal


def test_a_uri_that_a_manifest_names_less_often_is_read_again(output: Storage) -> None:
    found = [Member("a", 0, "", 0), Member("b", 0, "", 0), Member("a", 0, "", 1)]
    commit_all(output, *plan_images(output, found, layout="manifest").work)
    rules: dict[str, Any] = {"remove_deleted": True, "max_deleted_fraction": 1}
    (work,) = plan_images(output, found[:2], layout="manifest", **rules).work
    assert (work.carried, len(work.shard.members)) == ({"b"}, 2)


def test_young_images_wait_and_committed_ones_stay_as_they_are(output: Storage) -> None:
    commit_all(output, *plan_images(output, members(*"abc")).work)
    found = [Member("a", 1, "2"), *members(*"bcde")]
    plan = plan_images(output, found, min_age_s=60, young="abd")
    assert (groups(plan), plan.num_young, plan.num_done) == (["e"], 2, 1)


def test_ignored_images_and_groups_are_left_out(output: Storage) -> None:
    plan = plan_images(output, members(*"abcdef"), ignore=("b", "f"))
    assert (groups(plan), plan.ignored) == (["acd", "e"], ("b", "f"))
    name = plan.work[0].shard.name
    without = plan_images(output, members(*"abcdef"), ignore=("b", "f", name))
    assert (groups(without), without.ignored) == (["e"], ("b", "f", name))
