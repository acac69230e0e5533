"""What an output holds and whether a run is at work on it: totals, progress, the last run, the index.

Reads listings, the lease, the last report and the progress file of a run; commit records only where the
last report's totals do not stand for the commits that are there. Changes nothing.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from datetime import datetime
from typing import Any

from pipeline.commits import CommitLog
from pipeline.config import RunConfig
from pipeline.errors import OutputError
from pipeline.fingerprint import require_fingerprint
from pipeline.index.record import current_version
from pipeline.lease import Holder, read_holder
from pipeline.progress import PROGRESS, iso_time
from pipeline.report import last_report, totals_in
from pipeline.storage import STAGING, FileInfo, Storage
from pipeline.totals import Totals, totals_of

_LAST_RUN = (
    *("run", "started_at", "ended_at", "seconds", "startup_s", "images", "rejects", "rejects_by_reason"),
    *("images_per_s", "limiting_stage", "stopped", "shards", "waiting_files"),
)


ALIVE = ("running", "starting")
_TRIES = 5


def status(output: Storage) -> dict[str, Any]:
    """Totals of an output and the state of its run as JSON values; the names are a contract."""
    fingerprint = require_fingerprint(output)
    report = last_report(output)
    totals = _totals(output, totals_in(report))
    staging = output.find(STAGING)
    run = _run(output, staging, report)
    alive = run["run"] if run and run["state"] in ALIVE else None
    return {
        "output": output.uri,
        "shards": totals.shards,
        "images": totals.images,
        "rejects": totals.rejects.total(),
        "rejects_by_reason": dict(totals.rejects.most_common()),
        "size_bytes": totals.size_bytes,
        "checkpoint": fingerprint.source,
        "precision": fingerprint.precision,
        "fingerprint": fingerprint.digest,
        "last_commit_at": totals.last_commit_at or None,
        "run": run,
        "last_run": {name: report.get(name) for name in _LAST_RUN} if report else None,
        "unfinished_runs": sorted(_by_run(staging).keys() - {alive}),
        "staging": {"files": len(staging), "size_bytes": sum(info.size for info in staging)},
        "index": current_version(output),
    }


def run_at_work(output: Storage) -> bool:
    """Whether a run holds the output and is heard of."""
    run = _run(output, output.find(STAGING), last_report(output))
    return run is not None and run["state"] in ALIVE


def _totals(output: Storage, known: Totals | None) -> Totals:
    """Totals of the commits as they are at one moment: a run at work may replace some meanwhile."""
    for _ in range(_TRIES):
        try:
            return totals_of(output, CommitLog(output), known)
        except FileNotFoundError:
            continue
    raise OutputError(f"{output.uri}: its commits change faster than they can be read; try again")


def _run(output: Storage, staging: list[FileInfo], report: dict[str, Any] | None) -> dict[str, Any] | None:
    """The run that holds the output, or the newest that left word of its progress; None where none did.

    `state` is `running`, `starting` (no progress yet), `stalled` (nothing was heard of it for longer
    than its lease lasts: stalled or killed) or `dead` (its process is known to be gone).
    """
    holder = read_holder(output)
    found = [info.path for info in staging if info.path.endswith(f"/{PROGRESS}")]
    name = holder.run if holder else (found[-1].split("/")[1] if found else None)
    if name is None:
        return None
    progress = _progress(output, f"{STAGING}/{name}/{PROGRESS}")
    told = progress or (report or {}).get("config", {}).get("run", {})
    lease_s = told.get("lease_s", RunConfig().lease_s)
    return {
        "run": name,
        "state": _state(holder, progress, lease_s),
        "host": holder.host if holder else (progress or {}).get("host"),
        "pid": holder.pid if holder else (progress or {}).get("pid"),
        "since": iso_time(holder.since) if holder else (progress or {}).get("started_at"),
        "heard_of_at": _heard_of(holder, progress),
        "progress": progress,
    }


def _progress(output: Storage, path: str) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads(output.read_bytes(path))
    except FileNotFoundError:  # none written yet, or the run has just ended
        return None
    return values


def _state(holder: Holder | None, progress: dict[str, Any] | None, lease_s: float) -> str:
    if holder is None or holder.is_known_dead():
        return "dead"
    now = time.time()
    if now >= holder.expires(lease_s):
        return "stalled"
    if progress is None:
        return "starting"
    age_s = now - datetime.fromisoformat(progress["updated_at"]).timestamp()
    return "stalled" if age_s > lease_s else "running"


def _heard_of(holder: Holder | None, progress: dict[str, Any] | None) -> str:
    times = [iso_time(holder.renewed)] if holder else []
    return max([*times, progress["updated_at"]] if progress else times)


def _by_run(staging: list[FileInfo]) -> dict[str, list[FileInfo]]:
    runs: dict[str, list[FileInfo]] = defaultdict(list)
    for info in staging:
        runs[info.path.split("/")[1]].append(info)
    return runs
