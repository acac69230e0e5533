"""The original bytes behind a hit: from a folder, an archive or a Parquet file, wherever they lie.

Reads no more of a shard than it must; tells None where the original is no longer there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline import schema
from pipeline.commits import Commit, CommitLog
from pipeline.errors import ConfigError, ShardError
from pipeline.fingerprint import read_fingerprint
from pipeline.readers import reader_of
from pipeline.samples import Amendment, ReadOptions, Sample
from pipeline.schema import safe_text
from pipeline.shards import Shard, Work
from pipeline.storage import Storage


class Originals:
    """Finds the originals of an output's images by shard and key.

    `input_options` are storage options of the input; where it is of the output's own service, the output's
    hold too.
    """

    def __init__(self, output: Storage, input_options: Mapping[str, Any] | None = None) -> None:
        self._output, self._input_options = output, input_options or {}
        log = CommitLog(output)
        self._commits = {commit.shard.name: commit for commit in log.read(log.live)}
        fingerprint = read_fingerprint(output)
        columns = fingerprint.columns if fingerprint else {}
        self._options = ReadOptions(
            chunk_images=1,
            max_image_bytes=2**31,
            image_column=columns.get("image_column"),
            id_column=columns.get("id_column"),
        )

    def read(self, shard: str, key: str) -> bytes | None:
        """The encoded image, or None where it cannot be had any more."""
        commit = self._commits.get(shard)
        if commit is None:
            return None
        try:
            return self._find(commit, key)
        except (ConfigError, ShardError, OSError):
            return None

    def _find(self, commit: Commit, key: str) -> bytes | None:
        for item in self._read(commit, key):
            if isinstance(item, Amendment):
                if item.columns.get(schema.KEY) == key:  # it was read under another key
                    return self._find(commit, item.amended_key)
            elif item.key == key and item.data is not None:
                return item.data
        return None

    def _read(self, commit: Commit, key: str) -> Iterator[Sample | Amendment]:
        shard = commit.shard
        if shard.members:
            one = tuple(member for member in shard.members if safe_text(member.path) == key)[:1]
            shard = Shard(shard.name, shard.uri, shard.format, members=one)
        options = {**self._output.options_for(shard.uri), **self._input_options}
        read = dataclasses.replace(self._options, storage_options=options)
        return reader_of(shard.format)(Work(shard, commit.stem), read)
