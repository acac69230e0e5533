"""The nightly job after its extract: the index, labels, duplicates, each where the config has its section.

Enters: a config and the tally of its extract, which has committed and reported what it could. Leaves: how
each step ended, one by one, in the report of that extract too. A step that fails leaves what the steps
before it published as it is. Knows nothing of how a step is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from pipeline.config import Config, DedupConfig, IndexConfig, LabelConfig
from pipeline.errors import Interrupted, PipelineError
from pipeline.report import add_steps, read_report, totals_in
from pipeline.steps import Step
from pipeline.stop import Stop
from pipeline.storage import Storage
from pipeline.tally import Tally

_INDEX_FACTS = ("version", "type", "num_vectors", "recall_at_10", "latency_ms")
_LABEL_FACTS = ("version", "method", "images", "unknown", "classes")

Work = Callable[[], dict[str, Any]]


def nightly(config: Config, tally: Tally, stop: Stop) -> Iterator[Step]:
    """Carry out what follows an extract; yields each step when it has ended, the extract first.

    The later steps run over what is committed, also where shards have failed. None runs after an extract
    that was stopped, over an output without images, or once a signal has asked to stop; and none that
    needs the index where that step is not done. Such steps are skipped, with the reason. A PipelineError of
    a step is in it, and the first step that failed decides how the night ended: all is well if and only if
    none did. After every step the report says what is known by then.
    """
    output = Storage(config.output.uri, config.output_options)
    ended = [_extracted(tally)]
    add_steps(output, tally.run, [step.to_json() for step in ended])
    yield ended[0]
    for name, needs_index, work in _planned(config, output):
        obstacle = _obstacle(output, tally, stop, ended, needs_index=needs_index)
        ended.append(Step(name, "skipped", message=obstacle) if obstacle else _carry_out(name, work))
        add_steps(output, tally.run, [step.to_json() for step in ended])
        yield ended[-1]


def _extracted(tally: Tally) -> Step:
    failed = len(tally.failed_shards)
    message = f"{failed:,} failed shard{'s' * (failed != 1)}, left out" if failed else None
    message = tally.stopped or message
    return Step("extract", "failed" if message else "done", tally.seconds, message)


def _planned(config: Config, output: Storage) -> Iterator[tuple[str, bool, Work]]:
    """What the config asks for: a step's name, whether it needs the index, and its work."""
    if config.index is not None:
        yield "index", False, partial(_index, output, config.index)
    if config.label is not None:
        yield "label", config.label.method == "neighbours", partial(_label, output, config.label)
    if config.dedup is not None:
        yield "dedup", True, partial(_dedup, output, config.dedup)


def _obstacle(
    output: Storage, tally: Tally, stop: Stop, ended: list[Step], *, needs_index: bool
) -> str | None:
    """Why the next step cannot run; None where it can."""
    if tally.stopped:
        return "extract was stopped before its end"
    if stop.signum is not None:
        return str(Interrupted(stop.signum))
    index = next((step for step in ended if step.name == "index"), None)
    if needs_index and index is not None and index.status != "done":
        return f"needs the index, which {'failed' if index.status == 'failed' else 'was skipped'}"
    totals = totals_in(read_report(output, tally.run))
    if totals is not None and not totals.images:  # None: records are damaged, which the step tells
        return "the output has no committed images yet"
    return None


def _carry_out(name: str, work: Work) -> Step:
    started = time.monotonic()
    try:
        facts = work()
    except PipelineError as error:
        return Step(name, "failed", time.monotonic() - started, str(error), error=error)
    return Step(name, "done", time.monotonic() - started, facts=facts)


# What a step needs is imported when its turn comes: FAISS is not to be in memory during the extract.


def _index(output: Storage, config: IndexConfig) -> dict[str, Any]:
    from pipeline.index.build import build_index

    record = build_index(output, config)
    return {name: getattr(record, name) for name in _INDEX_FACTS}


def _label(output: Storage, config: LabelConfig) -> dict[str, Any]:
    from pipeline.labels.make import make_labels

    summary = make_labels(output, config)
    return {name: summary[name] for name in _LABEL_FACTS}


def _dedup(output: Storage, config: DedupConfig) -> dict[str, Any]:
    from pipeline.dedup import find_duplicates

    return find_duplicates(output, config).to_json()
