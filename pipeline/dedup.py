"""Groups of images that are the same, or nearly so: found, written, published.

Enters: an output whose index is of its committed rows. Leaves: `dedup/<version>/groups.parquet` (group,
image_id, similarity, representative) and `summary.json`; `dedup/CURRENT` names the version, last.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.commits import Commit, CommitLog
from pipeline.components import Components
from pipeline.config import DedupConfig
from pipeline.duplicate_graph import Rows, batches, join_near, join_same_bytes, read_rows
from pipeline.errors import SearchError
from pipeline.index.brute_force import cosines
from pipeline.index.vectors import Ids, Vectors
from pipeline.published import publish
from pipeline.search import Searcher
from pipeline.storage import Storage, unique_name

DEDUP = "dedup"
_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True)
class DedupSummary:
    """What was found. `removable` images could go: all of a group but its representative."""

    version: str
    index: str
    threshold: float
    images: int
    groups: int
    images_in_groups: int
    same_bytes: int
    removable: int
    share_removable: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Groups:
    """Rows in groups, ordered by group: their group's number, and the row that stands for it."""

    rows: Ids
    numbers: Ids
    representatives: Ids


def open_searcher(output: Storage) -> tuple[Searcher, tuple[Commit, ...]]:
    """The index of an output and the commits it is of: all that have rows. SearchError otherwise."""
    searcher, log = Searcher(output), CommitLog(output)
    commits = tuple(commit for commit in log.read(log.live) if commit.num_rows)
    if {commit.stem for commit in commits} != set(searcher.record.commits):
        raise SearchError(
            f"the index of {output.uri} is not of its committed images; "
            f"run: cvt-pipeline index {output.uri}"
        )
    return searcher, commits


def find_duplicates(output: Storage, config: DedupConfig) -> DedupSummary:
    """Find and publish the groups. Raises SearchError where there is no index of the committed rows."""
    started = time.time()
    searcher, commits = open_searcher(output)
    rows = read_rows(output, commits, searcher)
    components = Components(len(rows))
    join_same_bytes(rows, components)
    same_bytes = len(rows) - len(np.unique(components.roots(np.arange(len(rows)))))
    join_near(rows, components, searcher.engine, config.threshold)
    groups = _groups(rows, components)
    num_groups = len(np.unique(groups.numbers))
    version = unique_name()
    _write(output, version, rows, groups, searcher)
    summary = DedupSummary(
        version=version,
        index=searcher.record.version,
        threshold=config.threshold,
        images=len(rows),
        groups=num_groups,
        images_in_groups=len(groups.rows),
        same_bytes=same_bytes,
        removable=len(groups.rows) - num_groups,
        share_removable=round((len(groups.rows) - num_groups) / max(len(rows), 1), 6),
        seconds=round(time.time() - started, 3),
    )
    publish(output, DEDUP, version, summary.to_json())
    return summary


def _groups(rows: Rows, components: Components) -> _Groups:
    """Components of two and more, the largest first; the row with the most pixels stands for each."""
    roots = components.roots(np.arange(len(rows)))
    names, inverse, sizes = np.unique(roots, return_inverse=True, return_counts=True)
    ranks = np.empty(len(names), np.int64)
    ranks[np.lexsort((names, -sizes))] = np.arange(len(names))
    members = np.flatnonzero(sizes[inverse] > 1)
    numbers = ranks[inverse[members]]
    order = np.lexsort((members, -rows.num_pixels[members], numbers))
    members, numbers = members[order], numbers[order]
    _, firsts, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    return _Groups(members, numbers, members[firsts][inverse])


def _write(output: Storage, version: str, rows: Rows, groups: _Groups, searcher: Searcher) -> None:
    names = _image_ids(output, rows, groups.rows)
    with (
        output.replacing(f"{DEDUP}/{version}/groups.parquet") as path,
        pq.ParquetWriter(path, schema.DUPLICATES, compression="zstd") as writer,
    ):
        for start in range(0, len(groups.rows), _ROWS_AT_ONCE):
            some = slice(start, start + _ROWS_AT_ONCE)
            members, chosen = groups.rows[some], groups.representatives[some]
            columns = [
                pa.array(groups.numbers[some]),
                names.slice(start, len(members)),
                pa.array(_similarities(rows, members, chosen, searcher)),
                pa.array(members == chosen),
            ]
            writer.write_table(pa.table(columns, schema.DUPLICATES))


def _similarities(rows: Rows, members: Ids, chosen: Ids, searcher: Searcher) -> Vectors:
    """Cosines of rows to those that stand for them; 1 for the same bytes, which need no vector."""
    same = (rows.digests[members] == rows.digests[chosen]).all(axis=1)
    left, right = rows.faiss_ids[members], rows.faiss_ids[chosen]
    found = np.ones(len(members), np.float32)
    compared = np.flatnonzero(~same & (left >= 0) & (right >= 0))
    store = searcher.engine.store
    for start in range(0, len(compared), 4096):
        some = compared[start : start + 4096]
        found[some] = cosines(store, store.take(left[some]), right[some, None])[:, 0]
    return np.minimum(found, np.float32(1))


def _image_ids(output: Storage, rows: Rows, wanted: Ids) -> pa.Array:
    """The ids of some rows, in their order."""
    order = np.argsort(wanted, kind="stable")
    ordered, found = wanted[order], []
    for commit, start in zip(rows.commits, rows.starts[:-1].tolist(), strict=True):
        for batch in batches(output, commit, [schema.IMAGE_ID]):
            first, last = np.searchsorted(ordered, [start, start + len(batch)])
            found.append(batch.column(0).take(pa.array(ordered[first:last] - start)))
            start += len(batch)
    names = pa.chunked_array(found, pa.string()).combine_chunks()
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return names.take(pa.array(back))
