"""The life of the index: built, following the corpus night after night, measured, published, rolled back.

Enters: an output and the index's configuration. Leaves: a served version of just the committed rows, whose
recall was measured and reaches its target. The rules of what is made anew stand in drift.py.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import pyarrow.parquet as pq

from pipeline.commits import Commit, CommitLog
from pipeline.config import IndexConfig
from pipeline.errors import LimitError, OutputError, SearchError
from pipeline.fingerprint import require_fingerprint
from pipeline.index.draft import Draft, Drafter
from pipeline.index.drift import reason_after, reason_before
from pipeline.index.engine import Engine, open_faiss
from pipeline.index.files import INDEX, LEASE, FileRef, fetch
from pipeline.index.kinds import Choice, choose, deletes
from pipeline.index.memory import PeakMemory, give_back
from pipeline.index.record import IndexRecord, Settings, is_whole, publish, read_record, roll_back, tidy
from pipeline.index.tasks import runner
from pipeline.index.truth import NUM_QUERIES, Truth, make_truth
from pipeline.index.tuning import aim_of, quality, tune
from pipeline.lease import Lease, acquire
from pipeline.storage import Storage, unique_name

RENEW_QUERIES_AT = 0.25  # of the rows having come since the held-out queries were drawn

logger = logging.getLogger(__name__)


def build_index(output: Storage, config: IndexConfig | None = None) -> IndexRecord:
    """Bring the index up to the committed rows, measure it and serve it from now on.

    Where the served version already is of these rows and of this configuration it stays, and its record is
    returned. Raises OutputError where there is nothing to index, ConfigError where it does not fit,
    LimitError where it misses its target, BusyError where another build is at it; then nothing changes.
    """
    config = config or IndexConfig()
    started = time.time()
    version = unique_name()
    fingerprint = require_fingerprint(output).digest
    with _leased(output, version, config) as lease, PeakMemory() as memory:
        log = CommitLog(output)
        commits = [commit for commit in log.read(log.live) if commit.num_rows]
        if not commits:
            raise OutputError(f"{output.uri} has no committed images yet; run extract first")
        dim = _dim_of(output, commits[0])
        choice = choose(config, sum(commit.num_rows for commit in commits), dim)
        served = _served(output)
        build = _Build(output, config, version, fingerprint, choice, dim)
        reason, current = build.compared(served, commits)
        if served is not None and current:
            return served
        tidy(output, config.keep_versions)
        record = build.made(served, commits, reason)
        record = replace(
            record, build_s=round(time.time() - started, 3), peak_memory_bytes=memory.peak_bytes
        )
        lease.check()
        publish(output, record, config.keep_versions)
        return record


def roll_back_index(output: Storage, config: IndexConfig | None = None) -> IndexRecord:
    """Serve the version before the served one again; the next build goes on from there."""
    with _leased(output, unique_name(), config or IndexConfig()):
        return roll_back(output)


@contextlib.contextmanager
def _leased(output: Storage, run: str, config: IndexConfig) -> Iterator[Lease]:
    lease = acquire(output, run, config.lease_s, LEASE)
    try:
        lease.keep()
        yield lease
    finally:
        lease.release()


def _served(output: Storage) -> IndexRecord | None:
    """The served version, if there is one and every file of it."""
    try:
        record = read_record(output)
    except SearchError:
        return None
    return record if is_whole(output, record) else None


def _dim_of(output: Storage, commit: Commit) -> int:
    with output.open(commit.embeddings.path) as file:
        return int(pq.read_schema(file).field("embedding").type.list_size)


@dataclass(frozen=True)
class _Build:
    """One version in the making."""

    output: Storage
    config: IndexConfig
    version: str
    fingerprint: str
    choice: Choice
    dim: int

    def compared(self, served: IndexRecord | None, commits: list[Commit]) -> tuple[str | None, bool]:
        """Why to build from nothing (None: follow the served version), and whether that is up to date."""
        if served is None:
            return "there is no whole version yet", False
        live = {commit.stem for commit in commits}
        new = [commit for commit in commits if commit.stem not in set(served.commits)]
        gone = sum(shard.num_vectors for shard in served.shards if shard.stem not in live)
        reason = reason_before(
            served,
            self.fingerprint,
            self.choice,
            num_new=sum(commit.num_rows for commit in new),
            num_dead=served.num_dead + gone,
            deletes=deletes(self.choice),
        )
        if reason is None and served.recall_at_10 < self.config.target_recall:
            reason = f"recall@10 {served.recall_at_10} is under the target {self.config.target_recall}"
        same = not new and not gone and set(served.commits) == live
        settled = served.in_memory == self.choice.in_memory
        return reason, same and settled and reason is None

    def made(self, served: IndexRecord | None, commits: list[Commit], reason: str | None) -> IndexRecord:
        """The record of the new version, whose files are in place and which keeps its target."""
        with self._drafter() as drafter:
            if served is not None and reason is None:
                try:
                    record = self._following(drafter, served, commits)
                    reason = reason_after(record)
                except SearchError as error:
                    reason = str(error)
                if reason is None:
                    return record
                logger.info("the index is made anew: %s", reason)
                self._discard()
            record = self._anew(drafter, commits, reason or "")
        if record.recall_at_10 < self.config.target_recall:
            self._discard()
            raise LimitError(
                f"recall@10 of the new index is {record.recall_at_10:.4f}, under index.target_recall = "
                f"{self.config.target_recall}; it is not published and the served version stays. Take a "
                "larger index.memory_budget, another index.type (exact finds all), or a lower target"
            )
        return record

    def _discard(self) -> None:
        self.output.delete_folder(f"{INDEX}/{self.version}")

    @contextlib.contextmanager
    def _drafter(self) -> Iterator[Drafter]:
        with contextlib.ExitStack() as stack:
            run, elsewhere = stack.enter_context(runner(self.config.workers))
            scratch = self.output
            if not elsewhere and not self.output.is_local:
                scratch = Storage(stack.enter_context(tempfile.TemporaryDirectory(prefix="cvt-index-")))
            yield Drafter(self.output, scratch, run, self.version, self.dim)

    def _following(self, drafter: Drafter, served: IndexRecord, commits: list[Commit]) -> IndexRecord:
        known = set(served.commits)
        new = [commit for commit in commits if commit.stem not in known]
        draft = drafter.following(served, self.choice, {commit.stem for commit in commits}, new)
        since = served.num_since_queries + len(draft.new)
        engine = self._engine(drafter, draft, served.settings)
        old = Truth.read(fetch(self.output, served.truth, check=True))
        truth = old.followed(engine.store, draft.alive, draft.new)
        enough = 2 * len(truth.queries) >= min(NUM_QUERIES, draft.num_vectors // 8)
        if since > RENEW_QUERIES_AT * draft.num_vectors or not enough or not len(truth.queries):
            truth, since = make_truth(engine.store, draft.alive), 0
        figures = quality(engine, truth)
        if figures["recall_at_10"] < (self.config.target_recall + aim_of(self.config.target_recall)) / 2:
            engine = engine.with_settings(tune(engine, truth, self.config.target_recall))
            figures = quality(engine, truth)
        return self._record(
            draft,
            commits,
            truth,
            engine.settings,
            figures,
            reason="follows its parent",
            parent=served.version,
            num_trained=served.num_trained,
            num_appended=served.num_appended + len(draft.new),
            num_since_queries=since,
            trained_imbalance=served.trained_imbalance,
        )

    def _anew(self, drafter: Drafter, commits: list[Commit], reason: str) -> IndexRecord:
        draft = drafter.anew(self.choice, commits)
        engine = self._engine(drafter, draft, Settings())
        truth = make_truth(engine.store, draft.alive)
        engine = engine.with_settings(tune(engine, truth, self.config.target_recall))
        return self._record(
            draft,
            commits,
            truth,
            engine.settings,
            quality(engine, truth),
            reason=reason,
            parent=None,
            num_trained=draft.num_vectors if self.choice.num_training else 0,
            num_appended=0,
            num_since_queries=0,
            trained_imbalance=draft.imbalance,
        )

    def _engine(self, drafter: Drafter, draft: Draft, settings: Settings) -> Engine:
        give_back()
        index = open_faiss(fetch(self.output, draft.index), in_memory=self.choice.in_memory)
        alive = draft.alive if index.ntotal > draft.num_vectors else None
        return Engine(index, drafter.store(draft.segments), settings, alive)

    def _record(
        self,
        draft: Draft,
        commits: list[Commit],
        truth: Truth,
        settings: Settings,
        figures: dict[str, float],
        **history: object,
    ) -> IndexRecord:
        path = f"{INDEX}/{self.version}/truth.parquet"
        with self.output.replacing(path) as local:
            truth.write(local)
            truth_file = FileRef.of(path, local)
        num_excluded = sum(draft.excluded.values())
        if num_excluded:
            logger.warning(
                "%d embeddings are zero or not finite and cannot be found by search", num_excluded
            )
        values = {
            "version": self.version,
            "type": self.choice.type,
            "factory": self.choice.factory,
            "num_vectors": draft.num_vectors,
            "num_excluded": num_excluded,
            "dim": self.dim,
            "metric": "cosine",
            **figures,
            "num_queries": len(truth.queries),
            "target_recall": self.config.target_recall,
            "settings": settings,
            "in_memory": self.choice.in_memory,
            "memory_budget": self.config.memory_budget,
            "next_id": draft.next_id,
            "num_dead": draft.num_dead,
            "imbalance": draft.imbalance,
            "fingerprint": self.fingerprint,
            "sha256": draft.index.sha256,
            "size_bytes": draft.index.size_bytes,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "ids": draft.ids,
            "truth": truth_file,
            "commits": tuple(commit.stem for commit in commits),
            "shards": draft.shards,
            "segments": draft.segments,
            "excluded": draft.excluded,
            "build_s": 0.0,
            "peak_memory_bytes": 0,
            **history,
        }
        return IndexRecord(**values)  # type: ignore[arg-type]
