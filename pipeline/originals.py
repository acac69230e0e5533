"""The original bytes behind a hit: from a folder, an archive or a Parquet file, wherever they lie.

Reads no more of a shard than it must; tells None where the original is no longer there.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.commits import Commit, CommitLog
from pipeline.errors import ShardError
from pipeline.fingerprint import read_fingerprint
from pipeline.readers import ReadOptions, Sample, reader_of
from pipeline.schema import safe_text
from pipeline.shards import Shard, Work
from pipeline.storage import Storage


class Originals:
    """Finds the originals of an output's images by shard and key."""

    def __init__(self, output: Storage) -> None:
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
            for sample in self._samples(commit, key):
                if sample.key == key and sample.data is not None:
                    return sample.data
        except (ShardError, OSError):
            return None
        return None

    def _samples(self, commit: Commit, key: str) -> Iterator[Sample]:
        shard = commit.shard
        if shard.members:
            one = tuple(member for member in shard.members if safe_text(member.path) == key)[:1]
            shard = Shard(shard.name, shard.uri, shard.format, members=one)
        samples = reader_of(shard.format)(Work(shard, commit.stem), self._options)
        return (sample for sample in samples if isinstance(sample, Sample))
