"""What a run has done so far: the one thing that progress, the report and the exit code read.

Receipts and commits go in; figures come out. Its memory does not grow with images, chunks or shards
(of failed shards it keeps the names).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from pipeline.open_shards import OpenShards
from pipeline.timeline import Recent, Timeline, Top
from pipeline.totals import Totals

WORK = ("read", "decode", "model", "write")  # stages with workers of their own
STAGES = ("list", "read", "decode", "wait", "model", "write")
HALF_BUSY = 0.5
_EXAMPLES, _EXAMPLE_CHARS = 5, 300


@dataclass
class Tally:
    """What a run has done so far; the report and the progress bar are made from it."""

    run: str
    output: str
    fingerprint: str = ""
    lease_s: float = 120.0
    list_s: float = 0.0  # seconds of listing and planning
    planned_shards: int = 0
    planned_bytes: int = 0
    done_before: int = 0
    removed_shards: int = 0  # gone from the input, and now from the output
    waiting_files: int = 0  # too young
    ignored_shards: Sequence[str] = ()
    committed_shards: int = 0
    committed_bytes: int = 0
    images: int = 0  # committed
    rejects: Counter[str] = field(default_factory=Counter)  # committed
    images_seen: int = 0  # received, be they committed or not
    rejects_seen: Counter[str] = field(default_factory=Counter)
    failed_shards: dict[str, str] = field(default_factory=dict)
    stopped: str = ""  # why the run ended before its plan did
    started: float = field(default_factory=time.time)
    work_started: float | None = None  # the first read
    first_receipt: float | None = None
    last_receipt: float | None = None
    images_in_first: int = 0
    stage_s: dict[str, float] = field(default_factory=dict)  # of read, decode, wait, model and write
    stage_slots: dict[str, float] = field(default_factory=dict)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # of rejects, by reason
    labels: Counter[str] = field(default_factory=Counter)  # committed
    timeline: Timeline = field(default_factory=Timeline)
    largest: Top = field(default_factory=Top)
    slowest: Top = field(default_factory=Top)
    written: Totals = field(default_factory=Totals)  # of this run's commits
    ended: float | None = None
    _shards: OpenShards = field(default_factory=OpenShards, repr=False)
    _recent: Recent = field(default_factory=Recent, repr=False)

    @property
    def num_seen(self) -> int:
        """Samples received: images and rejects."""
        return self.images_seen + self.rejects_seen.total()

    @property
    def seconds(self) -> float:
        return (self.ended or time.time()) - self.started

    @property
    def startup_s(self) -> float | None:
        """From the start of the process to the first receipt."""
        return self.first_receipt - self.started if self.first_receipt else None

    @property
    def images_per_s(self) -> float:
        """Images after the first receipt, over the seconds from the first to the last."""
        if self.first_receipt is None or self.last_receipt is None:
            return 0.0
        elapsed = self.last_receipt - self.first_receipt
        return (self.images_seen - self.images_in_first) / elapsed if elapsed > 0 else 0.0

    @property
    def recent_images_per_s(self) -> float:
        """Images a second over the last minute until now."""
        return self._recent.rate(time.time(), self.images_seen)

    @property
    def busy(self) -> dict[str, float]:
        """Share of the time, from the first read to the last receipt, that each stage's slots worked."""
        if self.last_receipt is None:
            return {}
        begun = self.work_started or self.first_receipt or self.started
        elapsed = max(self.last_receipt - max(begun, self.started), 1e-3)
        shares = {name: self.stage_s.get(name, 0.0) / slots for name, slots in self.stage_slots.items()}
        return {name: min(1.0, seconds / elapsed) for name, seconds in shares.items()}

    @property
    def limiting_stage(self) -> str | None:
        """Of read, decode, model and write the one whose slots were busy for most of the time.

        None before anything is received. What was busy for less than HALF_BUSY of the time did not
        limit alone: start-up and waiting did (`is_waiting`).
        """
        load = {name: self.stage_s.get(name, 0.0) / slots for name, slots in self.stage_slots.items()}
        return max(load, key=lambda name: load[name]) if load and self.num_seen else None

    @property
    def is_waiting(self) -> bool:
        """Whether no stage was busy for even half of the time."""
        return max(self.busy.values(), default=0.0) < HALF_BUSY

    @property
    def fraction_done(self) -> float:
        """Share of the planned bytes (of the planned shards where sizes are unknown) that is finished."""
        if self.planned_bytes:
            return min(1.0, self.committed_bytes / self.planned_bytes)
        finished = self.committed_shards + len(self.failed_shards)
        return finished / self.planned_shards if self.planned_shards else 1.0

    @property
    def seconds_left(self) -> float | None:
        """An estimate from the share that is finished; None before the first shard is."""
        if self.first_receipt is None or not 0 < self.fraction_done < 1:
            return None
        elapsed = time.time() - self.first_receipt
        return elapsed * (1 - self.fraction_done) / self.fraction_done

    def note(self, receipt: Mapping[str, Any]) -> None:
        """Count a chunk that has passed through every stage, from its RECEIPTS row.

        A chunk that comes again counts its seconds alone, which were spent again.
        """
        now = time.time()
        timings: dict[str, float] = json.loads(receipt["timings"])
        self._note_seconds(timings, now)
        if not self._shards.receive(receipt, timings.get("read_started")):
            return
        num_rows, rejects = receipt["num_rows"], Counter(json.loads(receipt["rejects_by_reason"]))
        self._recent.add(now, self.images_seen)
        self.images_seen += num_rows
        self.rejects_seen.update(rejects)
        self.last_receipt = now
        if self.first_receipt is None:
            self.first_receipt, self.images_in_first = now, num_rows
        self.timeline.add(now - self.started, num_rows, rejects.total())
        for row in json.loads(receipt["examples"]):
            examples = self.examples.setdefault(row["reason"], [])
            if len(examples) < _EXAMPLES:
                examples.append({name: _cut(value) for name, value in row.items()})

    def note_commit(
        self,
        shard_name: str,
        num_rows: int,
        rejects: Counter[str],
        size_bytes: int,
        *,
        stem: str,
        written_bytes: int,
    ) -> None:
        """Count a committed shard, once: what this run made of it, its bytes in input and output."""
        account = self._shards.commit(stem)
        if account is None:
            return
        self.committed_shards += 1
        self.committed_bytes += size_bytes
        self.images += num_rows
        self.rejects.update(rejects)
        self.labels.update(account.labels)
        now, num_rejects = time.time(), rejects.total()
        seconds = max(0.0, now - (account.started or now))
        facts: dict[str, Any] = {"size_bytes": size_bytes, "images": num_rows, "rejects": num_rejects}
        facts["seconds"] = round(seconds, 3)
        self.largest.add(shard_name, size_bytes or num_rows + num_rejects, facts)
        self.slowest.add(shard_name, seconds, facts)
        committed_at = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
        self.written.add(stem, num_rows, rejects, written_bytes, committed_at)

    def _note_seconds(self, timings: Mapping[str, float], now: float) -> None:
        for stage in WORK:
            self.stage_s[stage] = self.stage_s.get(stage, 0.0) + timings.get(stage, 0.0)
        self.stage_s["wait"] = self.stage_s.get("wait", 0.0) + waited_s(timings)
        begun = min(now, max(self.started, timings.get("read_started", now)))
        self.work_started = min(begun, self.work_started or begun)


def waited_s(timings: Mapping[str, float]) -> float:
    """Seconds that a chunk lay between stages whose start and end are told.

    Clocks of machines differ: a stage that seems to begin before the one before it ended counts as 0.
    """
    told = [stage for stage in WORK if f"{stage}_started" in timings and stage in timings]
    return sum(
        max(0.0, timings[f"{after}_started"] - timings[f"{before}_started"] - timings[before])
        for before, after in pairwise(told)
        if WORK.index(after) == WORK.index(before) + 1
    )


def _cut(value: Any) -> Any:
    return value[:_EXAMPLE_CHARS] if isinstance(value, str) else value
