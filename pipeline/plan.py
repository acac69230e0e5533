"""What a run has to do: the listing held against the commits.

Enters: a Listing, the commit log, the fingerprint, the rules of the config. Leaves: a Plan, in the
listing's order. One listing of `commits/` decides for archives; for loose images and manifests the records
of their groups are read, since those list the members.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import pyarrow as pa

from pipeline.commits import Commit, CommitLog
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.manifest import Manifest
from pipeline.shards import Listing, Member, Shard, Work, file_name, name_part
from pipeline.storage import FileInfo

GROUP_PREFIX = "images-"


@dataclass(frozen=True)
class Rules:
    """What the config says of files that are young, unwanted or gone. `now` is in epoch seconds."""

    now: float
    min_age_s: float = 0
    ignore: tuple[str, ...] = ()
    remove_deleted: bool = False
    max_deleted_fraction: float = 0.1
    group_size: int = 4096

    @classmethod
    def of(cls, config: Config, now: float) -> Rules:
        return cls(
            now=now,
            min_age_s=config.input.min_age_s,
            ignore=config.input.ignore_shards,
            remove_deleted=config.input.on_deleted == "remove",
            max_deleted_fraction=config.limits.max_deleted_fraction,
            group_size=config.compute.shard_images,
        )

    def ignores(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.ignore)

    def is_young(self, file: FileInfo) -> bool:
        return bool(self.min_age_s) and (file.modified or 0) > self.now - self.min_age_s

    def removes(self, num_deleted: int, num_committed: int) -> bool:
        """Whether what is gone from the input goes from the output too."""
        return self.remove_deleted and num_deleted <= self.max_deleted_fraction * num_committed

    def refusal(self, num_deleted: int, num_committed: int, things: str) -> str:
        """Why nothing is removed, although the config asks for it; empty where nothing is the matter."""
        if not self.remove_deleted or self.removes(num_deleted, num_committed):
            return ""
        return (
            f"{num_deleted:,} of {num_committed:,} committed {things} are gone from the input, more than "
            f"limits.max_deleted_fraction = {self.max_deleted_fraction} allows: nothing is removed; check "
            "that the input is all there, or raise the limit"
        )


@dataclass(frozen=True)
class Plan:
    """Shards to do, and what the rest of the corpus is."""

    work: tuple[Work, ...] = ()
    num_done: int = 0
    num_deleted: int = 0  # shards (of groups: images) that are committed, and no longer in the input
    removed: tuple[str, ...] = ()  # stems whose commits go, without a successor
    num_young: int = 0  # files that wait for the next run
    ignored: tuple[str, ...] = ()  # files and groups that the config leaves out
    refusal: str = ""  # why rows of deleted inputs are not removed, where they should be

    @property
    def num_new(self) -> int:
        return sum(not work.supersedes for work in self.work)

    @property
    def num_changed(self) -> int:
        return sum(bool(work.supersedes) for work in self.work)

    @property
    def size_bytes(self) -> int:
        return sum(work.size_bytes for work in self.work)


def plan_input(
    listing: Listing,
    manifest: Manifest | None,
    metadata: Iterable[pa.Field],
    log: CommitLog,
    fingerprint: str,
    rules: Rules,
) -> Plan:
    """The plan of any input. `metadata` are the columns of a manifest that tell its rows apart."""
    if manifest is not None:
        return plan_members(listing, manifest.members(list(metadata)), log, fingerprint, rules)
    if listing.format == "images":
        members = [Member(file.path, file.size, file.version) for file in listing.files]
        return plan_members(listing, members, log, fingerprint, rules)
    return plan_files(listing, log, fingerprint, rules)


def plan_files(listing: Listing, log: CommitLog, fingerprint: str, rules: Rules) -> Plan:
    """The plan where every file is a shard: archives and Parquet files."""
    live_by_name: dict[str, list[str]] = defaultdict(list)
    for stem in log.live:
        live_by_name[name_part(stem)].append(stem)
    work: list[Work] = []
    ignored: list[str] = []
    seen: set[str] = set()
    num_done = num_young = 0
    for file in listing.files:
        shard = Shard(file.path, listing.root.url(file.path), listing.format, file.size, file.version)
        stem = shard.stem(fingerprint)
        if stem in log.live:
            seen.add(stem)
            num_done += 1
            continue
        older = _earlier(log, live_by_name.get(file_name(file.path), ()), shard)
        seen.update(older)
        if rules.ignores(file.path):
            ignored.append(file.path)
        elif rules.is_young(file):
            num_young += 1
        else:
            work.append(Work(shard, stem, older))
    deleted = sorted(log.live - seen)
    counts = len(deleted), len(log.live)
    return Plan(
        work=tuple(work),
        num_done=num_done,
        num_deleted=len(deleted),
        removed=tuple(deleted) if rules.removes(*counts) else (),
        num_young=num_young,
        ignored=tuple(ignored),
        refusal=rules.refusal(*counts, "shards"),
    )


def _earlier(log: CommitLog, stems: Iterable[str], shard: Shard) -> tuple[str, ...]:
    """The live commits of an earlier state of a file."""
    earlier = [commit for commit in log.read(stems) if commit.shard.name == shard.name]
    for commit in earlier:
        _refuse_other_root(commit.shard.uri, shard.uri, shard.name)
    return tuple(commit.stem for commit in earlier)


def plan_members(
    listing: Listing, members: Iterable[Member], log: CommitLog, fingerprint: str, rules: Rules
) -> Plan:
    """The plan where files are grouped: loose images, and the rows of a manifest.

    A committed group stays as it is, or is redone under its name where a member changed or, if the rules
    say so, is gone; the rows of its other members are copied. Members that no group has form new groups,
    in order.
    """
    root = listing.root.url(listing.files[0].path if listing.format == "manifest" else "")
    young = _young(listing, rules)
    ignored = {member.path for member in members if rules.ignores(member.path)} if rules.ignore else set()
    present = {(member.path, member.repeat): member for member in members}
    groups = [c for c in log.read(log.live) if c.shard.format in ("images", "manifest")]
    current = {group.stem: _current(group, present, root) for group in groups}
    num_members = sum(map(len, current.values()))
    num_deleted = sum(found.count(None) for found in current.values())
    remove = rules.removes(num_deleted, num_members)
    redo: list[Work] = []
    removed: list[str] = []
    for group in groups:
        if rules.ignores(group.shard.name):
            ignored.add(group.shard.name)
        elif remove and not any(current[group.stem]):
            removed.append(group.stem)
        else:
            redo += _redo(group, current[group.stem], young | ignored, fingerprint, remove=remove)
    fresh = [m for m in present.values() if m.path not in young and m.path not in ignored]
    new: list[Work] = []
    for shard in _groups(fresh, root, listing.format, rules.group_size):
        if rules.ignores(shard.name):
            ignored.add(shard.name)
        else:
            new.append(Work(shard, shard.stem(fingerprint)))
    return Plan(
        work=(*redo, *new),
        num_done=len(groups) - len(redo) - len(removed),
        num_deleted=num_deleted,
        removed=tuple(removed),
        num_young=len(young & _wanted(groups, current, present.values())),
        ignored=tuple(sorted(ignored)),
        refusal=rules.refusal(num_deleted, num_members, "images"),
    )


def _young(listing: Listing, rules: Rules) -> frozenset[str]:
    """Loose images that have to wait; a manifest's rows have no age of their own."""
    if listing.format == "manifest":
        return frozenset()
    return frozenset(file.path for file in listing.files if rules.is_young(file))


def _wanted(
    groups: list[Commit], current: dict[str, list[Member | None]], new: Iterable[Member]
) -> frozenset[str]:
    """Paths of the images that are new or changed, be it their turn or not."""
    pairs = (
        pair for group in groups for pair in zip(current[group.stem], group.shard.members, strict=True)
    )
    changed = (now.path for now, was in pairs if now and now != was)
    return frozenset(changed) | frozenset(member.path for member in new)


def _current(group: Commit, present: dict[tuple[str, int], Member], root: str) -> list[Member | None]:
    """A group's members as the input has them now, which are taken out of `present`."""
    found = [present.pop((member.path, member.repeat), None) for member in group.shard.members]
    if group.shard.uri != root and any(found):
        _refuse_other_root(group.shard.uri, root, next(member.path for member in found if member))
    return found


def _redo(
    group: Commit,
    current: list[Member | None],
    waiting: frozenset[str] | set[str],
    fingerprint: str,
    *,
    remove: bool,
) -> list[Work]:
    """The work that a committed group still needs: none where no member changed, and none has to go."""
    before = group.shard.members
    pairs = list(zip(current, before, strict=True))
    changed = {now.path for now, was in pairs if now and now != was and now.path not in waiting}
    gone = {was for now, was in pairs if now is None} if remove else set()
    if not changed and not gone:
        return []
    members = tuple(now if now and now.path in changed else was for now, was in pairs if was not in gone)
    changed |= {was.path for was in gone}  # a manifest may name one image several times
    shard = Shard(group.shard.name, group.shard.uri, group.shard.format, members=members)
    carried = frozenset(member.path for member in members) - changed
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
