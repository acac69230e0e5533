"""The labelled rows of an output, in the order of its files: what an evaluation reads them by.

Enters: an output and where its labels are. Leaves: the class of every committed image, and tables of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commits import CommitLog
from pipeline.errors import BusyError, OutputError
from pipeline.label_source import LabelSource
from pipeline.quality import Ids
from pipeline.schema import IMAGE_ID

LABEL_ROWS, VECTOR_ROWS = 65_536, 4_096  # read at once
NO_CLASS = -1


@dataclass(frozen=True)
class Labels:
    """The label of every committed image, by number; NO_CLASS where it has none."""

    names: list[str]
    numbers: Ids

    @property
    def num_images(self) -> int:
        return len(self.numbers)

    def as_classes(self, classes: Sequence[str]) -> Ids:
        """The class of every image; NO_CLASS of a label that is none of these."""
        place = {name: number for number, name in enumerate(classes)}
        translated = np.array([*(place.get(name, NO_CLASS) for name in self.names), NO_CLASS], np.int32)
        return translated[self.numbers]  # NO_CLASS, -1, takes the last one


def read_labels(log: CommitLog, labels: LabelSource) -> Labels:
    """The labels of all images, in the order of the files."""
    numbers: dict[str, int] = {}
    parts = [np.empty(0, np.int32)]
    for _, table in tables(log, (IMAGE_ID, *labels.columns), LABEL_ROWS):
        found = labels.labels_of(table).to_pylist()
        parts.append(
            np.array(
                [NO_CLASS if it is None else numbers.setdefault(it, len(numbers)) for it in found], np.int32
            )
        )
    return Labels(list(numbers), np.concatenate(parts))


def tables(log: CommitLog, columns: Sequence[str], rows: int) -> Iterator[tuple[str, pa.Table]]:
    """The committed rows with the stem of their commit, in the order of the files, some at a time.

    A row is known by its place in that order: who reads rows more than once does so by one log, which is of
    one moment, whatever runs commit meanwhile. A column that a file does not have is left out.

    Raises BusyError where a run has replaced or removed a shard since that moment, OutputError for a file
    that is damaged.
    """
    try:
        for commit in log.stream(log.live):
            with log.output.local_copy(commit.embeddings.path) as path, pq.ParquetFile(path) as file:
                names = [name for name in dict.fromkeys(columns) if name in file.schema_arrow.names]
                for batch in file.iter_batches(rows, columns=names):
                    yield commit.stem, pa.Table.from_batches([batch])
    except FileNotFoundError as error:
        raise BusyError(
            f"{log.output.uri}: a run has replaced or removed a shard meanwhile ({error}); run this again"
        ) from error
    except pa.ArrowInvalid as error:
        raise OutputError(
            f"{log.output.uri}: {commit.embeddings.path} is damaged ({error}); "
            f"run: cvt-pipeline verify {log.output.uri}"
        ) from error


def matrix(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """A column of fixed-size lists as (rows, size)."""
    flat: npt.NDArray[Any] = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, column.type.list_size)
