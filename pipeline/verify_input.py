"""Committed shards held against the input as it is now: gone or changed since they were done.

That is no damage: the rows are those of the images as they were. One listing a root, none a shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipeline.shards import Shard
from pipeline.storage import FileInfo, Storage, parent_and_name

OpenInput = Callable[[str], Storage]
"""Opens a folder of the input by its URI, with the options that its file system needs."""

_CHANGED = "the next extract does it again"
_GONE = "its rows are kept; input.on_deleted: remove makes the next extract take them out"
_NAMED = 3  # images of a group that are named
_UNLISTED = ("http://", "https://")


@dataclass
class InputCheck:
    """What became of the shards in the input. `notes` say which are gone or changed, and what follows."""

    open_input: OpenInput
    num_shards: int = 0
    num_unchanged: int = 0
    num_changed: int = 0
    num_gone: int = 0
    notes: list[str] = field(default_factory=list)
    _roots: dict[str, dict[str, FileInfo]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "shards": self.num_shards,
            "unchanged": self.num_unchanged,
            "changed": self.num_changed,
            "gone": self.num_gone,
            "notes": self.notes,
        }

    def check(self, shard: Shard) -> None:
        """Hold one shard against its root's listing.

        A group of loose images is changed where a member is, or is gone; a manifest's rows have no
        identity of their own, so that only the manifest itself is looked for.
        """
        self.num_shards += 1
        if shard.format == "images":
            self._check_group(shard)
            return
        root, name = _root_of(shard)
        found = self._file(root, name)
        if found is None:
            self._note_gone(shard)
        elif shard.format != "manifest" and (found.size, found.version) != (shard.size, shard.version):
            self.num_changed += 1
            self.notes.append(f"{shard.uri}: changed since it was done; {_CHANGED}")
        else:
            self.num_unchanged += 1

    def _check_group(self, shard: Shard) -> None:
        gone, changed = [], []
        for member in shard.members:
            found = self._file(shard.uri, member.path)
            if found is None:
                gone.append(member.path)
            elif (found.size, found.version) != (member.size, member.version):
                changed.append(member.path)
        if len(gone) == len(shard.members):
            self._note_gone(shard, f"all {len(gone):,} images of {shard.name} are")
        elif gone or changed:
            self.num_changed += 1
        else:
            self.num_unchanged += 1
        if changed:
            self.notes.append(f"{shard.uri}: {_some(changed)} of {shard.name} changed; {_CHANGED}")
        if gone and len(gone) < len(shard.members):
            self.notes.append(f"{shard.uri}: {_some(gone)} of {shard.name} gone; {_GONE}")

    def _note_gone(self, shard: Shard, what: str = "it is") -> None:
        self.num_gone += 1
        self.notes.append(f"{shard.uri}: {what} gone from the input; {_GONE}")

    def _file(self, root: str, name: str) -> FileInfo | None:
        """A file of the input, from its root's one listing; asked for by itself where none can be had."""
        if root.startswith(_UNLISTED):
            try:
                return self.open_input(root).info(name)
            except FileNotFoundError:
                return None
        if root not in self._roots:
            self._roots[root] = {info.path: info for info in self.open_input(root).find()}
        return self._roots[root].get(name)


def _root_of(shard: Shard) -> tuple[str, str]:
    """The URI of the folder that a shard's name starts from, and its path below it."""
    tail = f"/{shard.name}"
    if shard.format != "manifest" and shard.uri.endswith(tail):
        return shard.uri.removesuffix(tail) or "/", shard.name
    return parent_and_name(shard.uri)


def _some(paths: list[str]) -> str:
    named = ", ".join(paths[:_NAMED])
    return f"{len(paths):,} images ({named}{', …' if len(paths) > _NAMED else ''})"
