"""The main job: from a config to committed shards.

Prepares, carries out the plan, commits each shard when all of it is there, and tells what happened. A
kill at any moment costs the shards in progress, never a committed one. Knows Ray only through `run.py`.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipeline.commits import Commit, clean, write_commit
from pipeline.config import Config
from pipeline.errors import Interrupted, LimitError
from pipeline.fingerprint import claim, read_fingerprint
from pipeline.lease import Lease, acquire
from pipeline.parts import put_in_place
from pipeline.plan import Plan
from pipeline.prepare import Prepared, find_checkpoint, make_plan, prepare
from pipeline.report import write_report
from pipeline.schema import safe_text
from pipeline.shards import Work
from pipeline.stop import Stop
from pipeline.storage import STAGING, Storage, unique_name
from pipeline.tally import Tally

if TYPE_CHECKING:
    from pipeline.run import Cluster, Extraction, Files

LIMIT_FROM_SAMPLES = 1000

logger = logging.getLogger(__name__)


OnProgress = Callable[[Tally], None]


def extract(
    config: Config, *, stop: Stop, on_progress: OnProgress, started: float, verbose: bool = False
) -> Tally:
    """Do what is new. Returns the tally, whose `stopped` and `failed_shards` tell what is missing.

    `started` is the epoch time at which the process began. Raises PipelineError for everything that
    a user can mend; what was committed until then stays.
    """
    output = Storage(config.output.uri, config.output_options)
    checkpoint = find_checkpoint(config)
    stop.check()
    prepared = prepare(config, output, checkpoint, "float32")
    output.check_writable()
    stop.check()
    cluster = None
    if config.model.precision == "auto" and read_fingerprint(output) is None:
        cluster = _connect(stop, verbose)
        if cluster.has_gpu:
            prepared = prepared.with_precision("bfloat16")
    claim(output, prepared.fingerprint)
    tally = Tally(unique_name(), config.output.uri, prepared.fingerprint.digest, started=started)
    lease = acquire(output, tally.run, config.run.lease_s)
    try:
        plan, log = make_plan(prepared)
        clean(output, log)
        tally.planned_shards, tally.done_before = len(plan.work), plan.num_done
        tally.planned_bytes = plan.size_bytes
        stop.check()
        if plan.work:
            cluster = cluster or _connect(stop, verbose)
            _carry_out(prepared, plan, lease, tally, stop, on_progress)
        lease.check()
        output.delete_folder(STAGING)  # a killed run's workers may have written after `clean`
    except Interrupted as reason:
        stop.signum = reason.signum  # Ray may have caught it before us
        tally.stopped = str(reason)
    except LimitError as reason:
        tally.stopped = str(reason)
    finally:
        if cluster:
            cluster.close()
        output.delete_folder(f"{STAGING}/{tally.run}")
        lease.release()
    tally.ended = time.time()
    write_report(output, tally, config)
    return tally


def _connect(stop: Stop, verbose: bool) -> Cluster:
    from pipeline.run import Cluster  # Ray takes a second to import, and many runs have nothing to do

    cluster = Cluster(verbose=verbose)
    stop.install()
    return cluster


def _carry_out(
    prepared: Prepared,
    plan: Plan,
    lease: Lease,
    tally: Tally,
    stop: Stop,
    on_progress: OnProgress,
) -> None:
    from pipeline.run import Extraction, Resources

    resources = Resources.of_cluster(prepared.config)
    tally.stage_slots = resources.slots
    extraction = Extraction(prepared, plan, tally.run, resources)
    shards = _ShardsInProgress(prepared, plan, extraction, lease, tally)
    for receipt in extraction.receipts():
        stop.check()
        lease.renew()
        if receipt is not None:
            shards.receive(receipt)
            _check_limit(prepared.config, tally, LIMIT_FROM_SAMPLES)
        for _ in shards.commit(wait=False):
            pass
        on_progress(tally)
    for _ in shards.commit(wait=True):
        stop.check()
        lease.renew()
        on_progress(tally)
    shards.check_none_left()
    _check_limit(prepared.config, tally, 1)


def _check_limit(config: Config, tally: Tally, from_samples: int) -> None:
    limit, samples, rejected = config.limits.max_reject_fraction, tally.num_seen, tally.rejects_seen
    if samples >= from_samples and rejected.total() > limit * samples:
        most = ", ".join(f"{reason} {count:,}" for reason, count in rejected.most_common(3))
        raise LimitError(
            f"{rejected.total():,} of {samples:,} samples were rejected ({most}), more than "
            f"limits.max_reject_fraction = {limit} allows; look into {tally.output}/rejects, or raise it"
        )


@dataclass
class _InProgress:
    """What has come of a shard so far."""

    work: Work
    chunks: set[int] = field(default_factory=set)
    num_chunks: int | None = None
    num_rows: int = 0
    rejects: Counter[str] = field(default_factory=Counter)


class _ShardsInProgress:
    """From receipts to commits. Holds the shards that are begun, not those that are done."""

    def __init__(
        self, prepared: Prepared, plan: Plan, extraction: Extraction, lease: Lease, tally: Tally
    ) -> None:
        self._prepared, self._extraction, self._tally = prepared, extraction, tally
        self._lease = lease
        self._to_do = {work.stem: work for work in plan.work}
        self._begun: dict[str, _InProgress] = {}
        self._complete: dict[str, _InProgress] = {}

    def receive(self, receipt: dict[str, Any]) -> None:
        """Note a chunk; begin to assemble its shard where that was the last one missing."""
        stem = receipt["stem"]
        rejects = Counter(json.loads(receipt["rejects_by_reason"]))
        self._tally.note(receipt["num_rows"], rejects, json.loads(receipt["timings"]))
        if stem in self._to_do:
            self._begun[stem] = _InProgress(self._to_do.pop(stem))
        shard = self._begun.get(stem)
        if shard is None or receipt["chunk"] in shard.chunks:
            return  # a chunk of a failed shard, or one that was delivered before
        shard.chunks.add(receipt["chunk"])
        if receipt["error"]:
            name = safe_text(shard.work.shard.name)
            self._tally.failed_shards[name] = receipt["error"]
            logger.warning("shard %s is left out: %s", name, receipt["error"])
            del self._begun[stem]
            return
        shard.num_rows += receipt["num_rows"]
        shard.rejects += rejects
        shard.num_chunks = receipt["num_chunks"] or shard.num_chunks
        if shard.num_chunks == len(shard.chunks):
            self._complete[stem] = self._begun.pop(stem)
            self._extraction.assemble(shard.work)

    def commit(self, *, wait: bool) -> Iterator[None]:
        """Commit the shards whose files are in place by now, or all that are complete."""
        for assembled in self._extraction.assembled(wait=wait):
            if assembled is not None:
                self._commit(*assembled)
            yield

    def check_none_left(self) -> None:
        """Every planned shard was committed or has failed by name; else it is a bug of ours."""
        for stem, shard in [*self._begun.items(), *self._complete.items()]:
            raise RuntimeError(f"{stem}: {len(shard.chunks)} of {shard.num_chunks} chunks arrived")
        for stem in self._to_do:
            raise RuntimeError(f"{stem}: planned, and no chunk of it arrived")

    def _commit(self, work: Work, files: Files) -> None:
        embeddings, rejects, reasons = files
        shard = self._complete.pop(work.stem)
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
        self._tally.committed_shards += 1
        self._tally.committed_bytes += work.shard.size_bytes
        self._tally.images += shard.num_rows
        self._tally.rejects += shard.rejects
        logger.info(
            "committed %s: %d images, %d rejects", work.shard.name, embeddings.num_rows, num_rejects
        )
