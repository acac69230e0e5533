"""Totals of all commits of an output, without reading all of them where a report has them already.

A report's totals carry a mark: the sum of hashes of the live commits' names, which does not depend on
their order, so that a run adds its own to those of the run before. Where the mark of a listing is the
same, the totals stand; else the records are read, in lots, and forgotten again.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pipeline.commits import CommitLog
from pipeline.storage import Storage

_MODULUS = 2**128
_LOT = 512  # records in memory at once; those of loose images list thousands of members


@dataclass
class Totals:
    """What live commits hold together."""

    shards: int = 0
    images: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    size_bytes: int = 0  # of their files in the output
    last_commit_at: str = ""
    mark: int = 0

    def add(
        self, stem: str, images: int, rejects: Counter[str], size_bytes: int, committed_at: str
    ) -> None:
        """Count one commit."""
        self.shards += 1
        self.images += images
        self.rejects.update(rejects)
        self.size_bytes += size_bytes
        self.last_commit_at = max(self.last_commit_at, committed_at)
        self.mark = (self.mark + mark_of([stem])) % _MODULUS

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.shards + other.shards,
            self.images + other.images,
            self.rejects + other.rejects,
            self.size_bytes + other.size_bytes,
            max(self.last_commit_at, other.last_commit_at),
            (self.mark + other.mark) % _MODULUS,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "shards": self.shards,
            "images": self.images,
            "rejects_by_reason": dict(self.rejects.most_common()),
            "size_bytes": self.size_bytes,
            "last_commit_at": self.last_commit_at or None,
            "mark": f"{self.mark:032x}",
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Totals:
        return cls(
            values["shards"],
            values["images"],
            Counter(values["rejects_by_reason"]),
            values["size_bytes"],
            values["last_commit_at"] or "",
            int(values["mark"], 16),
        )


def mark_of(stems: Iterable[str]) -> int:
    """A number that tells sets of stems apart, and of a union is the sum."""
    digests = (hashlib.sha256(stem.encode()).digest()[:16] for stem in stems)
    return sum(int.from_bytes(digest) for digest in digests) % _MODULUS


def totals_of(output: Storage, log: CommitLog, known: Totals | None) -> Totals:
    """The totals of the live commits: `known` where they are of the same commits, else from the records."""
    if known is not None and (known.shards, known.mark) == (len(log.live), mark_of(log.live)):
        return known
    totals, stems = Totals(), iter(sorted(log.live))
    while lot := list(islice(stems, _LOT)):
        for commit in CommitLog(output).read(lot):  # a log remembers what it has read; this one is dropped
            size = commit.embeddings.size_bytes + (commit.rejects.size_bytes if commit.rejects else 0)
            reasons = Counter(commit.rejects_by_reason)
            totals.add(commit.stem, commit.num_rows, reasons, size, commit.committed_at)
    return totals
