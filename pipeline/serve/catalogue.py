"""The committed rows of an output without their vectors, at hand by number and by id.

Enters: an output. Leaves: a table on this machine's disk that is mapped, not loaded, so that memory does
not grow with it; numbers of rows by id; and for columns of few values the value of every row as a small
number. Rows are numbered in the order of the committed files. Made once for a set of commits, then opened.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commits import EMBEDDINGS, CommitLog
from pipeline.labelled_rows import LABEL_ROWS, tables
from pipeline.schema import IMAGE_ID
from pipeline.serve.once import forget_older, made_once
from pipeline.storage import Storage
from pipeline.totals import mark_of

_LAYOUT = 3  # of the files here; another number, and they are made anew
_VECTORS = ("embedding", "logits", "top_ids", "top_logits")
_NOT_FACETS = (IMAGE_ID, "key", "shard", "label_id", "width", "height")
_MOST_VALUES = 500  # of a column that is offered as a facet
_LABEL = "label"  # always one: whatever the number of classes, the page shows and reviews them
_FEW_VALUES = 12  # so many may be as many as there are rows
_THREADS = 16
NO_VALUE = -1

Codes = npt.NDArray[np.int32]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Facet:
    """A column of few values: the number of its value in every row, NO_VALUE where it is null."""

    values: tuple[Any, ...]
    codes: Codes


class Catalogue:
    """The rows of one set of commits; `folder` holds what `make` wrote."""

    def __init__(self, folder: Path) -> None:
        with pa.memory_map(str(folder / "rows.arrow")) as file:
            reader = pa.ipc.open_file(file)
            self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            self.schema: pa.Schema = reader.schema
        self._columns = [list(zip(self.schema.names, it.columns, strict=True)) for it in self._batches]
        self._starts = np.cumsum([0, *(len(batch) for batch in self._batches)]).tolist()
        self._hashes = np.load(folder / "hashes.npy", mmap_mode="r")
        self._order = np.load(folder / "order.npy", mmap_mode="r")
        facts = json.loads((folder / "facets.json").read_text())
        self.facets = {
            name: Facet(tuple(values), np.load(folder / f"facet-{number}.npy", mmap_mode="r"))
            for number, (name, values) in enumerate(facts)
        }

    @classmethod
    def of(cls, output: Storage, log: CommitLog, cache: Path) -> tuple[Catalogue, str]:
        """The catalogue of what is committed, made if it is not in the cache, and its name there."""
        of_output = hashlib.sha256(output.url("").encode()).hexdigest()[:12]
        name = f"{of_output}-{mark_of(log.live):032x}-{_LAYOUT}"
        folder = made_once(cache / name, lambda partial: _make(output, log, partial))
        forget_older(cache, f"{of_output}-")
        return cls(folder), name

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row_of(self, image_id: str) -> int | None:
        """The number of an image's row; None where there is none of that id."""
        return self._find(image_id, hash_of(image_id))

    def rows_of(self, image_ids: Iterable[str]) -> Rows:
        """The numbers of rows by their ids, -1 for those that are not there."""
        found = (self.row_of(image_id) for image_id in image_ids)
        return np.fromiter((-1 if row is None else row for row in found), np.int64)

    def _find(self, image_id: str, digest: int) -> int | None:
        wanted = np.uint64(digest)
        place = int(np.searchsorted(self._hashes, wanted))
        while place < len(self._hashes) and self._hashes[place] == wanted:
            row = int(self._order[place])
            number = bisect_right(self._starts, row) - 1
            _, ids = self._columns[number][0]
            if ids[row - self._starts[number]].as_py() == image_id:
                return row
            place += 1
        return None

    def get(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Rows by their numbers, as Python values."""
        found = []
        for row in rows:
            number = bisect_right(self._starts, row) - 1
            place = row - self._starts[number]
            found.append({name: column[place].as_py() for name, column in self._columns[number]})
        return found

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """All rows, some at a time, with these columns alone."""
        for batch in self._batches:
            yield pa.Table.from_batches([batch.select(list(columns))])


def hash_of(image_id: str) -> int:
    """64 bits that are nearly always different for different ids, on every machine the same."""
    return int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest())


def _make(output: Storage, log: CommitLog, folder: Path) -> None:
    rows_schema = _schema(output, sorted(log.live))
    counters = {
        field.name: _Values(any_number=field.name == _LABEL)
        for field in rows_schema
        if field.name not in _NOT_FACETS and _few(field.type)
    }
    hashes: list[npt.NDArray[np.uint64]] = [np.empty(0, np.uint64)]
    with (
        pa.OSFile(str(folder / "rows.arrow"), "wb") as file,
        pa.ipc.new_file(file, rows_schema) as writer,
    ):
        for _, table in tables(log, rows_schema.names, LABEL_ROWS):
            whole = pa.concat_tables([rows_schema.empty_table(), table], promote_options="permissive")
            whole = whole.select(rows_schema.names).cast(rows_schema)
            for batch in whole.combine_chunks().to_batches():
                writer.write_batch(batch)
                digests = map(hash_of, batch.column(0).to_pylist())
                hashes.append(np.fromiter(digests, np.uint64, len(batch)))
                for name, counter in counters.items():
                    counter.add(batch.column(name))
    together = np.concatenate(hashes)
    order = np.argsort(together, kind="stable")
    np.save(folder / "hashes.npy", together[order])
    np.save(folder / "order.npy", order)
    facets = [(name, values) for name, values in counters.items() if values.tell_apart(len(together))]
    for number, (_, values) in enumerate(facets):
        np.save(folder / f"facet-{number}.npy", np.concatenate([np.empty(0, np.int32), *values.codes]))
    (folder / "facets.json").write_text(json.dumps([(name, list(it.numbers)) for name, it in facets]))


def _schema(output: Storage, stems: Sequence[str]) -> pa.Schema:
    """The columns of all files but the vectors, image_id first, of types that fit them all."""

    def read(stem: str) -> pa.Schema:
        with output.open(f"{EMBEDDINGS}/{stem}.parquet") as file:
            found = pq.read_schema(file)
        return pa.schema([field.with_nullable(True) for field in found if field.name not in _VECTORS])

    with ThreadPoolExecutor(_THREADS) as pool:
        schemas = list(dict.fromkeys(pool.map(read, stems)))
    first = pa.schema([(IMAGE_ID, pa.string())])
    return pa.unify_schemas([first, *schemas], promote_options="permissive")


def _few(kind: pa.DataType) -> bool:
    """Whether values of a type can be a facet's."""
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_dictionary(kind)
    )


class _Values:
    """The values of a column in the order in which they came, while they are few."""

    def __init__(self, *, any_number: bool) -> None:
        self._any_number = any_number
        self.numbers: dict[Any, int] = {}
        self.codes: list[Codes] = []
        self.are_few = True

    def add(self, column: pa.Array) -> None:
        if not self.are_few:
            return
        encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        if len(encoded.dictionary) > _MOST_VALUES and not self._any_number:
            self._give_up()
            return
        values = encoded.dictionary.to_pylist()
        numbers = [
            NO_VALUE if it is None else self.numbers.setdefault(it, len(self.numbers)) for it in values
        ]
        if len(self.numbers) > _MOST_VALUES and not self._any_number:
            self._give_up()
            return
        indices = encoded.indices.fill_null(len(numbers)).to_numpy(zero_copy_only=False)
        self.codes.append(np.array([*numbers, NO_VALUE], np.int32)[indices])

    def tell_apart(self, num_rows: int) -> bool:
        """Whether they make groups of the rows, rather than naming each."""
        few = self._any_number or len(self.numbers) <= max(_FEW_VALUES, num_rows // 2)
        return self.are_few and few

    def _give_up(self) -> None:
        self.are_few, self.codes, self.numbers = False, [], {}
