"""What a run has to do: the listing held against the commits.

Enters: a Listing, the commit log, the fingerprint. Leaves: a Plan, in the listing's order. One listing of
`commits/` decides for archives; for loose images and manifests the records of their groups are read,
since those list the members.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipeline.commits import Commit, CommitLog
from pipeline.errors import InputError
from pipeline.shards import Listing, Member, Shard, Work, file_name, name_part

GROUP_PREFIX = "images-"


@dataclass(frozen=True)
class Plan:
    """Shards to do, and what the rest of the corpus is."""

    work: tuple[Work, ...]
    num_done: int
    num_deleted: int  # committed, and no longer in the input; their rows are kept

    @property
    def num_new(self) -> int:
        return sum(not work.supersedes for work in self.work)

    @property
    def num_changed(self) -> int:
        return sum(bool(work.supersedes) for work in self.work)

    @property
    def size_bytes(self) -> int:
        return sum(work.shard.size_bytes for work in self.work)


def plan_files(listing: Listing, log: CommitLog, fingerprint: str) -> Plan:
    """The plan where every file is a shard: archives and Parquet files."""
    live_by_name: dict[str, list[str]] = defaultdict(list)
    for stem in log.live:
        live_by_name[name_part(stem)].append(stem)
    work: list[Work] = []
    seen: set[str] = set()
    for file in listing.files:
        uri = listing.root.url(file.path)
        shard = Shard(file.path, uri, listing.format, file.size, file.version)
        stem = shard.stem(fingerprint)
        if stem in log.live:
            seen.add(stem)
            continue
        namesakes = log.read(live_by_name.get(file_name(file.path), ()))
        older = [commit for commit in namesakes if commit.shard.name == shard.name]
        for commit in older:
            _refuse_other_root(commit.shard.uri, uri, file.path)
        seen.update(commit.stem for commit in older)
        work.append(Work(shard, stem, tuple(commit.stem for commit in older)))
    done = len(seen) - sum(len(item.supersedes) for item in work)
    return Plan(tuple(work), done, len(log.live) - len(seen))


def plan_members(
    listing: Listing, members: Iterable[Member], log: CommitLog, fingerprint: str, group_size: int
) -> Plan:
    """The plan where files are grouped: loose images, and the rows of a manifest.

    A committed group stays as it is, or is redone under its name where a member changed; members that
    no group has form new groups of `group_size`, in order. A deleted member's rows are kept.
    """
    root = listing.root.url(listing.files[0].path if listing.format == "manifest" else "")
    groups = [c for c in log.read(log.live) if c.shard.format in ("images", "manifest")]
    present = {(member.path, member.repeat): member for member in members}
    num_deleted, redo = 0, []
    for group in groups:
        known = [(member.path, member.repeat) for member in group.shard.members]
        current = [present.pop(key, None) for key in known]
        if group.shard.uri != root and any(current):
            _refuse_other_root(group.shard.uri, root, next(m.path for m in current if m))
        num_deleted += current.count(None)
        redo += _redo(group, current, fingerprint)
    fresh = [
        Work(shard, shard.stem(fingerprint))
        for shard in _groups(list(present.values()), root, listing.format, group_size)
    ]
    return Plan((*redo, *fresh), len(groups) - len(redo), num_deleted)


def _redo(group: Commit, current: list[Member | None], fingerprint: str) -> list[Work]:
    """The work that a committed group still needs: none where no member changed."""
    before = group.shard.members
    changed = [now for now, was in zip(current, before, strict=True) if now and now != was]
    if not changed:
        return []
    members = tuple(now or was for now, was in zip(current, before, strict=True))
    shard = Shard(group.shard.name, group.shard.uri, group.shard.format, members=members)
    carried = frozenset(m.path for m in before) - {m.path for m in changed}
    return [Work(shard, shard.stem(fingerprint), (group.stem,), carried)]


def _groups(members: list[Member], root: str, layout: str, group_size: int) -> Iterator[Shard]:
    for start in range(0, len(members), group_size):
        group = tuple(members[start : start + group_size])
        first = hashlib.sha256(repr((group[0].path, group[0].repeat)).encode()).hexdigest()[:12]
        yield Shard(f"{GROUP_PREFIX}{first}", root, layout, members=group)


def _refuse_other_root(before: str, now: str, path: str) -> None:
    if before != now:
        raise InputError(
            f"input.uri: the output already holds {path} from {before}, and it is now at {now}; "
            "two inputs would get the same ids: give this one another output.uri"
        )
