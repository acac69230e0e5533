"""A version of labels for every committed image of an output: made, written, published.

Enters: an output, and how it is to be labelled. Leaves: `labels/<version>/labels.parquet`, `summary.json`
and, of a probe, `probe.safetensors`; `labels/CURRENT` names the version, last. What people decided in
reviews goes before all else. Rows stream.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.commits import CommitLog
from pipeline.config import LabelConfig
from pipeline.errors import InputError
from pipeline.fingerprint import require_fingerprint
from pipeline.labelled_rows import tables
from pipeline.labels.decide import UNKNOWN, Rule
from pipeline.labels.methods import METHODS, Method, open_known
from pipeline.labels.overrides import Overrides
from pipeline.progress import iso_time
from pipeline.published import publish
from pipeline.storage import Storage, unique_name

LABELS, FILE = "labels", "labels.parquet"
MOST_CELLS = 2**22  # probabilities at once
MOST_ROWS = 4096


def make_labels(output: Storage, config: LabelConfig) -> dict[str, Any]:
    """Label every committed image; returns the summary.

    Raises InputError or ConfigError where labels are wanted and not there, SearchError without an index of
    what neighbours are looked for in.
    """
    started = time.time()
    fingerprint = require_fingerprint(output)
    known = None if config.labels is None else open_known(output, fingerprint, config)
    log = CommitLog(output)
    ready = METHODS[config.method](log, fingerprint, known, config)
    method = ready.method
    rule = Rule.of(method.classes, config.coarser, config.threshold, config.thresholds)
    given = known if config.keep_known and config.reference is None else None
    known_rows = Overrides(log, rule, given, config.coarser)
    version = unique_name()
    counts = _write(log, f"{LABELS}/{version}/{FILE}", method, rule, known_rows)
    if not counts.total():
        raise InputError(f"{output.uri} has no committed images to label")
    for name, data in ready.files.items():
        output.write_bytes(f"{LABELS}/{version}/{name}", data)
    summary = {
        "version": version,
        "method": method.method,
        "images": counts.total(),
        "unknown": counts[UNKNOWN] if UNKNOWN not in rule.labels else None,
        "labels": dict(counts.most_common()),
        "classes": len(rule.labels),
        "label_names": known_rows.names,
        **ready.facts,
        "config": config.model_dump(mode="json"),
        "fingerprint": fingerprint.digest,
        "made_at": iso_time(started),
        "seconds": round(time.time() - started, 3),
    }
    publish(output, LABELS, version, summary)
    return summary


def _write(log: CommitLog, path: str, method: Method, rule: Rule, overrides: Overrides) -> Counter[str]:
    """Write the labels of all images, some at a time; how many have each."""
    counts: Counter[str] = Counter()
    with (
        log.output.replacing(path) as local,
        pq.ParquetWriter(local, schema.LABELS, compression="zstd") as writer,
    ):
        for rows in _labelled(log, method, rule, overrides):
            writer.write_table(rows)
            found = rows.column("label").combine_chunks().value_counts()
            counts.update(dict(zip(*(found.field(n).to_pylist() for n in (0, 1)), strict=True)))
    return counts


def _labelled(log: CommitLog, method: Method, rule: Rule, overrides: Overrides) -> Iterator[pa.Table]:
    at_once = max(64, min(MOST_ROWS, MOST_CELLS // max(1, len(method.classes))))
    columns = (schema.IMAGE_ID, *method.columns, *overrides.columns)
    for stem, table in tables(log, columns, at_once):
        ids = table.column(schema.IMAGE_ID).combine_chunks()
        yield overrides.put_into(rule.columns(ids, method(table, stem), method.method), table)
