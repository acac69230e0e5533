"""What a run has done so far: the one thing that the progress bar, the report and the exit code read."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """What a run has done so far; the report and the progress bar are made from it."""

    run: str
    output: str
    fingerprint: str = ""
    planned_shards: int = 0
    planned_bytes: int = 0
    done_before: int = 0
    committed_shards: int = 0
    committed_bytes: int = 0
    images: int = 0  # committed
    rejects: Counter[str] = field(default_factory=Counter)  # committed
    images_seen: int = 0  # received, be they committed or not
    rejects_seen: Counter[str] = field(default_factory=Counter)
    failed_shards: dict[str, str] = field(default_factory=dict)
    stopped: str = ""  # why the run ended before its plan did
    started: float = field(default_factory=time.time)
    first_receipt: float | None = None
    last_receipt: float | None = None
    images_in_first: int = 0
    stage_s: dict[str, float] = field(default_factory=dict)
    stage_slots: dict[str, float] = field(default_factory=dict)
    ended: float | None = None

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
    def limiting_stage(self) -> str | None:
        """The stage whose workers were busy for the largest share of the time."""
        busy = {name: self.stage_s.get(name, 0.0) / slots for name, slots in self.stage_slots.items()}
        return max(busy, key=lambda name: busy[name]) if self.images_seen else None

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

    def note(self, num_rows: int, rejects: Counter[str], timings: dict[str, float]) -> None:
        """Count a chunk that has passed through every stage."""
        self.last_receipt = time.time()
        self.images_seen += num_rows
        self.rejects_seen += rejects
        if self.first_receipt is None:
            self.first_receipt, self.images_in_first = self.last_receipt, num_rows
        for stage in self.stage_slots:
            self.stage_s[stage] = self.stage_s.get(stage, 0.0) + timings.get(stage, 0.0)
