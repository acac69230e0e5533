"""Outputs with an index's worth of rows, made directly of commits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commits import Commit, DataFile, write_commit
from pipeline.shards import Shard
from pipeline.storage import Storage, sha256_of

Vectors = npt.NDArray[np.float32]


def empty_output(folder: Path, classes: Sequence[str] = (), metadata: Sequence[str] = ()) -> Storage:
    """An output that a run has begun, without a shard, of a model with these classes."""
    storage = Storage(str(folder))
    parts = {
        "source": "nowhere",
        "weights_sha256": "0",
        "model_config": {"id2label": {str(number): name for number, name in enumerate(classes)}},
        "preprocessing": {},
        "precision": "float32",
        "embedding": "pooled",
        "columns": {"metadata": [[name, "string"] for name in metadata]},
    }
    storage.write_bytes("fingerprint.json", json.dumps(parts).encode())
    return storage


def commit_vectors(
    output: Storage,
    name: str,
    vectors: Vectors,
    supersedes: tuple[str, ...] = (),
    *,
    image_ids: list[str] | None = None,
    columns: dict[str, object] | None = None,
    uri: str | None = None,
) -> str:
    """Commit `vectors` as the shard `name`, with ids `name#0`, `name#1`, ...; returns its stem.

    `columns` are further columns of the embeddings, a value a row; without them every image is of 8 x 8
    pixels and bytes of its own. `uri` is where the shard's originals are; keys are `0`, `1`, ...
    """
    uri = uri or f"file:///nowhere/{name}"
    shard = Shard(name, uri, "webdataset", size=len(vectors), version=str(vectors.sum()))
    stem = shard.stem("fingerprint")
    ids = image_ids or [f"{name}#{number}" for number in range(len(vectors))]
    flat = pa.array(vectors.ravel().astype(np.float32))
    table = pa.table(
        {
            "image_id": ids,
            "shard": [name] * len(ids),
            "key": [str(number) for number in range(len(ids))],
            "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
            "label": [f"label of {image_id}" for image_id in ids],
            "sha256": digests_of(
                f"{image_id} {vector.sum()}" for image_id, vector in zip(ids, vectors, strict=True)
            ),
            "width": pa.array([8] * len(ids), pa.int32()),
            "height": pa.array([8] * len(ids), pa.int32()),
            **(columns or {}),
        }
    )
    path = f"embeddings/{stem}.parquet"
    with output.replacing(path) as local:
        pq.write_table(table, local)
        file = DataFile(path, len(ids), local.stat().st_size, sha256_of(local))
    record = Commit(
        stem, shard, "fingerprint", len(ids), len(ids), 0, {}, file, None, supersedes, "run", "2026-01-01"
    )
    write_commit(output, record)
    return stem


def digests_of(contents: Iterable[str]) -> pa.Array:
    """The column sha256 of originals with these contents."""
    return pa.array([hashlib.sha256(text.encode()).digest() for text in contents], pa.binary(32))
