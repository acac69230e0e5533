"""The labelled images of a training, prepared so that each of them can be had at any time.

Enters: a shard of a labelled source. Leaves: a file of encoded training images, a file of validation pixels
and, written last, an index of both: `samples/<stem>.parquet`. Every image was decoded once, in a process
that may die of it; what comes through can be decoded again without one. Knows no network.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from cvt_model.image_processor import CvtImageProcessor
from pipeline import schema
from pipeline.decode import decode_chunk
from pipeline.decoder import DecodeOptions
from pipeline.errors import ShardError
from pipeline.finetune.labels import LabelRule
from pipeline.index.files import FileRef
from pipeline.readers import read_shard
from pipeline.samples import ReadOptions
from pipeline.shards import Work
from pipeline.storage import Storage

FOLDER = "samples"
MOST_EXAMPLES = 5
Part = Literal["train", "validation"]
PARTS: tuple[Part, ...] = ("train", "validation")
_FACTS = b"cvt-pipeline"
_DATA = pa.schema([pa.field("data", pa.large_binary(), nullable=False)])
_INDEX = pa.schema(
    [
        pa.field(schema.IMAGE_ID, pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("part", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Preparation:
    """How a source's shards become samples; all that settles what is written, and the means."""

    rule: LabelRule
    processor: CvtImageProcessor
    read: ReadOptions
    decode: DecodeOptions
    validation_fraction: float  # 0: all for training; 1: all for validation

    @property
    def digest(self) -> str:
        """Stands in the files' names, so that another preparation's are not taken for ours."""
        parts = (
            self.rule,
            self.processor.to_dict(),
            self.read.image_column,
            self.read.id_column,
            self.validation_fraction,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def limits(self) -> dict[str, float]:
        """What an image may cost, by the reason for which one that costs more is left out."""
        return {
            "too_many_pixels": self.decode.max_pixels,
            "too_large": self.read.max_image_bytes,
            "timeout": self.decode.image_timeout_s,
        }


@dataclass
class ShardFacts:
    """What came of a shard: its files by part, and what was left out."""

    files: dict[str, FileRef] = field(default_factory=dict)
    rejects: dict[str, int] = field(default_factory=dict)  # by reason
    examples: list[str] = field(default_factory=list)
    limits: dict[str, float] = field(default_factory=dict)  # by reason; an earlier version's are not known

    @classmethod
    def from_json(cls, text: bytes) -> ShardFacts:
        values = json.loads(text)
        files = {part: FileRef(**file) for part, file in values["files"].items()}
        return cls(files, values["rejects"], values["examples"], values.get("limits", {}))

    def hold_under(self, limits: dict[str, float]) -> bool:
        """Whether these limits leave out the same: none is lower, none that left images out is higher."""
        lower = any(limit < self.limits.get(reason, limit) for reason, limit in limits.items())
        changed = {reason for reason, limit in limits.items() if self.limits.get(reason) != limit}
        return not lower and changed.isdisjoint(self.rejects)


def index_path(stem: str) -> str:
    """A shard's index, whose presence tells that the shard is prepared."""
    return f"{FOLDER}/{stem}.parquet"


def prepare_shard(work: Work, preparation: Preparation, output: Storage) -> str | None:
    """Write a shard's samples, its index last; returns why the shard is not readable, where it is not.

    An earlier index goes first, so that none ever stands for files that are written anew.
    """
    output.delete(index_path(work.stem))
    try:
        with ExitStack() as stack:
            writer = _ShardWriter(work.stem, preparation, output, stack)
            for chunk in read_shard(work, preparation.read):
                (error,) = chunk.column("error").to_pylist()
                if error is not None:
                    raise ShardError(error)
                writer.add(chunk)
            index = writer.close()
    except ShardError as error:
        return str(error)
    with output.replacing(index_path(work.stem)) as local:
        pq.write_table(index, local)
    return None


def read_index(output: Storage, stem: str) -> tuple[pa.Table, ShardFacts]:
    """A prepared shard's rows (image_id, label, part) in order, and what came of it."""
    with output.open(index_path(stem)) as file:
        table = pq.read_table(file)
    return table, ShardFacts.from_json(table.schema.metadata[_FACTS])


def is_prepared(output: Storage, stem: str, preparation: Preparation) -> bool:
    """Whether a shard that has an index would come to the same under the limits of now."""
    with output.open(index_path(stem)) as file:
        facts = ShardFacts.from_json(pq.read_schema(file).metadata[_FACTS])
    return facts.hold_under(preparation.limits)


class _ShardWriter:
    """Takes a shard's chunks, writes their images, and gathers ids and labels until its end.

    The files appear when the stack that it was given ends, or not at all.
    """

    def __init__(self, stem: str, preparation: Preparation, output: Storage, stack: ExitStack) -> None:
        self._stem, self._preparation = stem, preparation
        self._output, self._stack = output, stack
        self._files: dict[Part, tuple[str, Path, Any]] = {}
        self._facts = ShardFacts(limits=preparation.limits)
        self._ids: list[str] = []
        self._labels: list[str | None] = []
        self._parts: list[Part] = []
        self._places: dict[str, int] = {}  # by key

    def add(self, chunk: pa.Table) -> None:
        """Decode a CHUNK's images, and write those that can be: encoded, or their pixels."""
        samples = _unpacked(chunk, "rows")
        decoded = decode_chunk(chunk, self._preparation.processor, self._preparation.decode)
        for row in _unpacked(decoded, "rejects").to_pylist():
            self._reject(row["reason"], row[schema.IMAGE_ID], row["message"])
        if samples.num_rows:
            self._write(samples, _unpacked(decoded, "rows"))
        self._amend(chunk)

    def close(self) -> pa.Table:
        """End the files; the shard's index, in their order."""
        for part, (path, local, writer) in self._files.items():
            writer.close()
            self._facts.files[part] = FileRef.of(path, local)
        for image_id, label in zip(self._ids, self._labels, strict=True):
            if label is None:
                self._reject("no_label", image_id, "it has no label")
        index = pa.table([self._ids, self._labels, self._parts], _INDEX)
        return index.replace_schema_metadata({_FACTS: json.dumps(asdict(self._facts)).encode()})

    def _write(self, samples: pa.Table, pixels: pa.Table) -> None:
        ids, keys = (pixels.column(name).to_pylist() for name in (schema.IMAGE_ID, schema.KEY))
        whole = set(ids)
        readable = [name in whole for name in samples.column(schema.IMAGE_ID).to_pylist()]
        data: dict[Part, pa.ChunkedArray] = {
            "train": samples.column("data").filter(pa.array(readable)),
            "validation": pixels.column("pixels"),
        }
        fraction = self._preparation.validation_fraction
        parts = [_part_of(image_id, fraction) for image_id in ids]
        for part in PARTS:
            chosen = pa.array([it == part for it in parts], pa.bool_())
            if chosen.true_count:
                self._file(part).write_table(pa.table([data[part].filter(chosen)], _DATA))
        for number, row in enumerate(pixels.drop_columns(["pixels"]).to_pylist()):
            self._places[keys[number]] = len(self._labels)
            self._labels.append(self._preparation.rule.label_of(row))
        self._ids += ids
        self._parts += parts

    def _file(self, part: Part) -> Any:
        if part not in self._files:
            path = f"{FOLDER}/{self._stem}.{part}.arrow"
            local = self._stack.enter_context(self._output.replacing(path))
            self._files[part] = path, local, pa.ipc.new_file(str(local), _DATA)
        return self._files[part][2]

    def _amend(self, chunk: pa.Table) -> None:
        """Labels that an archive tells after their images."""
        rule = self._preparation.rule
        amendments = schema.unpack(chunk.column("amendments")[0])
        for row in [] if amendments is None or rule.column is None else amendments.to_pylist():
            place = self._places.get(row["amended_key"])
            if place is not None and self._labels[place] is None:
                self._labels[place] = rule.label_of(row)

    def _reject(self, reason: str, image_id: str, message: str) -> None:
        self._facts.rejects[reason] = self._facts.rejects.get(reason, 0) + 1
        if len(self._facts.examples) < MOST_EXAMPLES:
            self._facts.examples.append(f"{image_id}: {message}")


def _unpacked(chunk: pa.Table, column: str) -> pa.Table:
    table = schema.unpack(chunk.column(column)[0])
    assert table is not None, "a chunk without an error has rows and rejects"
    return table


def _part_of(image_id: str, validation_fraction: float) -> Part:
    """By the id alone, so that an image stays on its side whatever is added to the corpus."""
    digest = hashlib.sha256(image_id.encode("utf-8", "surrogatepass")).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "validation" if share < validation_fraction else "train"
