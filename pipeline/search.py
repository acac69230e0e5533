"""Nearest images: by vector, by id, by image.

Enters: an output with an index, and queries. Leaves: hits with their cosine and where they came from. An
image is embedded by the very model that made the output, which the fingerprint names; any other is
refused.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cvt_model.checkpoint import Checkpoint, resolve_checkpoint
from cvt_model.errors import CheckpointError, ImageError
from cvt_model.image_decoder import decode_image
from cvt_model.image_file import DEFAULT_MAX_PIXELS
from pipeline import schema
from pipeline.commits import EMBEDDINGS
from pipeline.errors import FingerprintError, SearchError
from pipeline.fingerprint import Fingerprint, preprocessing_of, require_fingerprint
from pipeline.index import Vectors, load_faiss, normalize, read_ids, read_record, usable
from pipeline.storage import Storage

if TYPE_CHECKING:
    from cvt_model.inference import InferenceModel

_COLUMNS = (schema.IMAGE_ID, schema.SHARD, schema.KEY, "label", "label_id", "score", "width", "height")


@dataclass(frozen=True)
class Hit:
    """A neighbour. `score` is the cosine; `label_score` the probability of its label.

    What lies beyond the id comes from the embeddings; it is None where the shard was redone since.
    """

    image_id: str
    score: float
    shard: str | None = None
    key: str | None = None
    label: str | None = None
    label_id: int | None = None
    label_score: float | None = None
    width: int | None = None
    height: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Searcher:
    """The served index of an output, open for queries.

    `Searcher(Storage("features/")).by_image(Path("cat.jpg").read_bytes(), k=10)` returns a list of `Hit`.
    Raises SearchError where there is no whole index.
    """

    def __init__(self, output: Storage) -> None:
        self._output = output
        self.record = read_record(output)
        self._index = load_faiss(output, self.record)
        self._first_ids = [shard.first_id for shard in self.record.shards]
        self._ids = read_ids(output, self.record)

    def by_vector(self, vector: Vectors, k: int = 10) -> list[Hit]:
        """The k nearest images of one embedding (D,), not necessarily normalised, best first."""
        scores, ids = self._search(np.asarray(vector, np.float32).reshape(1, -1), k)
        return self._hits([int(n) for n in ids[0]], [float(x) for x in scores[0]])

    def nearest(self, vectors_QD: Vectors, k: int = 10) -> list[list[tuple[str, float]]]:
        """For each of many embeddings the ids and cosines of its k nearest images, best first."""
        scores, ids = self._search(np.asarray(vectors_QD, np.float32), k)
        names = self._ids.column(schema.IMAGE_ID)
        return [
            [(names[int(n)].as_py(), float(x)) for n, x in zip(row, values, strict=True)]
            for row, values in zip(ids, scores, strict=True)
        ]

    @property
    def image_ids(self) -> list[str]:
        """Every indexed image, in the index's order."""
        return self._ids.column(schema.IMAGE_ID).to_pylist()  # type: ignore[no-any-return]

    def by_id(self, image_id: str, k: int = 10) -> list[Hit]:
        """The k nearest images of an indexed one, itself among them and first."""
        found = self._ids.filter(pc.equal(self._ids.column(schema.IMAGE_ID), image_id))
        if not found.num_rows:
            raise SearchError(f"no image {image_id} in the index of {self._output.uri}; ids are exact")
        own = found.column("faiss_id")[0].as_py()
        scores, ids = self._search(self._index.reconstruct(own)[None], k)
        others = [(int(n), float(x)) for n, x in zip(ids[0], scores[0], strict=True) if n != own]
        ranked = [(own, float(scores[0, 0])), *others][: len(ids[0])]  # exact copies may rank alike
        return self._hits([n for n, _ in ranked], [score for _, score in ranked])

    def by_image(self, data: bytes, k: int = 10) -> list[Hit]:
        """The k nearest images of an encoded image. SearchError where it cannot be decoded."""
        return self.by_vector(self.embed(data), k)

    def _search(self, vectors_QD: Vectors, k: int) -> tuple[Vectors, Any]:
        """Cosines (Q, k) and faiss ids (Q, k); SearchError for vectors that have no neighbours."""
        if vectors_QD.shape[1] != self.record.dim:
            raise SearchError(f"the vector has {vectors_QD.shape[1]} numbers, the index {self.record.dim}")
        if not usable(vectors_QD).all():
            raise SearchError("the vector is zero or not finite, so it has no neighbours")
        scores, ids = self._index.search(normalize(vectors_QD), min(k, self.record.num_vectors))
        return scores, ids

    def embed(self, data: bytes) -> Vectors:
        """The embedding (D,) of an encoded image, as the output's own were made."""
        checkpoint, fingerprint = self._origin
        try:
            image = decode_image(
                data, checkpoint.processor, DEFAULT_MAX_PIXELS, fast=fingerprint.fast_decode
            )
        except ImageError as error:
            raise SearchError(f"the query is not a usable image: {error.message}") from error
        return self._model(image.pixels[None]).embedding[0]  # type: ignore[no-any-return]

    @cached_property
    def _origin(self) -> tuple[Checkpoint, Fingerprint]:
        """What the output was made by, found again and unchanged."""
        fingerprint = require_fingerprint(self._output)
        try:
            checkpoint = resolve_checkpoint(fingerprint.source)
            preprocessing = preprocessing_of(checkpoint.processor, fast=fingerprint.fast_decode)
        except CheckpointError as error:
            raise SearchError(f"searching by image needs the output's model: {error}") from error
        if (checkpoint.weights_sha256, preprocessing) != (
            fingerprint.weights_sha256,
            fingerprint.preprocessing,
        ):
            raise FingerprintError(
                f"{fingerprint.source} has other weights or preprocessing than made {self._output.uri}; "
                "restore the checkpoint that its fingerprint.json names"
            )
        return checkpoint, fingerprint

    @cached_property
    def _model(self) -> InferenceModel:
        from cvt_model.inference import InferenceModel  # torch, which other searches do not need

        checkpoint, fingerprint = self._origin
        return InferenceModel(
            checkpoint,
            precision=fingerprint.precision,
            batch_size=1,
            num_streams=1,  # one image at a time, on all cores
            embedding=fingerprint.embedding,
        )

    def _hits(self, ids: list[int], scores: list[float]) -> list[Hit]:
        by_shard: dict[int, list[int]] = defaultdict(list)
        for faiss_id in ids:
            by_shard[bisect_right(self._first_ids, faiss_id) - 1].append(faiss_id)
        rows: dict[int, dict[str, Any]] = {}
        for number, members in by_shard.items():
            rows |= self._rows(number, members)
        hits = []
        for faiss_id, score in zip(ids, scores, strict=True):
            row = dict(rows[faiss_id])
            hits.append(Hit(score=score, label_score=row.pop("score", None), **row))
        return hits

    def _rows(self, number: int, faiss_ids: list[int]) -> dict[int, dict[str, Any]]:
        """The committed rows of some ids of one shard; the id alone where the shard's file is gone."""
        shard = self.record.shards[number]
        names = self._ids.column(schema.IMAGE_ID)
        wanted = {names[faiss_id].as_py(): faiss_id for faiss_id in faiss_ids}
        found = {faiss_id: {schema.IMAGE_ID: name} for name, faiss_id in wanted.items()}
        try:
            with self._output.open(f"{EMBEDDINGS}/{shard.stem}.parquet") as file:
                parquet = pq.ParquetFile(file)
                columns = [name for name in _COLUMNS if name in parquet.schema_arrow.names]
                for batch in parquet.iter_batches(columns=columns):
                    hit = pc.is_in(batch.column(0), pa.array(list(wanted), pa.string()))
                    for row in batch.filter(hit).to_pylist():
                        found[wanted[row[schema.IMAGE_ID]]] = row
        except FileNotFoundError:
            pass  # redone since the index was built: the id still tells which image it is
        return found
