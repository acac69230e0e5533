"""What an output holds, from its records alone: totals, the last run, the served index."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from pipeline.commits import CommitLog
from pipeline.fingerprint import require_fingerprint
from pipeline.index import current_version
from pipeline.report import REPORTS
from pipeline.storage import STAGING, Storage


def status(output: Storage) -> dict[str, Any]:
    """Totals of an output as JSON values. Reads records and listings, no results."""
    fingerprint = require_fingerprint(output)
    log = CommitLog(output)
    commits = log.read(log.live)
    rejects: Counter[str] = Counter()
    for commit in commits:
        rejects.update(commit.rejects_by_reason)
    files = [file for commit in commits for file in (commit.embeddings, commit.rejects) if file]
    reports = [info.path for info in output.find(REPORTS) if info.path.endswith(".json")]
    return {
        "output": output.uri,
        "shards": len(commits),
        "images": sum(commit.num_rows for commit in commits),
        "rejects": rejects.total(),
        "rejects_by_reason": dict(rejects.most_common()),
        "size_bytes": sum(file.size_bytes for file in files),
        "checkpoint": fingerprint.source,
        "precision": fingerprint.precision,
        "fingerprint": fingerprint.digest,
        "last_commit_at": max((commit.committed_at for commit in commits), default=None),
        "last_run": json.loads(output.read_bytes(reports[-1])) if reports else None,
        "unfinished_runs": sorted({info.path.split("/")[1] for info in output.find(STAGING)}),
        "index": current_version(output),
    }
