"""The labelled sources of a training, listed and prepared: what `finetune` trains on and judges by.

Enters: the configuration. Leaves: sample sets with their classes. What a user can get wrong about the input
is told before Ray starts.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from cvt_model.image_processor import CvtImageProcessor
from pipeline.commits import CommitLog
from pipeline.decoder import DecodeOptions
from pipeline.errors import InputError, LimitError
from pipeline.finetune.config import FinetuneConfig, LabelledSource, ValidationConfig
from pipeline.finetune.labels import find_rule
from pipeline.finetune.samples import (
    FOLDER,
    PARTS,
    Part,
    Preparation,
    index_path,
    is_prepared,
    prepare_shard,
    read_index,
)
from pipeline.index.tasks import Runner
from pipeline.manifest import Manifest
from pipeline.plan import Rules, plan_input
from pipeline.quality import class_order
from pipeline.samples import ReadOptions
from pipeline.shards import Work, list_input
from pipeline.storage import Storage, split_glob

CHUNK_IMAGES = 256
MOST_NAMED = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledShards:
    """A source's shards, and how they are prepared."""

    work: tuple[Work, ...]
    preparation: Preparation
    manifest: Manifest | None


@dataclass
class Found:
    """What the preparation of all sources came to."""

    classes: list[str]
    rejects: Counter[str] = field(default_factory=Counter)
    failed_shards: dict[str, str] = field(default_factory=dict)  # by stem: name and reason


def list_sources(
    config: FinetuneConfig, processor: CvtImageProcessor, output: Storage
) -> list[LabelledShards]:
    """The input, and where it is given the validation's own source. Raises InputError and ConfigError."""
    validation = config.validation
    fraction = 0.0 if validation.uri else validation.fraction
    sources = [_list(config, config.input, "input", fraction, processor, output)]
    if validation.uri:
        sources.append(_list(config, validation, "validation", 1.0, processor, output))
    return sources


def _list(
    config: FinetuneConfig,
    source: LabelledSource | ValidationConfig,
    section: str,
    fraction: float,
    processor: CvtImageProcessor,
    output: Storage,
) -> LabelledShards:
    options = config.options_of(source)
    Storage(split_glob(source.uri)[0], options).check_reachable()
    listing = list_input(source, output, options)
    manifest = Manifest(listing, source.image_column) if listing.format == "manifest" else None
    rule = find_rule(listing, source.label_column, manifest, section)
    limits = config.limits
    read = ReadOptions(
        chunk_images=CHUNK_IMAGES,
        max_image_bytes=limits.max_image_bytes,
        metadata=rule.metadata,
        image_column=source.image_column,
        id_column=source.id_column,
        storage_options=listing.root.options,
    )
    decode = DecodeOptions(limits.max_pixels, limits.image_timeout_s)
    preparation = Preparation(rule, processor, read, decode, fraction)
    rules = Rules(time.time(), ignore=source.ignore_shards, group_size=config.compute.shard_images)
    plan = plan_input(listing, manifest, rule.metadata, CommitLog(output), preparation.digest, rules)
    return LabelledShards(plan.work, preparation, manifest)


def prepare(
    sources: list[LabelledShards],
    output: Storage,
    run: Runner,
    config: FinetuneConfig,
    look_around: Callable[[int, int], None],
) -> Found:
    """Prepare what is not yet; `look_around` is called after each shard, with how many of them are done.

    Raises LimitError for too many rejects, InputError where nothing is left to learn from.
    """
    there = {file.path for file in output.find(FOLDER)}
    todo = [
        (source, work)
        for source in sources
        for work in source.work
        if index_path(work.stem) not in there or not is_prepared(output, work.stem, source.preparation)
    ]
    total = sum(len(source.work) for source in sources)
    failed: dict[str, str] = {}
    jobs = ((_attached(source, work), source.preparation, output) for source, work in todo)
    look_around(total - len(todo), total)
    for number, ((_, work), error) in enumerate(zip(todo, run(prepare_shard, jobs), strict=True), 1):
        if error is not None:
            logger.warning("%s is left out: %s", work.shard.name, error)
            failed[work.stem] = f"{work.shard.name}: {error}"
        look_around(total - len(todo) + number, total)
    return _sum_up(sources, output, failed, config.limits.max_reject_fraction)


def _attached(source: LabelledShards, work: Work) -> Work:
    manifest = source.manifest
    return manifest.attach(work, list(source.preparation.rule.metadata)) if manifest else work


def _sum_up(
    sources: list[LabelledShards], output: Storage, failed: dict[str, str], most_rejects: float
) -> Found:
    counts = {part: Counter[str]() for part in PARTS}
    rejects, examples = Counter[str](), list[str]()
    for source in sources:
        for work in source.work:
            if work.stem in failed:
                continue
            table, facts = read_index(output, work.stem)
            rejects.update(facts.rejects)
            examples += facts.examples[: MOST_NAMED - len(examples)]
            for row in table.group_by(["label", "part"]).aggregate([([], "count_all")]).to_pylist():
                if row["label"] is not None:
                    counts[row["part"]][row["label"]] += row["count_all"]
    seen = sum(map(Counter.total, counts.values())) + rejects.total()
    if rejects:
        most = ", ".join(f"{count:,} {reason}" for reason, count in rejects.most_common())
        logger.warning(
            "%d of %d images are left out: %s (%s)", rejects.total(), seen, most, "; ".join(examples)
        )
    if rejects.total() > most_rejects * seen:
        raise LimitError(
            f"{rejects.total():,} of {seen:,} images cannot be used ({'; '.join(examples)}), more than "
            f"limits.max_reject_fraction = {most_rejects} allows"
        )
    _check(counts, failed)
    return Found(_ordered(set(counts["train"]), sources[0].preparation.rule.names), rejects, failed)


def _ordered(labels: set[str], names: tuple[str, ...]) -> list[str]:
    """Classes as the input numbers them, where it does, so that its numbers are the classifier's ids."""
    return [name for name in names if name in labels] if labels <= set(names) else class_order(labels)


def _check(counts: dict[Part, Counter[str]], failed: dict[str, str]) -> None:
    train, validation = counts["train"], counts["validation"]
    if failed and not (train and validation):
        told = "; ".join(list(failed.values())[:MOST_NAMED])
        lack = "judge by" if train else "learn from"
        raise InputError(
            f"input: no image is left to {lack}; shards that cannot be read: {len(failed)} ({told})"
        )
    if not train:
        raise InputError("input: no image has a label; see input.label_column")
    if len(train) < 2:
        raise InputError(
            f"input: all {train.total():,} images have the label {next(iter(train))}; two are needed"
        )
    if not validation:
        raise InputError(
            "validation: no image is held out to judge by; raise validation.fraction, or give "
            "validation.uri"
        )
    unknown = sorted(set(validation) - set(train))
    if unknown:
        named = ", ".join(unknown[:MOST_NAMED])
        logger.warning(
            "%d validation images are left out, whose classes have no training image: %s",
            sum(validation[label] for label in unknown),
            named,
        )
        if not set(validation) & set(train):
            raise InputError(f"validation: its classes ({named}) have no training images")


def stems_of(sources: list[LabelledShards], found: Found) -> list[str]:
    """The shards that were prepared, in their order."""
    return [work.stem for source in sources for work in source.work if work.stem not in found.failed_shards]
