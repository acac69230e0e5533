"""What a run keeps of its past in bounded memory: counts over time, the ten largest of anything."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import Any

BUCKETS = 240
TOP = 10


@dataclass
class Timeline:
    """Images and rejects by time since the start, in a fixed number of buckets that widen as time goes on.

    Buckets begin one second wide; when the last is full, pairs are merged and all are twice as wide.
    """

    bucket_s: float = 1.0
    images: list[int] = field(default_factory=lambda: [0] * BUCKETS)
    rejects: list[int] = field(default_factory=lambda: [0] * BUCKETS)

    def add(self, at_s: float, images: int, rejects: int) -> None:
        """Count what was received `at_s` seconds after the start (a clock set back counts as the start)."""
        at_s = max(0.0, at_s)
        while at_s >= self.bucket_s * BUCKETS:
            self.bucket_s *= 2
            self.images, self.rejects = _halved(self.images), _halved(self.rejects)
        bucket = int(at_s / self.bucket_s)
        self.images[bucket] += images
        self.rejects[bucket] += rejects

    def to_json(self, seconds: float) -> dict[str, Any]:
        """The buckets of a run that took so long."""
        used = max((n + 1 for n in range(BUCKETS) if self.images[n] or self.rejects[n]), default=0)
        length = min(BUCKETS, max(used, 1 + int(seconds / self.bucket_s)))
        return {
            "bucket_s": self.bucket_s,
            "images": self.images[:length],
            "rejects": self.rejects[:length],
        }


@dataclass
class Recent:
    """A count at about every second of the last minute, for the rate of now."""

    window_s: float = 60.0
    _samples: deque[tuple[float, int]] = field(default_factory=deque)

    def add(self, now: float, count: int) -> None:
        """Note that the count was so much just before `now`."""
        if not self._samples or now - self._samples[-1][0] >= 1:
            self._samples.append((now, count))
        while len(self._samples) > 1 and (
            self._samples[0][0] < now - self.window_s or len(self._samples) > self.window_s + 2
        ):
            self._samples.popleft()

    def rate(self, now: float, count: int) -> float:
        """What was added a second over the last minute; 0 where nothing came in it."""
        window = [sample for sample in self._samples if sample[0] >= now - self.window_s]
        if not window or now <= window[0][0]:
            return 0.0
        return (count - window[0][1]) / (now - window[0][0])


@dataclass
class Top:
    """The ten entries with the largest values; a name stands once, with what was said of it last."""

    _entries: dict[str, tuple[float, dict[str, Any]]] = field(default_factory=dict)

    def add(self, name: str, value: float, facts: dict[str, Any]) -> None:
        self._entries[name] = (value, facts)
        kept = heapq.nlargest(TOP, self._entries, key=lambda entry: self._entries[entry][0])
        self._entries = {entry: self._entries[entry] for entry in kept}

    def to_json(self) -> list[dict[str, Any]]:
        """Largest first: the name and the facts of each."""
        return [{"shard": name, **facts} for name, (_, facts) in self._entries.items()]


def _halved(counts: list[int]) -> list[int]:
    return [a + b for a, b in zip(counts[::2], counts[1::2], strict=True)] + [0] * (BUCKETS // 2)
