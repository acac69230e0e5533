"""The original bytes behind a hit: from a folder, an archive or a Parquet file, wherever they lie.

Of an archive or a Parquet file it reads the image alone (a compressed archive from its beginning), by a
table of places that is made when the first of its images is asked for. Tells None where the original is no
longer there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline import schema
from pipeline.commits import Commit, CommitLog
from pipeline.errors import ConfigError, ShardError
from pipeline.fingerprint import read_fingerprint
from pipeline.places import IN_PIECES, Places
from pipeline.read_parquet import read_image
from pipeline.readers import reader_of
from pipeline.samples import Amendment, ReadOptions, Sample
from pipeline.schema import safe_text
from pipeline.shards import Shard, Work, file_name, name_part
from pipeline.storage import Storage, parent_and_name

_REMEMBERED = 32  # commit records; those of loose images list thousands of members


class Originals:
    """Finds the originals of an output's images by shard and key; for any number of threads.

    `input_options` are storage options of the input; where it is of the output's own service, the output's
    hold too.
    """

    def __init__(self, output: Storage, input_options: Mapping[str, Any] | None = None) -> None:
        self._output, self._input_options = output, input_options or {}
        self._log = CommitLog(output)
        self._stems: dict[str, list[str]] = defaultdict(list)
        for stem in self._log.live:
            self._stems[name_part(stem)].append(stem)
        self._commits: OrderedDict[str, Commit] = OrderedDict()
        self._lock = threading.Lock()
        self._places = Places()
        fingerprint = read_fingerprint(output)
        columns = fingerprint.columns if fingerprint else {}
        self._options = ReadOptions(
            chunk_images=1,
            max_image_bytes=2**31,
            image_column=columns.get("image_column"),
            id_column=columns.get("id_column"),
        )

    def read(self, shard: str, key: str, sha256: bytes | None = None) -> bytes | None:
        """The encoded image, or None where it cannot be had any more, or is not that of this SHA-256."""
        commit = self._commit_of(shard)
        if commit is None:
            return None
        try:
            data = self._find(commit, key)
        except (ConfigError, ShardError, OSError):
            return None
        changed = data is not None and sha256 is not None and hashlib.sha256(data).digest() != sha256
        return None if changed else data

    def _commit_of(self, shard: str) -> Commit | None:
        """The record of a shard, by its name."""
        with self._lock:
            if shard not in self._commits:
                stems = self._stems.get(file_name(shard), ())
                for commit in self._log.stream(stems):  # more than one where long names were cut
                    self._commits[commit.shard.name] = commit
                while len(self._commits) > max(_REMEMBERED, len(stems)):
                    self._commits.popitem(last=False)
            return self._commits.get(shard)

    def _find(self, commit: Commit, key: str) -> bytes | None:
        work, options = self._work(commit, key)
        if work.shard.members:
            return self._look_through(work, key, options)
        folder, name = parent_and_name(work.shard.uri)
        there = Storage(folder, options.storage_options)
        now = there.info(name)  # it may have been written again since
        shard = dataclasses.replace(work.shard, size=now.size, version=now.version)
        work = Work(shard, shard.stem(""))
        if name.lower().endswith((".gz", ".tgz")):
            return self._look_through(work, key, options)
        place = self._places.of(work, key, options)
        if place is None:
            return None
        if work.shard.format == "parquet":
            return read_image(work, place.start, options)
        if place == IN_PIECES:
            return self._look_through(work, key, options)
        return there.read_range(name, place.start, place.size)

    def _look_through(self, work: Work, key: str, options: ReadOptions) -> bytes | None:
        """The image, by reading its shard until it comes."""
        items: Iterator[Sample | Amendment] = reader_of(work.shard.format)(work, options)
        for item in items:
            if isinstance(item, Amendment):
                if item.columns.get(schema.KEY) == key:  # it was read under another key
                    return self._look_through(work, item.amended_key, options)
            elif item.key == key and item.data is not None:
                return item.data
        return None

    def _work(self, commit: Commit, key: str) -> tuple[Work, ReadOptions]:
        shard = commit.shard
        if shard.members:
            one = tuple(member for member in shard.members if safe_text(member.path) == key)[:1]
            shard = Shard(shard.name, shard.uri, shard.format, members=one)
        options = {**self._output.options_for(shard.uri), **self._input_options}
        return Work(shard, commit.stem), dataclasses.replace(self._options, storage_options=options)
