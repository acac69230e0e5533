"""The main job: from a config to committed shards.

Prepares, carries out the plan, commits each shard when all of it is there, and tells what happened. A
kill at any moment costs the shards in progress, never a committed one. Knows Ray only through `run.py`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.commits import CommitLog, clean, remove_commits
from pipeline.config import Config
from pipeline.errors import Interrupted, LimitError, StorageError, WorkersDiedError
from pipeline.fingerprint import claim, read_fingerprint
from pipeline.lease import Lease, acquire
from pipeline.ledger import Ledger
from pipeline.plan import Plan
from pipeline.prepare import Prepared, find_checkpoint, make_plan, prepare
from pipeline.progress import write_progress
from pipeline.report import write_report
from pipeline.shards import Work
from pipeline.stop import Stop
from pipeline.storage import STAGING, Storage, unique_name
from pipeline.tally import Tally

if TYPE_CHECKING:
    from pipeline.cluster import Cluster
    from pipeline.run import Extraction

LIMIT_FROM_SAMPLES = 1000
TELL_EVERY_S = 5.0  # `status` reads what is told
MAX_CULPRITS = 10  # single shards in a row that end their workers: then it is not the shards

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
    output.check_reachable()
    listing_began = time.time()
    prepared = prepare(config, output, checkpoint, "float32")
    output.check_writable()
    stop.check()
    listed = time.time()
    cluster = None
    if config.model.precision == "auto" and read_fingerprint(output) is None:
        cluster = _connect(stop, verbose)
        if cluster.has_gpu:
            prepared = prepared.with_precision("bfloat16")
    claim(output, prepared.fingerprint)
    tally = Tally(unique_name(), config.output.uri, prepared.fingerprint.digest, started=started)
    tally.lease_s = config.run.lease_s
    lease = acquire(output, tally.run, config.run.lease_s)
    try:
        lease.keep()
        planning_began = time.time()
        plan, log = make_plan(prepared)
        tally.list_s = listed - listing_began + time.time() - planning_began
        _tidy(output, plan, log, lease)
        _tell(tally, plan)
        stop.check()
        if plan.work:
            cluster = cluster or _connect(stop, verbose)
            extraction = _graph(prepared, cluster, tally.run, verbose)
            tally.stage_slots = extraction.resources.slots
            _Run(prepared, extraction, lease, tally, stop, on_progress).carry_out(plan)
        lease.check()
        output.delete_folder(STAGING)  # a killed run's workers may have written after `clean`
        if plan.refusal:
            raise LimitError(plan.refusal)
    except Interrupted as reason:
        stop.signum = reason.signum  # Ray may have caught it before us
        tally.stopped = str(reason)
    except LimitError as reason:
        tally.stopped = str(reason)
    finally:
        if cluster:
            cluster.close()
        _leave(output, tally.run, lease)
    tally.ended = time.time()
    write_report(output, tally, config)
    return tally


def _connect(stop: Stop, verbose: bool) -> Cluster:
    # Imported where there is work: many runs have none, and Ray and its Data take a second each.
    from pipeline.cluster import Cluster

    threading.Thread(target=_import_graph, name="import").start()
    cluster = Cluster(verbose=verbose)
    stop.install()
    return cluster


def _import_graph() -> type[Extraction]:
    from pipeline.run import Extraction

    return Extraction


def _graph(prepared: Prepared, cluster: Cluster, run: str, verbose: bool) -> Extraction:
    for place in (prepared.listing.root, prepared.output):
        if place.is_local and len(cluster.hosts) > 1:
            logger.warning(
                "%s is a folder of this machine, and the cluster has %d: each of them must have the same "
                "folder mounted there",
                place.uri,
                len(cluster.hosts),
            )
    size = prepared.checkpoint.processor.output_size
    assert size is not None, "the checkpoint was looked at for it"
    resources = cluster.resources(prepared.config.compute, size)
    return _import_graph()(prepared, run, resources, verbose=verbose)


def _tidy(output: Storage, plan: Plan, log: CommitLog, lease: Lease) -> None:
    """Take out what is to be removed, and what killed runs left."""
    lease.check()
    remove_commits(output, plan.removed)
    clean(output, log, removed=plan.removed)


def _leave(output: Storage, run: str, lease: Lease) -> None:
    """Take this run's unfinished parts along; where that fails, what ends the run is told all the same."""
    try:
        output.delete_folder(f"{STAGING}/{run}")
    except StorageError as error:
        logger.warning("%s; the next run deletes what is left", error)
    finally:
        lease.release()


def _tell(tally: Tally, plan: Plan) -> None:
    tally.planned_shards, tally.done_before = len(plan.work), plan.num_done
    tally.planned_bytes = plan.size_bytes
    tally.removed_shards = len(plan.removed)
    tally.waiting_files, tally.ignored_shards = plan.num_young, plan.ignored
    if plan.num_deleted and not plan.removed:
        logger.info(
            "%d committed shards or images are gone from the input; their rows stay", plan.num_deleted
        )
    if plan.refusal:
        logger.warning("%s", plan.refusal)


class _Run:
    """A plan on its way through the cluster, wave by wave."""

    def __init__(
        self,
        prepared: Prepared,
        extraction: Extraction,
        lease: Lease,
        tally: Tally,
        stop: Stop,
        on_progress: OnProgress,
    ) -> None:
        self._config, self._lease, self._tally, self._stop = prepared.config, lease, tally, stop
        self._on_progress, self._output, self._told = on_progress, prepared.output, -TELL_EVERY_S
        self._extraction = extraction
        self._ledger = Ledger(prepared, self._extraction, lease, tally)
        self._culprits = 0

    def carry_out(self, plan: Plan) -> None:
        try:
            for wave in self._extraction.waves(plan.work):
                self._run(wave)
            for _ in self._ledger.commit(wait=True):
                self._look_around()
        finally:
            self._ledger.close()
        self._ledger.check_none_left()
        _check_limit(self._config, self._tally, 1)

    def _run(self, wave: list[Work]) -> None:
        """Carry out a wave; where its workers die again and again, find the shard that ends them.

        Ray names no input when it gives up, so the wave is halved until one shard is left, which is then
        left out by name.
        """
        self._ledger.begin(wave)
        died = self._pull(wave)
        rest = self._ledger.unsettled(wave)
        if len(rest) < len(wave):
            self._culprits = 0  # others come through: it is the shards
        if died is None:
            if rest:
                raise RuntimeError(f"{rest[0].stem}: not all of its chunks arrived")
        elif len(rest) > 1:
            logger.warning("%s; going on with %d shards in halves", died.short, len(rest))
            middle = len(rest) // 2
            self._run(rest[:middle])
            self._run(rest[middle:])
        elif rest:
            self._culprits += 1
            if self._culprits == MAX_CULPRITS:
                raise died
            self._ledger.fail(rest[0], died.short)

    def _pull(self, wave: list[Work]) -> WorkersDiedError | None:
        """Take a wave's receipts to their end, or to the death of its workers, which is returned."""
        with contextlib.closing(self._extraction.receipts(wave)) as receipts:
            while True:
                try:
                    receipt = next(receipts)
                except StopIteration:
                    return None
                except WorkersDiedError as error:
                    return error
                if receipt is not None:
                    self._ledger.receive(receipt)
                    _check_limit(self._config, self._tally, LIMIT_FROM_SAMPLES)
                for _ in self._ledger.commit(wait=False):
                    pass
                self._look_around()

    def _look_around(self) -> None:
        self._stop.check()
        self._lease.still_held()
        self._on_progress(self._tally)
        if time.monotonic() - self._told > TELL_EVERY_S:
            self._told = time.monotonic()
            write_progress(self._output, self._tally)


def _check_limit(config: Config, tally: Tally, from_samples: int) -> None:
    limit, samples, rejected = config.limits.max_reject_fraction, tally.num_seen, tally.rejects_seen
    if samples >= from_samples and rejected.total() > limit * samples:
        most = ", ".join(f"{reason} {count:,}" for reason, count in rejected.most_common(3))
        raise LimitError(
            f"{rejected.total():,} of {samples:,} samples were rejected ({most}), more than "
            f"limits.max_reject_fraction = {limit} allows; look into {tally.output}/rejects, or raise it"
        )
