"""Where the images lie inside an archive or a Parquet file, so that one is read without those before it.

Enters: a shard. Leaves: for the key of each image the bytes at which it begins and how many it has, or the
number of its row. Such a table is made by going through the shard once and kept on this machine under a
name that changes with the shard. Reads no image.
"""

from __future__ import annotations

import struct
import tarfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cvt_model.cache import cache_folder
from pipeline import read_parquet, read_webdataset, schema
from pipeline.local_cache import make_room
from pipeline.samples import Amendment, ReadOptions
from pipeline.shards import Work
from pipeline.storage import Storage

_OPEN = 16  # tables that stay mapped
_CACHE_BYTES = 2_000_000_000
_PAIR = struct.Struct("<QQ")
_SCHEMA = pa.schema([("key", pa.string()), ("start", pa.uint64()), ("size", pa.uint64())])


@dataclass(frozen=True)
class Place:
    """An image's first byte and number of bytes in an archive; or, of Parquet, its row and 1.

    A sparse member of an archive does not lie in one piece: its place is IN_PIECES.
    """

    start: int
    size: int


IN_PIECES = Place(0, 0)  # where an archive has a header


class Places:
    """Tables of places, in `folder`, or where this machine keeps what can be made again."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = Storage(str(folder or cache_folder() / "places"))
        self._tables: OrderedDict[str, pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, work: Work, key: str, options: ReadOptions) -> Place | None:
        """Where an image lies; None where the shard has none of that key.

        Raises ShardError for a shard that cannot be read to its end, OSError where it is out of reach.
        """
        table = self._table(work, options)
        row = pc.index(table.column("key"), key).as_py()
        if row < 0:
            return None
        return Place(table.column("start")[row].as_py(), table.column("size")[row].as_py())

    def _table(self, work: Work, options: ReadOptions) -> pa.Table:
        with self._lock:  # one at a time: two would read the same shard twice
            if work.stem not in self._tables:
                name = f"{work.stem}.arrow"
                if not self._folder.is_file(name):
                    self._write(name, _find(work, options))
                with pa.memory_map(self._folder.path(name)) as file:
                    self._tables[work.stem] = pa.ipc.open_file(file).read_all()
                while len(self._tables) > _OPEN:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(work.stem)
            return self._tables[work.stem]

    def _write(self, name: str, places: dict[str, Place]) -> None:
        Path(self._folder.root).mkdir(parents=True, exist_ok=True)
        make_room(Path(self._folder.root), 0, _CACHE_BYTES)
        columns: list[Any] = [
            pa.array(list(places), pa.string()),
            np.array([place.start for place in places.values()], np.uint64),
            np.array([place.size for place in places.values()], np.uint64),
        ]
        with (
            self._folder.replacing(name) as path,
            pa.OSFile(str(path), "wb") as file,
            pa.ipc.new_file(file, _SCHEMA) as writer,
        ):
            writer.write_table(pa.table(columns, _SCHEMA))


def _find(work: Work, options: ReadOptions) -> dict[str, Place]:
    if work.shard.format == "parquet":
        keys = read_parquet.read_keys(work, options)
        return {key: Place(row, 1) for row, key in reversed(list(enumerate(keys)))}  # the first of twins
    places: dict[str, Place] = {}
    for item in read_webdataset.read_samples(work, options, read=_packed_place):
        if isinstance(item, Amendment):
            renamed = item.columns.get(schema.KEY)
            if renamed is not None and item.amended_key in places:
                places[renamed] = places.pop(item.amended_key)
        elif item.data is not None:
            places.setdefault(item.key, Place(*_PAIR.unpack(item.data)))
    return places


def _packed_place(_: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    return _PAIR.pack(*((0, 0) if member.issparse() else (member.offset_data, member.size)))
