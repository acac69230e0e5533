"""What a run did: `reports/<run>.json` for programs, a page for people, a summary for the terminal."""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.commits import CommitLog
from pipeline.config import Config
from pipeline.errors import OutputError
from pipeline.progress import describe, format_duration, iso_time, progress_values
from pipeline.report_page import report_page
from pipeline.storage import Storage
from pipeline.tally import STAGES, Tally
from pipeline.totals import Totals, totals_of

REPORTS = "reports"
TOP_LABELS = 50
_PACKAGES = (
    *("cvt-pipeline", "ray", "torch", "openvino", "numpy", "pyarrow", "pillow", "faiss-cpu"),
    *("fsspec", "s3fs", "gcsfs", "adlfs"),
)

logger = logging.getLogger(__name__)


def report_values(tally: Tally, config: Config) -> dict[str, Any]:
    """The report as JSON values. Names are a contract with programs that read it."""
    return {
        "run": tally.run,
        "output": tally.output,
        "started_at": iso_time(tally.started),
        "ended_at": iso_time(tally.started + tally.seconds),
        "seconds": round(tally.seconds, 3),
        "startup_s": None if tally.startup_s is None else round(tally.startup_s, 3),
        "images": tally.images,
        "rejects": tally.rejects.total(),
        "rejects_by_reason": dict(tally.rejects.most_common()),
        "images_seen": tally.images_seen,
        "rejects_seen_by_reason": dict(tally.rejects_seen.most_common()),
        "reject_examples": tally.examples,
        "images_per_s": round(tally.images_per_s, 3),
        "timeline": tally.timeline.to_json(tally.seconds),
        "limiting_stage": tally.limiting_stage,
        "is_waiting": tally.is_waiting,
        "stages": _stages(tally),
        "stage_s": {name: round(seconds, 3) for name, seconds in tally.stage_s.items()},
        "stage_slots": tally.stage_slots,
        "shards": {
            "done_before": tally.done_before,
            "planned": tally.planned_shards,
            "committed": tally.committed_shards,
            "removed": tally.removed_shards,
            "failed": tally.failed_shards,
            "ignored": list(tally.ignored_shards),
        },
        "waiting_files": tally.waiting_files,
        "largest_shards": tally.largest.to_json(),
        "slowest_shards": tally.slowest.to_json(),
        "labels": _labels(tally),
        "stopped": tally.stopped or None,
        "fingerprint": tally.fingerprint,
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "machine": _machine(),
    }


def write_report(output: Storage, tally: Tally, config: Config) -> None:
    """Put the report beside the results, as JSON and as a page."""
    values = report_values(tally, config)
    totals = _totals(output, tally)
    values["totals"] = totals.to_json() if totals else None
    _write(output, tally.run, values)


def add_steps(output: Storage, run: str, steps: list[dict[str, Any]]) -> None:
    """Put the steps of a nightly job into the report that its extract wrote, in both its forms."""
    _write(output, run, read_report(output, run) | {"steps": steps})


def _write(output: Storage, run: str, values: dict[str, Any]) -> None:
    output.write_bytes(f"{REPORTS}/{run}.json", json.dumps(values, indent=1).encode())
    output.write_bytes(f"{REPORTS}/{run}.html", report_page(values).encode())


def read_report(output: Storage, run: str) -> dict[str, Any]:
    """The report of a run. OutputError where the file is none."""
    path = f"{REPORTS}/{run}.json"
    try:
        values: dict[str, Any] = json.loads(output.read_bytes(path))
    except ValueError as error:
        raise OutputError(
            f"{output.url(path)}: not a report ({error}); delete it, nothing depends on it"
        ) from error
    return values


def last_report(output: Storage) -> dict[str, Any] | None:
    """The report of the run that ended last, or None."""
    reports = [info.path for info in output.find(REPORTS) if info.path.endswith(".json")]
    if not reports:
        return None
    return read_report(output, reports[-1].removeprefix(f"{REPORTS}/").removesuffix(".json"))


def totals_in(report: dict[str, Any] | None) -> Totals | None:
    """The output's totals as a report has them; None where it has none."""
    values = (report or {}).get("totals")
    return Totals.from_json(values) if values else None


def _totals(output: Storage, tally: Tally) -> Totals | None:
    """The output's totals after this run: those of the report before and its own, where they add up.

    They do not after shards were changed or removed, or a run was killed; then the records are read,
    unless somebody waits for this run to stop.
    """
    try:
        known = totals_in(last_report(output))
        if tally.stopped:
            return known + tally.written if known else None
        return totals_of(output, CommitLog(output), (known or Totals()) + tally.written)
    except OutputError as error:  # a damaged record or report costs the totals alone
        logger.warning("no totals in the report: %s", error)
        return None


def _stages(tally: Tally) -> dict[str, dict[str, Any]]:
    """Seconds by stage, their share of all, and how busy each stage's slots were."""
    seconds = {"list": tally.list_s, **tally.stage_s}
    total = sum(seconds.values()) or 1.0
    return {
        name: {
            "seconds": round(seconds.get(name, 0.0), 3),
            "share": round(seconds.get(name, 0.0) / total, 4),
            "slots": tally.stage_slots.get(name),
            "busy": round(tally.busy[name], 4) if name in tally.busy else None,
        }
        for name in STAGES
    }


def _labels(tally: Tally) -> dict[str, Any]:
    top = tally.labels.most_common(TOP_LABELS)
    return {
        "num_labels": len(tally.labels),
        "top": dict(top),
        "others": tally.labels.total() - sum(count for _, count in top),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that settle results, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _machine() -> dict[str, Any]:
    """The driver's machine, as far as it is known without asking anything that is slow."""
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpu": _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": [_field(path, "Model") or path.parent.name for path in gpus],
    }


def _field(path: Path, name: str) -> str:
    """The value of the first `name : value` line of a file of the kernel's; empty where there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    values = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name)
    return next(values, "")


def summarize(tally: Tally, console: Console, next_step: str | None) -> None:
    """The last words of a run on the terminal: what there is, where, and what to do next, if anything."""
    table = Table(box=None, show_header=False, pad_edge=False)
    if tally.planned_shards:
        table.add_row("shards", f"{tally.committed_shards:,} of {tally.planned_shards:,} committed")
    if tally.done_before:
        table.add_row("", f"{tally.done_before:,} were done before")
    for count, said in _left(tally):
        table.add_row("", f"{count:,} {said}")
    table.add_row("images", f"{tally.images:,}")
    table.add_row("rejects", f"{tally.rejects.total():,}")
    for reason, count in tally.rejects.most_common():
        table.add_row("", f"{count:,} {reason}")
    if tally.images_per_s:
        table.add_row("images/s", f"{tally.images_per_s:,.1f}, limited by {tally.limiting_stage}")
    table.add_row("seconds", format_duration(tally.seconds))
    table.add_row("output", escape(tally.output))
    console.print(table)
    for name, error in list(tally.failed_shards.items())[:20]:
        console.print(f"[red]left out:[/] {escape(name)}: {escape(error)}", highlight=False)
    if len(tally.failed_shards) > 20:
        console.print(f"[red]left out:[/] {len(tally.failed_shards) - 20:,} more; the report names all")
    if tally.stopped:
        console.print(f"[red]stopped:[/] {escape(tally.stopped)}", highlight=False)
    elif not tally.planned_shards:
        other = "other " if tally.waiting_files or tally.ignored_shards else ""
        console.print(f"nothing to do: every {other}shard of the input is committed")
    elif next_step:
        console.print(f"next: cvt-pipeline {next_step} {escape(tally.output)}", highlight=False)


def log_summary(tally: Tally) -> None:
    """The last words of a run as one log record, whose `values` are those of its progress."""
    level = logging.WARNING if tally.stopped or tally.failed_shards else logging.INFO
    values = progress_values(tally) | {
        "output": tally.output,
        "seconds": round(tally.seconds, 3),
        "rejects_by_reason": dict(tally.rejects.most_common()),
        "failed_shards": list(tally.failed_shards),
        "stopped": tally.stopped or None,
    }
    logger.log(level, "run finished: %s", describe(tally), extra={"values": values})


def _left(tally: Tally) -> list[tuple[int, str]]:
    """What was neither done nor failed, where there is any."""
    counts = [
        (tally.removed_shards, "removed, as they are gone from the input"),
        (tally.waiting_files, "files are too young and wait for the next run"),
        (len(tally.ignored_shards), "ignored, as input.ignore_shards says"),
    ]
    return [(count, said) for count, said in counts if count]
