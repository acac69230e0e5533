"""The tally: figures of receipts and commits that are right, and a memory that does not grow."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.open_shards import REMEMBERED
from pipeline.tally import Tally, waited_s
from pipeline.timeline import BUCKETS, Recent, Timeline, Top

STARTED = 1_000_000.0


def receipt(stem: str = "a-1", chunk: int = 0, num_rows: int = 10, **changes: Any) -> dict[str, Any]:
    """A RECEIPTS row; `rejects`, `labels`, `examples` and `timings` are packed as JSON."""
    values: dict[str, Any] = {
        "rejects": {},
        "labels": {"cat": num_rows},
        "examples": [],
        "timings": {"read_started": STARTED + 1, "read": 1.0, "decode": 2.0, "model": 4.0, "write": 0.5},
        **changes,
    }
    packed = {name: json.dumps(values.pop(name)) for name in ("labels", "examples", "timings")}
    return {
        "stem": stem,
        "chunk": chunk,
        "num_chunks": None,
        "error": None,
        "num_rows": num_rows,
        "rejects_by_reason": json.dumps(values.pop("rejects")),
        **packed,
        **values,
    }


def example(reason: str, number: int = 0, message: str = "why") -> dict[str, Any]:
    name = f"{number}.png"
    return {
        "image_id": name,
        "shard": "s",
        "key": name,
        "reason": reason,
        "message": message,
        "size_bytes": 1,
    }


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock to so many seconds after the start."""

    def set_clock(seconds: float) -> None:
        monkeypatch.setattr("pipeline.tally.time.time", lambda: STARTED + seconds)

    set_clock(10)
    return set_clock


@pytest.fixture
def tally(at: Callable[[float], None]) -> Tally:
    made = Tally("run", "out", started=STARTED)
    made.stage_slots = {"read": 2.0, "decode": 2.0, "model": 1.0, "write": 2.0}
    return made


def commit(tally: Tally, name: str = "a", stem: str = "a-1", images: int = 10, **changes: Any) -> None:
    values = {"size_bytes": 100, "written_bytes": 7, **changes}
    rejects = values.pop("rejects", Counter())
    size = values.pop("size_bytes")
    tally.note_commit(name, images, rejects, size, stem=stem, **values)


def test_receipts_become_counts_seconds_and_labels(tally: Tally, at: Callable[[float], None]) -> None:
    tally.note(receipt(rejects={"empty": 2}))
    at(14)
    tally.note(receipt(chunk=1, num_rows=30, labels={"cat": 10, "dog": 20}))
    commit(tally, images=40, rejects=Counter(empty=2))

    assert (tally.images_seen, tally.num_seen, tally.images) == (40, 42, 40)
    assert tally.images_per_s == 30 / 4
    assert tally.startup_s == 10
    assert tally.stage_s == {"read": 2.0, "decode": 4.0, "model": 8.0, "write": 1.0, "wait": 0.0}
    assert tally.limiting_stage == "model"
    assert tally.labels == Counter(cat=20, dog=20)
    assert tally.timeline.images[10] == 10
    assert tally.timeline.rejects[10] == 2
    assert tally.timeline.images[14] == 30


def test_a_chunk_that_comes_again_costs_time_and_counts_once(tally: Tally) -> None:
    for _ in range(2):
        tally.note(receipt(rejects={"empty": 1}, examples=[example("empty")]))
    commit(tally, rejects=Counter(empty=1))
    tally.note(receipt(rejects={"empty": 1}, examples=[example("empty")]))  # after its shard's commit

    assert (tally.images_seen, tally.rejects_seen.total(), tally.labels["cat"]) == (10, 1, 10)
    assert sum(tally.timeline.images) == 10
    assert len(tally.examples["empty"]) == 1
    assert tally.stage_s["model"] == 12.0


def test_a_shard_that_is_committed_again_counts_once(tally: Tally) -> None:
    tally.note(receipt())
    for _ in range(2):
        commit(tally)

    assert (tally.committed_shards, tally.committed_bytes, tally.images) == (1, 100, 10)
    assert (tally.written.shards, tally.written.images, tally.written.size_bytes) == (1, 10, 7)
    assert len(tally.largest.to_json()) == len(tally.slowest.to_json()) == 1


def test_labels_of_a_failed_shard_are_not_counted(tally: Tally) -> None:
    tally.note(receipt("bad-1"))
    tally.note(receipt("bad-1", chunk=1, num_rows=0, error="cut off"))
    tally.note(receipt("a-1"))
    commit(tally)

    assert tally.labels == Counter(cat=10)
    assert tally.images_seen == 20


def test_waiting_is_the_time_between_stages_and_never_negative(tally: Tally) -> None:
    timings = {"read_started": 5.0, "read": 1.0, "decode_started": 8.0, "decode": 2.0}
    assert waited_s(timings) == 2.0
    assert waited_s({**timings, "model_started": 17.0, "model": 1.0, "write": 1.0}) == 9.0
    assert waited_s({**timings, "model_started": 3.0, "model": 1.0}) == 2.0  # a clock that is behind
    assert waited_s({"read_started": 5.0, "read": 1.0, "model_started": 9.0, "model": 1.0}) == 0.0
    assert waited_s({}) == 0.0


def test_the_limit_is_the_stage_whose_slots_were_busiest(tally: Tally, at: Callable[[float], None]) -> None:
    assert tally.limiting_stage is None
    tally.note(receipt(timings={"read_started": STARTED, "read": 1.0, "decode": 19.0, "model": 9.0}))
    assert tally.limiting_stage == "decode"  # 19 s of two slots against 9 s of one
    assert tally.busy == pytest.approx({"read": 0.05, "decode": 0.95, "model": 0.9, "write": 0})
    assert not tally.is_waiting
    at(100)
    tally.note(receipt(chunk=1, timings={}))
    assert tally.limiting_stage == "decode"
    assert tally.is_waiting


def test_a_run_that_rejects_everything_names_its_limit_too(tally: Tally) -> None:
    tally.note(receipt(num_rows=0, rejects={"empty": 5}))
    assert tally.limiting_stage == "model"


def test_five_examples_are_kept_of_each_reason_and_long_ones_are_cut(tally: Tally) -> None:
    for chunk in range(4):
        rows = [example("corrupt", 10 * chunk + n, "x" * 10_000) for n in range(3)]
        tally.note(receipt(chunk=chunk, examples=[*rows, example("empty", chunk)]))

    assert [row["image_id"] for row in tally.examples["corrupt"]] == [f"{n}.png" for n in (0, 1, 2, 10, 11)]
    assert len(tally.examples["empty"]) == 4
    assert len(tally.examples["corrupt"][0]["message"]) == 300


def test_the_largest_and_the_slowest_shards_are_kept(tally: Tally, at: Callable[[float], None]) -> None:
    for number in range(50):
        stem = f"s{number:02d}-1"
        tally.note(receipt(stem, timings={"read_started": STARTED + number}))
        at(100)
        commit(tally, f"s{number:02d}", stem, size_bytes=1000 + number)

    assert [row["shard"] for row in tally.largest.to_json()] == [f"s{n}" for n in range(49, 39, -1)]
    assert [row["shard"] for row in tally.slowest.to_json()] == [f"s{n:02d}" for n in range(10)]
    assert tally.slowest.to_json()[0]["seconds"] == 100
    assert tally.largest.to_json()[0]["size_bytes"] == 1049


def test_memory_does_not_grow_with_images_chunks_and_shards(
    tally: Tally, at: Callable[[float], None]
) -> None:
    sizes = []
    for number in range(6 * REMEMBERED):
        at(10 + number * 60)
        stem = f"s{number}-1"
        error = "cut off" if number % 3 == 0 else None
        tally.note(receipt(stem, error=error, rejects={"empty": 1}, examples=[example("empty", number)]))
        tally.note(receipt(stem, chunk=1))  # of a failed shard too: it comes late
        if not error:
            commit(tally, f"s{number}", stem)
        if number % (2 * REMEMBERED) == 2 * REMEMBERED - 1:
            sizes.append(size_of(tally))
    assert sum(tally.timeline.images) == tally.images_seen > 200_000
    assert sizes[2] < 1.02 * sizes[1], sizes  # by the first, not all that is remembered was full


def size_of(thing: Any, seen: set[int] | None = None) -> int:
    """Bytes of an object and all that it holds."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    inner: list[Any] = []
    if isinstance(thing, dict):
        inner = [*thing.keys(), *thing.values()]
    elif hasattr(thing, "__dict__"):
        inner = list(vars(thing).values())
    elif not isinstance(thing, str | bytes) and hasattr(thing, "__iter__"):
        inner = list(thing)
    return sys.getsizeof(thing) + sum(size_of(part, seen) for part in inner)


def test_a_timeline_widens_its_buckets_and_loses_nothing() -> None:
    timeline = Timeline()
    for second in range(10 * BUCKETS):
        timeline.add(second, 3, 1)
    assert timeline.bucket_s == 16
    assert (sum(timeline.images), sum(timeline.rejects)) == (30 * BUCKETS, 10 * BUCKETS)
    assert timeline.images[:149] == [48] * 149
    assert len(timeline.images) == BUCKETS
    timeline.add(-5, 1, 0)
    assert timeline.images[0] == 49


def test_a_timeline_tells_the_buckets_of_a_runs_time() -> None:
    timeline = Timeline()
    timeline.add(2.5, 7, 0)
    assert timeline.to_json(5.2) == {
        "bucket_s": 1.0,
        "images": [0, 0, 7, 0, 0, 0],
        "rejects": [0] * 6,
    }


def test_the_rate_of_the_last_minute_forgets_what_was_before() -> None:
    recent = Recent()
    for second in range(300):
        recent.add(second, 100 * second)
    assert recent.rate(300, 30_000) == pytest.approx(100)
    for second in range(300, 400):
        recent.add(second, 30_000 + 10 * (second - 300))
    assert recent.rate(400, 31_000) == pytest.approx(10)
    assert recent.rate(1000, 31_000) == 0
    assert Recent().rate(5, 0) == 0


def test_a_name_stands_once_among_the_largest() -> None:
    top = Top()
    top.add("a", 5, {"x": 1})
    top.add("a", 7, {"x": 2})
    top.add("b", 6, {"x": 3})
    assert top.to_json() == [{"shard": "a", "x": 2}, {"shard": "b", "x": 3}]
