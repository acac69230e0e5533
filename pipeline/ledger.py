"""From receipts to commits: which chunks of which shard have come, and what follows when all have.

Enters: RECEIPTS rows, in any order, some of them twice. When every chunk of a shard has its receipt, its
parts are assembled (by a task of the cluster), put in place, and its commit is created, all beside the
stages' own work. Holds the shards that are planned or begun, not those that are done. Knows no Ray.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipeline.commits import Commit, write_commit
from pipeline.lease import Lease
from pipeline.parts import put_in_place
from pipeline.prepare import Prepared
from pipeline.schema import safe_text
from pipeline.shards import Work
from pipeline.tally import Tally

if TYPE_CHECKING:
    from pipeline.run import Extraction, Files

_COMMIT_THREADS = 8  # a commit is a handful of requests, one after the other

logger = logging.getLogger(__name__)


@dataclass
class _InProgress:
    """What has come of a shard so far."""

    work: Work
    chunks: set[int] = field(default_factory=set)
    num_chunks: int | None = None
    num_rows: int = 0
    rejects: Counter[str] = field(default_factory=Counter)


class Ledger:
    """The shards of a run's plan, from their first receipt to their commit."""

    def __init__(self, prepared: Prepared, extraction: Extraction, lease: Lease, tally: Tally) -> None:
        self._prepared, self._extraction, self._tally = prepared, extraction, tally
        self._lease = lease
        self._expected: dict[str, Work] = {}
        self._begun: dict[str, _InProgress] = {}
        self._settled: set[str] = set()  # of the wave that is under way: all receipts came, or it failed
        self._complete: dict[str, _InProgress] = {}
        self._committing: dict[Future[int], str] = {}
        self._threads = ThreadPoolExecutor(_COMMIT_THREADS, thread_name_prefix="commit")

    def begin(self, wave: list[Work]) -> None:
        """Expect the receipts of these shards, and of no others."""
        self._expected = {work.stem: work for work in wave}
        self._settled.clear()

    def unsettled(self, wave: list[Work]) -> list[Work]:
        """Those of which receipts are missing."""
        return [work for work in wave if work.stem not in self._settled]

    def receive(self, receipt: dict[str, Any]) -> None:
        """Note a chunk; begin to assemble its shard where that was the last one missing."""
        stem = receipt["stem"]
        if stem in self._settled:
            return  # a chunk of a failed shard, or one that was delivered before
        shard = self._begun.setdefault(stem, _InProgress(self._expected[stem]))
        if receipt["chunk"] in shard.chunks:
            return
        self._tally.note(receipt)
        shard.chunks.add(receipt["chunk"])
        if receipt["error"]:
            self.fail(shard.work, receipt["error"])
            return
        shard.num_rows += receipt["num_rows"]
        shard.rejects += Counter(json.loads(receipt["rejects_by_reason"]))
        shard.num_chunks = receipt["num_chunks"] or shard.num_chunks
        if shard.num_chunks == len(shard.chunks):
            self._settled.add(stem)
            self._complete[stem] = self._begun.pop(stem)
            self._extraction.assemble(shard.work)

    def fail(self, work: Work, error: str) -> None:
        """Leave a shard out, by name."""
        name = safe_text(work.shard.name)
        self._tally.failed_shards[name] = error
        logger.warning("shard %s is left out: %s", name, error)
        self._settled.add(work.stem)
        self._begun.pop(work.stem, None)

    def commit(self, *, wait: bool) -> Iterator[None]:
        """Commit the shards whose files are assembled by now, or all that are complete.

        Yields now and then; raises what made a commit impossible.
        """
        for assembled in self._extraction.assembled(wait=wait):
            if assembled is not None:
                work, files = assembled
                self._committing[self._threads.submit(self._commit, work, files)] = work.stem
            self._note_commits()
            yield
        while wait and self._committing:
            wait_for(self._committing, timeout=0.1)
            self._note_commits()
            yield

    def close(self) -> None:
        """Let the commits that are under way end; begin no others."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def check_none_left(self) -> None:
        """Every planned shard was committed or has failed by name; else it is a bug of ours."""
        for stem, shard in [*self._begun.items(), *self._complete.items()]:
            raise RuntimeError(f"{stem}: {len(shard.chunks)} of {shard.num_chunks} chunks arrived")

    def _note_commits(self) -> None:
        for future in [future for future in self._committing if future.done()]:
            stem = self._committing.pop(future)
            written = future.result()
            shard = self._complete.pop(stem)
            work, num_rejects = shard.work, shard.rejects.total()
            name = safe_text(work.shard.name)
            size = work.size_bytes
            self._tally.note_commit(
                name, shard.num_rows, shard.rejects, size, stem=stem, written_bytes=written
            )
            logger.info("committed %s: %d images, %d rejects", name, shard.num_rows, num_rejects)

    def _commit(self, work: Work, files: Files) -> int:
        """Put a shard's files in place and create its record, in a thread of its own; returns the bytes."""
        embeddings, rejects, reasons = files
        shard = self._complete[work.stem]
        num_rejects = rejects.num_rows if rejects else 0
        expected = len(work.shard.members) or shard.num_rows + shard.rejects.total()
        if embeddings.num_rows + num_rejects != expected:
            raise RuntimeError(f"{work.stem}: the assembled rows are not those of the receipts")
        output = self._prepared.output
        self._lease.check()
        for file in (embeddings, rejects):
            if file is not None:
                put_in_place(output, self._tally.run, file)
        write_commit(
            output,
            Commit(
                stem=work.stem,
                shard=work.shard,
                fingerprint=self._prepared.fingerprint.digest,
                num_samples=embeddings.num_rows + num_rejects,
                num_rows=embeddings.num_rows,
                num_rejects=num_rejects,
                rejects_by_reason=reasons,
                embeddings=embeddings,
                rejects=rejects,
                supersedes=work.supersedes,
                run=self._tally.run,
                committed_at=datetime.now(UTC).isoformat(timespec="seconds"),
            ),
        )
        return embeddings.size_bytes + (rejects.size_bytes if rejects else 0)
