"""An output as extract leaves it, made without a model: real Parquet, real records, a real input."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.commits import Commit, DataFile, write_commit
from pipeline.fingerprint import Fingerprint, claim
from pipeline.shards import Member, Shard
from pipeline.storage import Storage, sha256_of

FINGERPRINT = Fingerprint("cvt-tiny", "00" * 32, {}, {}, "float32", "pooled", {"metadata": []})
COMMITTED_AT = "2026-01-02T03:04:05+00:00"


def claimed(folder: Path) -> Storage:
    """An empty output that a run has begun."""
    output = Storage(str(folder))
    claim(output, FINGERPRINT)
    return output


def archive(root: Path, name: str, content: bytes = b"images") -> Shard:
    """A file of the input, and the shard that it is."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    info = Storage(str(root)).info(name)
    return Shard(name, Storage(str(root)).url(name), "webdataset", info.size, info.version)


def group(root: Path, names: list[str]) -> Shard:
    """Loose images of the input, and the shard that they are."""
    storage = Storage(str(root))
    members = []
    for name in names:
        archive(root, name, name.encode())
        info = storage.info(name)
        members.append(Member(name, info.size, info.version))
    return Shard("images-0123456789ab", storage.url(""), "images", members=tuple(members))


def put_shard(output: Storage, shard: Shard, ids: list[str], rejected: list[str] | None = None) -> Commit:
    """Commit a shard with rows of these ids, and rejects of those."""
    stem = shard.stem(FINGERPRINT.digest)
    embeddings = _write(output, f"embeddings/{stem}.parquet", _rows(shard, ids))
    reasons = Counter(truncated=len(rejected or ()))
    rejects = None
    if rejected:
        rejects = _write(output, f"rejects/{stem}.parquet", _rejects(shard, rejected))
    commit = Commit(
        stem=stem,
        shard=shard,
        fingerprint=FINGERPRINT.digest,
        num_samples=len(ids) + reasons.total(),
        num_rows=len(ids),
        num_rejects=reasons.total(),
        rejects_by_reason=dict(+reasons),
        embeddings=embeddings,
        rejects=rejects,
        supersedes=(),
        run="r",
        committed_at=COMMITTED_AT,
    )
    write_commit(output, commit)
    return commit


def _rows(shard: Shard, ids: list[str]) -> pa.Table:
    rows_schema = schema.embeddings_schema(dim=4, num_labels=0, logits="none", dtype="float32")
    rng = np.random.default_rng(0)
    columns = {
        schema.IMAGE_ID: ids,
        schema.SHARD: [shard.name] * len(ids),
        schema.KEY: ids,
        "embedding": rng.normal(size=(len(ids), 4)).tolist(),
        "width": [8] * len(ids),
        "height": [8] * len(ids),
        "format": ["PNG"] * len(ids),
        "sha256": [bytes(32)] * len(ids),
    }
    return pa.Table.from_pydict(columns, rows_schema)


def _rejects(shard: Shard, ids: list[str]) -> pa.Table:
    rows = [
        {
            "image_id": name,
            "shard": shard.name,
            "key": name,
            "reason": "truncated",
            "message": "cut",
            "size_bytes": 3,
        }
        for name in ids
    ]
    return pa.Table.from_pylist(rows, schema.REJECTS)


def _write(output: Storage, path: str, table: pa.Table) -> DataFile:
    with output.replacing(path) as local:
        pq.write_table(table, local)
        return DataFile(path, table.num_rows, local.stat().st_size, sha256_of(local))
