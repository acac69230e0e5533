"""`finetune`: from a configuration to a checkpoint that extract loads.

Lists and prepares the labelled images, trains, and writes what came of it. A kill at any moment costs the
seconds since the last state; the same command goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cvt_model.choices import Precision, resolve_precision
from pipeline.errors import ConfigError
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.metrics import read_metrics
from pipeline.finetune.network import LAST, Start, check_apart, find_start
from pipeline.finetune.sample_set import open_samples
from pipeline.finetune.samples import FOLDER as SAMPLES
from pipeline.finetune.sources import Found, LabelledShards, list_sources, prepare, stems_of
from pipeline.finetune.state import FOLDER as CHECKPOINTS
from pipeline.finetune.state import check_state
from pipeline.lease import acquire
from pipeline.local_cache import PARTIAL
from pipeline.stop import Stop
from pipeline.storage import STAGING, Storage, unique_name

if TYPE_CHECKING:
    from pipeline.cluster import Cluster
    from pipeline.finetune.fit import Placement
    from pipeline.finetune.training import Job

logger = logging.getLogger(__name__)

OnProgress = Callable[[dict[str, Any]], None]
"""Told what goes on: `phase` (preparing or training) and its figures."""


@dataclass(frozen=True)
class Trained:
    """What came of a training."""

    output: str
    metrics: dict[str, Any]

    @property
    def failed_shards(self) -> list[str]:
        """Shards that were left out: names and reasons."""
        failed: list[str] = self.metrics["failed_shards"]
        return failed


def finetune(
    config: FinetuneConfig, *, stop: Stop, on_progress: OnProgress, verbose: bool = False
) -> Trained:
    """Train, or go on with a training, to its end.

    Raises PipelineError for everything that a user can mend, Interrupted where a signal came first.
    """
    output = Storage(config.output.uri, config.options_of(config.output))
    start = find_start(config.model)
    check_apart(start, output)
    output.check_reachable()
    sources = list_sources(config, start.processor, output)
    output.check_writable()
    stop.check()
    asked = _digest(_asked(config, start, sources))
    lease = acquire(output, unique_name(), config.run.lease_s)
    cluster = None
    try:
        lease.keep()
        _tidy(output)
        if (finished := read_metrics(output)) is not None and finished["asked"] == asked:
            output.delete_folder(SAMPLES)  # where a run was killed after its last file
            logger.info("this training is finished; for another one choose another output")
            return Trained(config.output.uri, finished)
        check_state(output, _digest(_recipe(config, start)))
        from pipeline.cluster import Cluster  # Ray, which takes seconds to start

        cluster = Cluster(verbose=verbose)
        stop.install()

        def prepared(number: int, total: int) -> None:
            stop.check()
            lease.still_held()
            on_progress({"phase": "preparing", "shards": number, "total_shards": total})

        placement = place_workers(config, cluster)
        check_batch(config, placement.num_workers)
        precision = choose_precision(config, on_gpu=placement.on_gpu)
        found = prepare(sources, output, cluster.tasks(cluster.cores, "preparing images"), config, prepared)
        job = make_job(config, start, sources, found, output, precision)
        check_state(output, job.recipe, job.digest)

        def told(values: dict[str, Any]) -> None:
            lease.still_held()
            if values:
                on_progress({"phase": "training", **values})

        from pipeline.finetune.fit import fit

        fit(job, placement, stop, told)
        lease.check()
        from pipeline.finetune.results import write_results

        metrics = write_results(job, found, asked)
        output.delete_folder(SAMPLES)
        return Trained(config.output.uri, metrics)
    finally:
        if cluster:
            cluster.close()
        lease.release()


def _tidy(output: Storage) -> None:
    """Delete what killed runs left of files that they were writing; the caller holds the lease."""
    output.delete_folder(STAGING)
    written = ("", CHECKPOINTS, LAST, SAMPLES)
    for file in output.find() if output.is_local else ():  # elsewhere a file appears as it is sent
        folder, _, name = file.path.rpartition("/")
        if folder in written and name.startswith(PARTIAL):
            output.delete(file.path)


def place_workers(config: FinetuneConfig, cluster: Cluster) -> Placement:
    """Workers by GPU where there are any, else one, with all cores of its machine."""
    from pipeline.finetune.fit import Placement

    gpus, cores = cluster.num_gpus, cluster.cores
    asked, workers = config.compute.worker_gpus, config.compute.workers
    on_gpu = bool(gpus) if asked == "auto" else bool(asked)
    if on_gpu and not gpus:
        raise ConfigError("compute.worker_gpus: the cluster has no GPU; leave it out, or set it to 0")
    if workers == "auto":
        workers = int(gpus) if on_gpu else 1
    if on_gpu and workers > gpus:
        raise ConfigError(f"compute.workers: {workers} workers need a GPU each; the cluster has {gpus:g}")
    each = max(1, cores // workers)
    return Placement(workers, on_gpu, each, each)


def check_batch(config: FinetuneConfig, num_workers: int) -> None:
    """Every worker and every part of a batch has as many images, and pairs where they are mixed."""
    augment, parts = config.augment, num_workers * config.train.accumulate
    pair = 2 if augment.mix_probability and (augment.mixup or augment.cutmix) else 1
    if config.train.batch_size % (parts * pair):
        raise ConfigError(
            f"train.batch_size: {config.train.batch_size} is not a multiple of {parts * pair}: "
            f"{num_workers} workers, train.accumulate {config.train.accumulate}"
            f"{', and pairs of images that mixup and cutmix mix' if pair == 2 else ''}"
        )


def choose_precision(config: FinetuneConfig, *, on_gpu: bool) -> Precision:
    """What the products are computed in. Raises ConfigError for what the device does not train in."""
    precision = resolve_precision(config.model.precision, on_gpu=on_gpu)
    if precision == "float16" and not on_gpu:
        raise ConfigError("model.precision: float16 trains on GPUs only; choose float32 or bfloat16")
    return precision


def make_job(
    config: FinetuneConfig,
    start: Start,
    sources: list[LabelledShards],
    found: Found,
    output: Storage,
    precision: Precision,
) -> Job:
    """The training of what was found, its images prepared."""
    from pipeline.finetune.training import Job

    classes = start.classes(found.classes)
    if config.train.interpolate and not start.has_head_of(classes):
        raise ConfigError(
            f"train.interpolate: {config.model.checkpoint} does not classify into the {len(classes)} "
            "classes of the images, so its weights cannot be mixed with the trained ones; leave it out"
        )
    samples = open_samples(output, stems_of(sources, found), classes)
    train, validation = samples["train"], samples["validation"]
    images = train.digest, validation.digest
    recipe = _recipe(config, start)
    digest = _digest([images, classes, *recipe, precision])
    return Job(config, start, classes, train, validation, output, precision, digest, _digest(recipe))


def _asked(config: FinetuneConfig, start: Start, sources: list[LabelledShards]) -> list[Any]:
    """What is known of a training before anything is read: enough to tell that it was done before."""
    stems = [work.stem for source in sources for work in source.work]
    after = [config.train.interpolate] if config.train.interpolate else []
    return [stems, *_recipe(config, start), config.model.precision, *after]


def _recipe(config: FinetuneConfig, start: Start) -> list[Any]:
    """What settles the steps of a training."""
    return [
        start.identity,
        start.processor.to_dict(),
        # Without defaults, so that a key that is new in this program orphans no training.
        config.train.model_dump(mode="json", exclude_defaults=True, exclude={"interpolate"}),
        config.augment.model_dump(mode="json", exclude_defaults=True),
    ]


def _digest(identity: list[Any]) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
