"""What has come of the shards in progress, for the tally: counted once, however often a chunk comes.

Holds the shards that are begun and the names of those that ended last, never the whole corpus.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

REMEMBERED = 4096  # shards; a wave has about 2,000


@dataclass
class Account:
    """What a shard's chunks brought."""

    started: float | None = None  # the first chunk's read, by its worker's clock
    chunks: set[int] = field(default_factory=set)
    labels: Counter[str] = field(default_factory=Counter)


class OpenShards:
    """Accounts by stem, from a shard's first receipt to its commit or its failure."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._committed: dict[str, None] = {}  # the last stems

    def receive(self, receipt: Mapping[str, Any], started: float | None) -> bool:
        """Add a RECEIPTS row to its shard's account; False where the same chunk was there before."""
        stem = receipt["stem"]
        if stem in self._committed:
            return False
        account = self._accounts.setdefault(stem, Account())
        if started is not None:
            account.started = min(started, account.started or started)
        if receipt["chunk"] in account.chunks:
            return False
        account.chunks.add(receipt["chunk"])
        account.labels.update(json.loads(receipt["labels"]))
        if receipt["error"]:
            del self._accounts[stem]  # it counts for nothing, unless it is tried again
        _forget_oldest(self._accounts)
        return True

    def commit(self, stem: str) -> Account | None:
        """Close a shard's account; None where that was done before."""
        if stem in self._committed:
            return None
        self._committed[stem] = None
        _forget_oldest(self._committed)
        return self._accounts.pop(stem, None) or Account()


def _forget_oldest(entries: dict[str, Any]) -> None:
    while len(entries) > REMEMBERED:
        del entries[next(iter(entries))]
