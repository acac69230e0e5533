"""One part of the prepared samples, by number: labels in memory, images in files that are mapped.

Enters: the shards' indexes. Leaves: the bytes of any sample. Pickles small, the labels apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SearchError, StorageError
from pipeline.finetune.samples import PARTS, Part, read_index
from pipeline.index.files import FileRef, fetch
from pipeline.storage import Storage

NO_CLASS = -1
Labels = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Files:
    """Files of samples in a row: sample `begins[n]` is the first of `files[n]`."""

    output: Storage
    files: tuple[FileRef, ...]
    begins: tuple[int, ...]

    def __getitem__(self, number: int) -> memoryview:
        """The bytes of a sample, without a copy. Raises StorageError where they are gone."""
        file = int(np.searchsorted(self._begins, number, "right")) - 1
        starts, batches = self._batches(file)
        number -= self.begins[file]
        batch = int(np.searchsorted(starts, number, "right")) - 1
        return memoryview(batches[batch].column(0)[number - int(starts[batch])].as_buffer())

    @cached_property
    def _begins(self) -> npt.NDArray[np.int64]:
        return np.asarray(self.begins, np.int64)

    @cached_property
    def _opened(self) -> dict[int, tuple[npt.NDArray[np.int64], list[pa.RecordBatch]]]:
        return {}

    def _batches(self, file: int) -> tuple[npt.NDArray[np.int64], list[pa.RecordBatch]]:
        """A file's batches, mapped, and the number of the first sample of each."""
        if file not in self._opened:
            try:
                path = fetch(self.output, self.files[file])
            except SearchError as error:
                raise StorageError(
                    f"{self.output.url(self.files[file].path)} is missing or damaged; delete the folder "
                    "that it is in, and run again"
                ) from error
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            batches = [reader.get_batch(n) for n in range(reader.num_record_batches)]
            starts = np.cumsum([0, *(batch.num_rows for batch in batches)])[:-1]
            self._opened[file] = starts, batches
        return self._opened[file]

    def __reduce__(self) -> tuple[Any, ...]:
        return Files, (self.output, self.files, self.begins)


@dataclass(frozen=True)
class SampleSet:
    """Labelled samples: `labels[n]` is the class of sample `numbers[n]` of `files`."""

    files: Files
    numbers: npt.NDArray[np.int64]
    labels: Labels

    @property
    def digest(self) -> str:
        """Of the images and labels themselves: not of where they came from, nor when."""
        content = hashlib.sha256("".join(file.sha256 for file in self.files.files).encode())
        content.update(self.numbers.tobytes())
        content.update(self.labels.tobytes())
        return content.hexdigest()

    def __len__(self) -> int:
        return len(self.numbers)

    def data(self, number: int) -> memoryview:
        """The bytes of a sample: an encoded image of training, pixels of validation."""
        return self.files[int(self.numbers[number])]


def open_samples(output: Storage, stems: Sequence[str], classes: Sequence[str]) -> dict[Part, SampleSet]:
    """The parts of the samples of these shards, in their order, without those of other classes."""
    ids = {name: number for number, name in enumerate(classes)}
    files: dict[Part, list[FileRef]] = {part: [] for part in PARTS}
    labels: dict[Part, list[Labels]] = {part: [] for part in PARTS}
    for stem in stems:
        table, facts = read_index(output, stem)
        for part in PARTS:
            if part in facts.files:
                names = table.filter(pc.equal(table.column("part"), part)).column("label").to_pylist()
                files[part].append(facts.files[part])
                labels[part].append(np.array([ids.get(name, NO_CLASS) for name in names], np.int32))
    return {part: _sample_set(output, files[part], labels[part]) for part in PARTS}


def _sample_set(output: Storage, files: list[FileRef], labels: list[Labels]) -> SampleSet:
    every = np.concatenate([np.empty(0, np.int32), *labels])
    begins = np.cumsum([0, *map(len, labels)])[:-1].tolist()
    numbers = np.flatnonzero(every != NO_CLASS)
    return SampleSet(Files(output, tuple(files), tuple(begins)), numbers, every[numbers])
