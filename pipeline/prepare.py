"""What is settled before a run begins: input, checkpoint, fingerprint and columns; then its plan.

Enters: a Config. Leaves: a Prepared and a Plan, which `plan` prints and `run.py` carries out. What a user
can get wrong is told here, before Ray starts and before anything is written.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from cvt_model.checkpoint import Checkpoint, resolve_checkpoint
from cvt_model.choices import Precision, resolve_backend
from cvt_model.errors import CheckpointError
from pipeline import schema
from pipeline.commits import CommitLog
from pipeline.config import Config
from pipeline.errors import ConfigError, EmptyInputError, LimitError
from pipeline.fingerprint import Fingerprint, make_fingerprint, read_fingerprint, refuse_difference
from pipeline.manifest import Manifest
from pipeline.plan import Plan, Rules, plan_input
from pipeline.read_parquet import find_image_column, first_schema
from pipeline.read_webdataset import METADATA_EXTENSIONS
from pipeline.shards import Listing, list_input
from pipeline.storage import Storage, split_glob


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to begin."""

    config: Config
    output: Storage
    listing: Listing
    checkpoint: Checkpoint
    fingerprint: Fingerprint
    metadata: tuple[pa.Field, ...]
    manifest: Manifest | None

    def with_precision(self, precision: Precision) -> Prepared:
        """The same run in another precision."""
        return replace(self, fingerprint=replace(self.fingerprint, precision=precision))

    @property
    def embeddings_schema(self) -> pa.Schema:
        return schema.embeddings_schema(
            dim=self.checkpoint.config.embed_dim[-1],
            num_labels=self.checkpoint.num_labels,
            logits=self.config.output.logits,
            dtype=self.config.output.dtype,
            metadata=self.metadata,
        )


def find_checkpoint(config: Config) -> Checkpoint:
    """The checkpoint that the config names; ConfigError where it cannot be used."""
    path = Path(os.path.expanduser(config.model.checkpoint))  # noqa: PTH111 - as it is where no such user is
    source = config.model.checkpoint
    if path.is_dir():
        source = str(path.resolve())
    elif path.is_file():  # not resolved: the description lies beside the link, not beside its target
        source = str(path.absolute())
    try:
        checkpoint = resolve_checkpoint(source)
        processor = checkpoint.processor
    except CheckpointError as error:
        raise ConfigError(f"model.checkpoint: {error}") from error
    if processor.output_size is None:
        raise ConfigError(
            f"model.checkpoint: {config.model.checkpoint} does not resize images (do_resize: false), so "
            "they cannot be batched; set do_resize and size in its preprocessor_config.json"
        )
    if checkpoint.config.num_channels != 3:
        raise ConfigError(
            f"model.checkpoint: {config.model.checkpoint} takes {checkpoint.config.num_channels} "
            "channels; this pipeline reads RGB images, which have 3"
        )
    try:
        resolve_backend(config.model.backend, on_gpu=False)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error
    if config.model.embedding == "cls_token" and not checkpoint.config.cls_token[-1]:
        raise ConfigError("model.embedding: this model has no CLS token in its last stage; use pooled")
    return checkpoint


def prepare(
    config: Config, output: Storage, checkpoint: Checkpoint, default_precision: Precision
) -> Prepared:
    """List the input, settle the fingerprint. `default_precision`: what auto means for a new output."""
    existing = read_fingerprint(output)
    listing = _list(config, output, known=existing is not None)
    manifest = Manifest(listing, config.input.image_column) if listing.format == "manifest" else None
    metadata = _metadata_fields(config, listing, manifest, existing)
    precision = config.model.precision
    if precision == "auto":
        precision = existing.precision if existing else default_precision
    fingerprint = make_fingerprint(config, checkpoint, precision, metadata)
    return Prepared(config, output, listing, checkpoint, fingerprint, tuple(metadata), manifest)


def _list(config: Config, output: Storage, *, known: bool) -> Listing:
    """The input's listing. LimitError where it is empty, and its rows would all have to be removed."""
    Storage(split_glob(config.input.uri)[0], config.input_options).check_reachable()
    try:
        return list_input(config.input, output, config.input_options)
    except EmptyInputError as error:
        if config.input.on_deleted == "remove" and known and CommitLog(output).listed:
            raise LimitError(
                f"{error}; it has been read before: nothing is removed. Where all of it is meant to go, "
                "delete the output"
            ) from error
        raise


def make_plan(prepared: Prepared) -> tuple[Plan, CommitLog]:
    """Hold the listing against the commits as they are now; a run does so under its lease."""
    log, digest = CommitLog(prepared.output), prepared.fingerprint.digest
    rules = Rules.of(prepared.config, time.time())
    plan = plan_input(prepared.listing, prepared.manifest, prepared.metadata, log, digest, rules)
    return plan, log


def _metadata_fields(
    config: Config, listing: Listing, manifest: Manifest | None, existing: Fingerprint | None
) -> list[pa.Field]:
    """The metadata columns with their types; on an existing output `all` means that output's."""
    wanted = config.input.metadata_columns
    available = _available(config, listing, manifest)
    if not wanted:
        return []
    if wanted == "all" and existing is not None:
        wanted = tuple(name for name, _ in existing.columns["metadata"])
    if listing.format == "images":
        if wanted == "all":
            return []
        raise ConfigError("input.metadata_columns: loose images have none; use a manifest")
    names = tuple(available) if wanted == "all" else tuple(dict.fromkeys(wanted))
    taken = [name for name in names if name in schema.reserved_names()]
    if taken:
        raise ConfigError(
            f"input.metadata_columns: {', '.join(taken)} would collide with the output's own column; "
            "rename it in the input, or list the columns to carry without it"
        )
    missing = [name for name in names if name not in available]
    if missing and listing.format != "webdataset":
        raise ConfigError(
            f"input.metadata_columns: no column {', '.join(missing)} in {config.input.uri}; "
            f"it has {', '.join(available) or 'none'}"
        )
    return [available.get(name, pa.field(name, pa.string())) for name in names]


def _available(config: Config, listing: Listing, manifest: Manifest | None) -> dict[str, pa.Field]:
    """The metadata columns that the input offers, by name; nullable, since a value may be missing."""
    if manifest is not None:
        columns = list(manifest.metadata_schema)
    elif listing.format == "parquet":
        columns = _parquet_columns(config, listing)
    elif listing.format == "images":
        columns = []
    else:
        columns = [pa.field(name, pa.string()) for name in METADATA_EXTENSIONS]
    return {column.name: pa.field(column.name, column.type) for column in columns}


def _parquet_columns(config: Config, listing: Listing) -> list[pa.Field]:
    """The columns of the first file that has a readable footer, without the image and the id."""
    first = first_schema(listing)
    if first is None:
        return []  # told as failed shards, by name, when they are read
    path, found = first
    image = find_image_column(found, path, config.input.image_column)
    id_column = config.input.id_column
    if id_column and id_column not in found.names:
        columns = ", ".join(found.names)
        raise ConfigError(f"input.id_column: {path} has no column {id_column}; it has {columns}")
    return [column for column in found if column.name not in (image, id_column)]


def summarize_plan(config: Config) -> dict[str, int | str | None]:
    """What `plan` prints. Images are known of loose images and manifests, not of unread archives.

    Bytes to write are estimated from the bytes a row of embeddings and logits takes.
    """
    output = Storage(config.output.uri, config.output_options)
    prepared = prepare(config, output, find_checkpoint(config), "float32")
    claimed = read_fingerprint(output)
    if claimed is not None:
        refuse_difference(output, claimed, prepared.fingerprint)
    plan, _ = make_plan(prepared)
    grouped = prepared.listing.format in ("images", "manifest")
    images = sum(len(w.shard.members) - len(w.carried) for w in plan.work) if grouped else None
    row_bytes = sum(
        field.type.list_size * field.type.value_type.bit_width // 8
        for field in prepared.embeddings_schema
        if pa.types.is_fixed_size_list(field.type)
    )
    return {
        "shards_new": plan.num_new,
        "shards_changed": plan.num_changed,
        "shards_deleted": plan.num_deleted,
        "shards_removed": len(plan.removed),
        "shards_done": plan.num_done,
        "shards_ignored": len(plan.ignored),
        "files_too_young": plan.num_young,
        "images_to_read": images,
        "bytes_to_read": plan.size_bytes if prepared.manifest is None else None,
        "bytes_to_write": None if images is None else images * row_bytes,
        "refusal": plan.refusal or None,
    }
