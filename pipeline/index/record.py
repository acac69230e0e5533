"""`index.json`: what a version of the index is and how good it was measured to be; and which is served.

`index/<version>/` holds `index.faiss`, `ids.parquet`, `truth.parquet` and `index.json`. `index/CURRENT`
names the served version and is written last, so that a build that dies changes nothing, and readers of the
old version are undisturbed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.errors import SearchError
from pipeline.index.files import BUILD, CURRENT, INDEX, VECTORS, FileRef, damaged, fetch
from pipeline.index.vectors import Segment, ShardIds
from pipeline.storage import Storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How a version is searched: what was tuned to its target. None where its type knows no such thing.

    `k_factor` times as many candidates as neighbours are ranked again by their exact vectors; 0: none.
    """

    nprobe: int | None = None
    ef_search: int | None = None
    k_factor: float = 0

    def with_effort(self, effort: int) -> Settings:
        """The same, looking at `effort` lists, or nodes of the graph."""
        return replace(self, **{"nprobe" if self.nprobe else "ef_search": effort})


@dataclass(frozen=True)
class IndexRecord:
    """`index.json`. Sizes in bytes, times in seconds but for `latency_ms`."""

    version: str
    type: str
    factory: str
    num_vectors: int
    num_excluded: int
    dim: int
    metric: str
    recall_at_1: float
    recall_at_10: float
    recall_at_100: float
    latency_ms: float
    num_queries: int
    target_recall: float
    settings: Settings
    in_memory: bool
    memory_budget: int
    build_s: float
    peak_memory_bytes: int
    reason: str
    parent: str | None
    next_id: int
    num_dead: int
    num_trained: int
    num_appended: int
    num_since_queries: int
    imbalance: float | None
    trained_imbalance: float | None
    fingerprint: str
    sha256: str
    size_bytes: int
    created_at: str
    ids: FileRef
    truth: FileRef
    commits: tuple[str, ...]
    shards: tuple[ShardIds, ...]
    segments: tuple[Segment, ...]
    excluded: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: bytes) -> IndexRecord:
        values = json.loads(data)
        segments = (
            Segment(entry["first_id"], entry["num_vectors"], FileRef(**entry["file"]))
            for entry in values["segments"]
        )
        changed = {
            "settings": Settings(**values["settings"]),
            "ids": FileRef(**values["ids"]),
            "truth": FileRef(**values["truth"]),
            "commits": tuple(values["commits"]),
            "shards": tuple(ShardIds(**entry) for entry in values["shards"]),
            "segments": tuple(segments),
        }
        return cls(**{**values, **changed})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def folder(self) -> str:
        return f"{INDEX}/{self.version}"

    @property
    def faiss_file(self) -> FileRef:
        return FileRef(f"{self.folder}/index.faiss", self.size_bytes, self.sha256)


def current_version(output: Storage) -> str | None:
    """The version that `index/CURRENT` names, or None where there is no index."""
    try:
        return output.read_bytes(CURRENT).decode(errors="replace").strip()
    except FileNotFoundError:
        return None


def read_record(output: Storage, version: str | None = None) -> IndexRecord:
    """The record of a version, by default of the served one.

    Raises SearchError where there is none, or it is not whole.
    """
    version = version or current_version(output)
    if version is None:
        raise SearchError(f"{output.uri} has no index; run: cvt-pipeline index {output.uri}")
    try:
        if not version or "/" in version:
            raise ValueError(f"{CURRENT} names no version")
        return IndexRecord.from_json(output.read_bytes(f"{INDEX}/{version}/index.json"))
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        raise SearchError(
            f"{output.uri}/{INDEX}/{version} is not a whole index ({error!r}); "
            f"run: cvt-pipeline index {output.uri}"
        ) from error


def is_whole(output: Storage, record: IndexRecord) -> bool:
    """Whether every file of a version is there in its size."""
    wanted = [record.faiss_file, record.ids, record.truth, *(segment.file for segment in record.segments)]
    sizes = {info.path: info.size for info in output.find(INDEX)}
    return all(sizes.get(file.path) == file.size_bytes for file in wanted)


def read_ids(output: Storage, record: IndexRecord) -> pa.Table:
    """INDEX_IDS of a record: the live vectors, in the order of faiss_id."""
    path = fetch(output, record.ids, check=True)
    try:
        ids = pq.read_table(path, use_threads=False, schema=schema.INDEX_IDS)
    except pa.ArrowException as error:
        raise damaged(output, record.ids.path) from error
    if ids.num_rows != record.num_vectors:
        raise damaged(output, record.ids.path)
    return ids


def publish(output: Storage, record: IndexRecord, keep_versions: int) -> None:
    """Make a version, whose files are all in place, the served one; old ones go by count."""
    data = json.dumps(record.to_json(), allow_nan=False).encode()
    output.write_bytes(f"{record.folder}/index.json", data)
    output.write_bytes(CURRENT, record.version.encode())
    tidy(output, keep_versions)


def roll_back(output: Storage) -> IndexRecord:
    """Serve the version before the served one, which stays. SearchError where there is none whole."""
    served = current_version(output)
    if served is None:
        raise SearchError(f"{output.uri} has no index; run: cvt-pipeline index {output.uri}")
    for version in sorted((name for name in versions(output) if name < served), reverse=True):
        record = read_record(output, version)
        if is_whole(output, record):
            output.write_bytes(CURRENT, version.encode())
            return record
    raise SearchError(
        f"{output.uri} has no whole version of the index before {served}; index.keep_versions says how "
        "many are kept"
    )


def versions(output: Storage) -> list[str]:
    """The versions that have a record, oldest first."""
    parts = (info.path.split("/") for info in output.find(INDEX))
    return sorted(path[1] for path in parts if len(path) == 3 and path[2] == "index.json")


def tidy(output: Storage, keep_versions: int) -> None:
    """Delete what killed builds left, versions beyond `keep_versions`, and segments that none refers to.

    The served version always stays. For the holder of the lease alone: it would take a build in progress
    for a dead one.
    """
    served = current_version(output)
    others = [name for name in versions(output) if name != served]
    kept = set(others[::-1][: keep_versions - 1]) | ({served} if served else set())
    found = list(output.find(INDEX))
    folders = {path[1] for path in (info.path.split("/") for info in found) if len(path) > 2}
    for name in folders:
        if not name.startswith("_") and name not in kept:
            output.delete_folder(f"{INDEX}/{name}")
    output.delete_folder(BUILD)
    referred = set(_segments(output, kept))
    for info in found:
        if info.path.startswith(f"{VECTORS}/") and info.path not in referred:
            output.delete(info.path)


def _segments(output: Storage, kept: Iterable[str]) -> Iterable[str]:
    for version in kept:
        try:
            record = read_record(output, version)
        except SearchError as error:
            logger.warning("%s", error)
            continue
        yield from (segment.file.path for segment in record.segments)
