"""The similarity index: built from committed rows, measured, published in one step.

`index/<version>/` holds `index.faiss` (inner products of L2-normalised copies, with ids), `ids.parquet`
(faiss_id and image_id, a row group a shard) and `index.json` (what it is, how good, and which ids each
shard has). `index/CURRENT` names the served version and is written last, so that a build that dies
changes nothing, and readers of the old version are undisturbed.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.commits import Commit, CommitLog
from pipeline.errors import OutputError, SearchError
from pipeline.fingerprint import require_fingerprint
from pipeline.recall import measure
from pipeline.storage import Storage, sha256_of, unique_name

INDEX, CURRENT = "index", "index/CURRENT"
KEEP_VERSIONS = 2
_BATCH_ROWS = 8192

Vectors = npt.NDArray[np.float32]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardIds:
    """The ids of one commit: `num_vectors` from `first_id` on, and a row group of ids.parquet."""

    stem: str
    first_id: int
    num_vectors: int


@dataclass(frozen=True)
class IndexRecord:
    """`index.json`: what a version is and how good it was measured to be."""

    version: str
    type: str
    num_vectors: int
    num_excluded: int
    dim: int
    metric: str
    recall_at_1: float
    recall_at_10: float
    recall_at_100: float
    latency_ms: float
    build_s: float
    fingerprint: str
    sha256: str
    size_bytes: int
    created_at: str
    commits: tuple[str, ...]
    shards: tuple[ShardIds, ...]

    @classmethod
    def from_json(cls, data: bytes) -> IndexRecord:
        values = json.loads(data)
        shards = tuple(ShardIds(**entry) for entry in values["shards"])
        return cls(**{**values, "commits": tuple(values["commits"]), "shards": shards})


def current_version(output: Storage) -> str | None:
    """The version that `index/CURRENT` names, or None where there is no index."""
    try:
        return output.read_bytes(CURRENT).decode().strip()
    except FileNotFoundError:
        return None


def build_index(output: Storage) -> IndexRecord:
    """Build, measure and publish an exact index of every committed row.

    Where the served version already is of these commits it stays, and its record is returned.
    """
    started = time.time()
    fingerprint = require_fingerprint(output)
    commits = [commit for commit in _live(output) if commit.num_rows]
    if not commits:
        raise OutputError(f"{output.uri} has no committed images yet; run extract first")
    served = _served(output, {commit.stem for commit in commits})
    if served is not None:
        return served
    version = unique_name()
    index, shards, excluded = _add_all(output, version, commits)
    quality = measure(index)
    with output.replacing(f"{INDEX}/{version}/index.faiss") as local:
        faiss.write_index(index, str(local))
        sha256, size = sha256_of(local), local.stat().st_size
    record = IndexRecord(
        version=version,
        type="exact",
        num_vectors=index.ntotal,
        num_excluded=excluded,
        dim=index.d,
        metric="cosine",
        **quality,
        build_s=round(time.time() - started, 3),
        fingerprint=fingerprint.digest,
        sha256=sha256,
        size_bytes=size,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        commits=tuple(commit.stem for commit in commits),
        shards=tuple(shards),
    )
    output.write_bytes(f"{INDEX}/{version}/index.json", json.dumps(asdict(record)).encode())
    output.write_bytes(CURRENT, version.encode())
    _drop_old(output, version)
    return record


def normalize(vectors: Vectors) -> Vectors:
    """Rows (N, D) scaled to length 1 in float32, so that inner products are cosines."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return np.ascontiguousarray(vectors / lengths, dtype=np.float32)


def read_vectors(output: Storage, commit_file: str) -> Iterator[tuple[list[str], Vectors]]:
    """The ids and embeddings (N, D) of a committed file, in batches."""
    with output.open(commit_file) as stream:
        parquet = pq.ParquetFile(stream)
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=[schema.IMAGE_ID, "embedding"]):
            column = batch.column(1)
            flat = column.flatten().to_numpy(zero_copy_only=False)
            vectors = flat.reshape(len(column), column.type.list_size).astype(np.float32)
            yield batch.column(0).to_pylist(), vectors


def usable(vectors: Vectors) -> npt.NDArray[np.bool_]:
    """Which rows have a direction: finite, and not all zeros."""
    return np.logical_and(np.isfinite(vectors).all(axis=1), vectors.any(axis=1))


def _served(output: Storage, stems: set[str]) -> IndexRecord | None:
    """The served version, if it is whole and of just these commits."""
    if current_version(output) is None:
        return None
    try:
        record = read_record(output)
    except SearchError:
        return None
    sizes = {info.path: info.size for info in output.find(f"{INDEX}/{record.version}")}
    whole = sizes.get(f"{INDEX}/{record.version}/index.faiss") == record.size_bytes
    same = set(record.commits) == stems
    return record if whole and same and f"{INDEX}/{record.version}/ids.parquet" in sizes else None


def _live(output: Storage) -> list[Commit]:
    log = CommitLog(output)
    return log.read(log.live)


def _add_all(output: Storage, version: str, commits: list[Commit]) -> tuple[Any, list[ShardIds], int]:
    """An index of all usable rows; writes ids.parquet beside it, a row group a commit."""
    index, shards, excluded = None, [], 0
    with (
        output.replacing(f"{INDEX}/{version}/ids.parquet") as local,
        pq.ParquetWriter(local, schema.INDEX_IDS, compression="zstd") as writer,
    ):
        for commit in commits:
            image_ids: list[str] = []
            first_id = index.ntotal if index is not None else 0
            for names, vectors in read_vectors(output, commit.embeddings.path):
                good = usable(vectors)
                excluded += int((~good).sum())
                if index is None:
                    index = faiss.IndexIDMap2(faiss.IndexFlatIP(vectors.shape[1]))
                ids = np.arange(index.ntotal, index.ntotal + good.sum(), dtype=np.int64)
                index.add_with_ids(normalize(vectors[good]), ids)
                image_ids += [name for name, kept in zip(names, good, strict=True) if kept]
            if not image_ids:
                continue
            shards.append(ShardIds(commit.stem, first_id, len(image_ids)))
            faiss_ids = np.arange(first_id, first_id + len(image_ids), dtype=np.int64)
            table = pa.table([pa.array(faiss_ids), image_ids], schema.INDEX_IDS)
            writer.write_table(table, row_group_size=len(image_ids))
    if excluded:
        logger.warning("%d embeddings are zero or not finite and cannot be found by search", excluded)
    if index is None or not index.ntotal:
        raise OutputError(f"{output.uri} has no embedding with a direction; there is nothing to index")
    return index, shards, excluded


def _drop_old(output: Storage, version: str) -> None:
    """Keep the newest versions; half-built ones of earlier, killed builds go too."""
    names = {info.path.split("/")[1] for info in output.find(INDEX) if info.path.count("/") >= 2}
    for name in sorted(names - {version}, reverse=True)[KEEP_VERSIONS - 1 :]:
        output.delete_folder(f"{INDEX}/{name}")


def read_record(output: Storage) -> IndexRecord:
    """The record of the served version; SearchError where there is none, or it is not whole."""
    version = current_version(output)
    if version is None:
        raise SearchError(f"{output.uri} has no index; run: cvt-pipeline index {output.uri}")
    try:
        return IndexRecord.from_json(output.read_bytes(f"{INDEX}/{version}/index.json"))
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        raise SearchError(
            f"{output.uri}/{INDEX}/{version} is not a whole index ({error!r}); "
            f"run: cvt-pipeline index {output.uri}"
        ) from error


def read_ids(output: Storage, record: IndexRecord) -> pa.Table:
    """INDEX_IDS of a record, in the order of faiss_id."""
    path = f"{INDEX}/{record.version}/ids.parquet"
    try:
        with output.open(path) as file:
            ids = pq.ParquetFile(file).read(use_threads=False).cast(schema.INDEX_IDS)
    except (FileNotFoundError, pa.ArrowException) as error:
        raise _damaged(output, path) from error
    if ids.num_rows != record.num_vectors:
        raise _damaged(output, path)
    return ids


def _damaged(output: Storage, path: str) -> SearchError:
    return SearchError(f"{output.url(path)} is missing or damaged; run: cvt-pipeline index {output.uri}")


def load_faiss(output: Storage, record: IndexRecord) -> Any:
    """The FAISS index of a record, its checksum compared before it is parsed."""
    path = f"{INDEX}/{record.version}/index.faiss"
    try:
        with output.local_copy(path) as local:
            if sha256_of(local) == record.sha256:
                return faiss.read_index(str(local))
    except FileNotFoundError:
        pass
    raise _damaged(output, path)
