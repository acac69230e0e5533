"""What made an output: everything that changes results, and nothing else.

Weights, model config, preprocessing, resolved precision and output columns are in; batch and pool sizes,
hardware and the place where the checkpoint was found are not. It is written to `fingerprint.json` once,
and every later run and search is held against it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cvt_model.checkpoint import Checkpoint
from cvt_model.choices import EmbeddingKind, Precision
from cvt_model.image_processor import CvtImageProcessor
from pipeline.config import Config
from pipeline.errors import FingerprintError, OutputError
from pipeline.storage import Storage

FILE = "fingerprint.json"


@dataclass(frozen=True)
class Fingerprint:
    """The parts that change results; `source` says where the checkpoint was, and is not one of them."""

    source: str
    weights_sha256: str
    model_config: dict[str, Any]
    preprocessing: dict[str, Any]
    precision: Precision
    embedding: EmbeddingKind
    columns: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 over every part but the source, in hexadecimal."""
        parts = dataclasses.asdict(self)
        del parts["source"]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def fast_decode(self) -> bool:
        """Whether its images were decoded fast."""
        return self.preprocessing.get("decode") == "fast"

    def to_json(self) -> dict[str, Any]:
        """As `fingerprint.json` holds it."""
        return {"digest": self.digest, **dataclasses.asdict(self)}

    def differences(self, other: Fingerprint) -> list[str]:
        """One line for every part in which `other` is not `self`, innermost key first."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        del mine["source"], theirs["source"]
        return list(_differences("", mine, theirs))


def make_fingerprint(
    config: Config, checkpoint: Checkpoint, precision: Precision, metadata: list[pa.Field]
) -> Fingerprint:
    """The fingerprint of a run of `config` with this checkpoint, precision and metadata columns."""
    return Fingerprint(
        source=checkpoint.source,
        weights_sha256=checkpoint.weights_sha256,
        model_config=checkpoint.config.to_dict(),
        preprocessing=preprocessing_of(checkpoint.processor, fast=config.input.decode == "fast"),
        precision=precision,
        embedding=config.model.embedding,
        columns={
            "logits": config.output.logits,
            "dtype": config.output.dtype,
            "image_column": config.input.image_column,
            "id_column": config.input.id_column,
            "metadata": [[field.name, str(field.type)] for field in metadata],
        },
    )


def preprocessing_of(processor: CvtImageProcessor, *, fast: bool) -> dict[str, Any]:
    """What an image goes through before the model; exact decoding, the rule, is not mentioned."""
    return {**processor.to_dict(), **({"decode": "fast"} if fast else {})}


def read_fingerprint(output: Storage) -> Fingerprint | None:
    """The fingerprint of an existing output, or None where there is none yet."""
    if not output.exists(FILE):
        return None
    try:
        values = json.loads(output.read_bytes(FILE))
        names = {field.name for field in dataclasses.fields(Fingerprint)}
        return Fingerprint(**{name: values[name] for name in names})
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{output.url(FILE)}: not a fingerprint of this program ({error!r}); "
            "restore the file, or choose another output.uri"
        ) from error


def require_fingerprint(output: Storage) -> Fingerprint:
    """The fingerprint of an output; OutputError where the place is none."""
    fingerprint = read_fingerprint(output)
    if fingerprint is None:
        raise OutputError(f"{output.uri} is not an output of extract: it has no {FILE}")
    return fingerprint


def claim(output: Storage, wanted: Fingerprint) -> None:
    """Make `wanted` the output's fingerprint, or raise FingerprintError where it has another."""
    existing = read_fingerprint(output)
    if existing is None:
        try:
            output.create(FILE, json.dumps(wanted.to_json(), indent=1).encode())
        except FileExistsError:
            existing = read_fingerprint(output)
    if existing is not None:
        refuse_difference(output, existing, wanted)


def refuse_difference(output: Storage, existing: Fingerprint, wanted: Fingerprint) -> None:
    """Raise FingerprintError, naming what differs, unless `wanted` is what made the output."""
    if existing.digest != wanted.digest:
        lines = "\n".join(f"  {line}" for line in existing.differences(wanted))
        raise FingerprintError(
            f"output.uri: {output.uri} holds results made otherwise:\n{lines}\n"
            "results of two kinds are never mixed: write beside it with --into NEW, or go back to its "
            "settings"
        )


def _differences(path: str, mine: Any, theirs: Any) -> list[str]:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        lines: list[str] = []
        for key in sorted(mine.keys() | theirs.keys(), key=str):
            lines += _differences(f"{path}.{key}" if path else str(key), mine.get(key), theirs.get(key))
        return lines
    return [] if mine == theirs else [f"{path}: the output has {_short(mine)}, now {_short(theirs)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
