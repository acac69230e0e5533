"""A shard to samples, streaming: the read stage.

Enters: a Work. Leaves: CHUNK rows of at most `chunk_images` encoded images or 32 MB, whichever comes
first, so that a shard of any size passes through bounded memory. A sample that cannot be read is a
reject; a shard that cannot be read to its end yields one last row with its error, and nothing of it is
committed. Each layout is a generator of `Sample`s; this module packs them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from pipeline import read_images, read_parquet, read_webdataset, schema
from pipeline.errors import ShardError
from pipeline.samples import CHUNK_BYTES, Amendment, ReadOptions, Sample
from pipeline.shards import Work

Reader = Callable[[Work, ReadOptions], Iterator[Sample | Amendment]]


def read_shard(work: Work, options: ReadOptions) -> Iterator[pa.Table]:
    """CHUNK rows of one shard. The last has `num_chunks` set, or `error` where the shard failed."""
    packer = _Packer(work, options)
    try:
        for sample in reader_of(work.shard.format)(work, options):
            if packer.is_full_with(sample):
                yield packer.flush()
            packer.add(sample)
    except ShardError as error:
        yield packer.flush(error=str(error))
    else:
        yield packer.flush(last=True)


def reader_of(layout: str) -> Reader:
    """The reader of a layout."""
    readers: dict[str, Reader] = {
        "images": read_images.read_samples,
        "manifest": read_images.read_samples,
        "webdataset": read_webdataset.read_samples,
        "parquet": read_parquet.read_samples,
    }
    return readers[layout]


class _Packer:
    """Gathers samples of one shard and packs them into CHUNK rows; holds ids, never earlier bytes."""

    def __init__(self, work: Work, options: ReadOptions) -> None:
        self._work, self._options = work, options
        self._samples_schema = pa.schema([*schema.SAMPLES, *options.metadata])
        self._ids: set[str] = set()
        self._amendments: list[Amendment] = []
        self._chunk = 0
        self._start()

    def _start(self) -> None:
        self._samples: list[Sample] = []
        self._rejects: list[Sample] = []
        self._bytes, self._started = 0, time.time()

    def is_full_with(self, sample: Sample | Amendment) -> bool:
        """Whether the chunk must be handed on before `sample` is added."""
        if isinstance(sample, Amendment) or not (self._samples or self._rejects):
            return False
        count = len(self._samples) + len(self._rejects)
        size = self._bytes + len(sample.data or b"")
        most = self._options.chunk_images
        if self._chunk == 0:
            most = self._options.first_images or most
        return count >= most or size > CHUNK_BYTES

    def add(self, sample: Sample | Amendment) -> None:
        if isinstance(sample, Amendment):
            self._amendments.append(sample)
        elif sample.image_id in self._ids:
            self._rejects.append(sample if sample.reason == "no_image" else _duplicate(sample))
        else:
            self._ids.add(sample.image_id)
            (self._rejects if sample.data is None else self._samples).append(sample)
            self._bytes += len(sample.data or b"")

    def flush(self, *, last: bool = False, error: str | None = None) -> pa.Table:
        """The gathered samples as one CHUNK row; begins the next chunk."""
        timings = {"read_started": self._started, "read": time.time() - self._started}
        row = {
            "stem": self._work.stem,
            "chunk": self._chunk,
            "num_chunks": self._chunk + 1 if last else None,
            "rows": schema.pack(self._samples_table()),
            "rejects": schema.pack(rejects_table(self._work.shard.name, self._rejects)),
            "amendments": self._packed_amendments() if last else None,
            "error": schema.safe_text(error) if error else None,
            "timings": json.dumps(timings),
        }
        self._chunk += 1
        self._start()
        return schema.chunk_row(row)

    def _samples_table(self) -> pa.Table:
        samples = self._samples
        columns: dict[str, list[Any]] = {
            schema.IMAGE_ID: [sample.image_id for sample in samples],
            schema.SHARD: [schema.safe_text(self._work.shard.name)] * len(samples),
            schema.KEY: [sample.key for sample in samples],
            "data": [sample.data for sample in samples],
        }
        for name in self._options.metadata_names:
            columns[name] = [sample.metadata.get(name) for sample in samples]
        return pa.Table.from_pydict(columns, self._samples_schema)

    def _packed_amendments(self) -> pa.Buffer | None:
        if not self._amendments:
            return None
        names = [schema.IMAGE_ID, schema.KEY, *self._options.metadata_names]
        fields = [pa.field("amended_key", pa.string())]
        fields += [pa.field(name, self._samples_schema.field(name).type) for name in names]
        rows = [{"amended_key": item.amended_key, **item.columns} for item in self._amendments]
        return schema.pack(pa.Table.from_pylist(rows, pa.schema(fields)))


def rejects_table(shard_name: str, rejects: list[Sample]) -> pa.Table:
    """REJECTS rows of samples that have a reason."""
    rows = [
        {
            schema.IMAGE_ID: sample.image_id,
            schema.SHARD: schema.safe_text(shard_name),
            schema.KEY: sample.key,
            "reason": sample.reason,
            "message": schema.safe_text(sample.message),
            "size_bytes": sample.size_bytes,
        }
        for sample in rejects
    ]
    return pa.Table.from_pylist(rows, schema.REJECTS)


def _duplicate(sample: Sample) -> Sample:
    size = len(sample.data) if sample.data is not None else sample.size_bytes
    message = f"the shard already has a sample {sample.image_id}; the first one is kept"
    return Sample(sample.image_id, sample.key, None, {}, "duplicate_id", message, size_bytes=size)
