"""Nearest images: by vector, by id, by image.

Enters: an output with an index, and queries. Leaves: hits with their cosine and where they came from. An
image is embedded by the very model that made the output, which the fingerprint names; any other is
refused.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cvt_model.checkpoint import Checkpoint, resolve_checkpoint
from cvt_model.errors import CheckpointError, ImageError
from cvt_model.image_decoder import decode_image
from cvt_model.image_file import DEFAULT_MAX_PIXELS
from cvt_model.image_processor import CvtImageProcessor
from pipeline import schema
from pipeline.commits import EMBEDDINGS
from pipeline.errors import FingerprintError, SearchError
from pipeline.fingerprint import Fingerprint, preprocessing_of, require_fingerprint
from pipeline.index.engine import Engine, open_faiss
from pipeline.index.files import fetch
from pipeline.index.memory import give_back
from pipeline.index.record import read_ids, read_record
from pipeline.index.vectors import Ids, Mask, Vectors, VectorStore, alive_flags, normalize, usable
from pipeline.storage import Storage
from pipeline.where import matching_ids

if TYPE_CHECKING:
    from cvt_model.inference import InferenceModel

_FEW = 100
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
    `where` is an SQL expression over the columns of embeddings/ (pipeline/where.py); the k nearest of the
    images for which it is true are found, and fewer only where there are fewer. Files of an index that lies
    elsewhere come from a cache on this machine. It stays on the version that was served when it was opened.

    Raises SearchError where there is no whole index, and for queries that it cannot answer.
    """

    def __init__(self, output: Storage) -> None:
        self._output = output
        self.record = read_record(output)
        self._shards = {shard.stem: shard for shard in self.record.shards}
        self._first_ids = [shard.first_id for shard in self.record.shards]
        ids = read_ids(output, self.record).combine_chunks()
        self._faiss_ids: Ids = ids.column("faiss_id").to_numpy()
        self._names = ids.column(schema.IMAGE_ID)
        self.engine = self._open()
        self._masks: dict[str, Mask] = {}
        give_back()

    def _open(self) -> Engine:
        record, output = self.record, self._output
        index = open_faiss(fetch(output, record.faiss_file, check=True), in_memory=record.in_memory)
        store = VectorStore(record.segments, record.dim, lambda file: fetch(output, file))
        if output.is_local:
            store.open_all()  # a later build may delete this version
        with_dead = index.ntotal > record.num_vectors
        alive = alive_flags(record.shards, record.next_id) if with_dead else None
        return Engine(index, store, record.settings, alive)

    def by_vector(self, vector: Vectors, k: int = 10, where: str | None = None) -> list[Hit]:
        """The k nearest images of one embedding (D,), not necessarily normalised, best first."""
        scores, ids = self.search(np.asarray(vector, np.float32).reshape(1, -1), k, where)
        return self._hits([int(n) for n in ids[0]], [float(x) for x in scores[0]])

    def nearest(
        self, vectors_QD: Vectors, k: int = 10, where: str | None = None
    ) -> list[list[tuple[str, float]]]:
        """For each of many embeddings the ids and cosines of its k nearest images, best first."""
        scores, ids = self.search(np.asarray(vectors_QD, np.float32), k, where)
        found = ids >= 0
        places = np.searchsorted(self._faiss_ids, ids[found])
        names = iter(self._names_at(places))
        return [
            [(next(names), float(score)) for score in row[kept]]
            for row, kept in zip(scores, found, strict=True)
        ]

    def nearest_of_ids(
        self, image_ids: Sequence[str], k: int = 10, where: str | None = None
    ) -> list[list[tuple[str, float]]]:
        """`nearest` for indexed images: each its own nearest, unless `where` leaves it out."""
        return self.nearest(self.vectors_of(image_ids), k, where)

    def vectors_of(self, image_ids: Sequence[str]) -> Vectors:
        """The unit vectors (N, D) of indexed images, by their ids."""
        found = self.faiss_ids_of(pa.array(image_ids, pa.string()))
        if (found < 0).any():
            raise self._unknown(image_ids[int(np.argmin(found))])
        return self.engine.store.take(found)

    def _unknown(self, image_id: str) -> SearchError:
        return SearchError(f"no image {image_id} in the index of {self._output.uri}; ids are exact")

    def faiss_ids_of(self, image_ids: pa.Array) -> Ids:
        """The faiss ids (N,) of images, -1 for those that are not in the index."""
        places = pc.fill_null(pc.index_in(image_ids, value_set=self._names), -1).to_numpy()
        return np.where(places < 0, -1, self._faiss_ids[places])

    def hits_of(self, scores: Mapping[str, float]) -> list[Hit]:
        """Hits for images whose scores are known, in their order."""
        ids = self.faiss_ids_of(pa.array(list(scores), pa.string()))
        return self._hits(ids.tolist(), list(scores.values()))

    def ids_of_shard(self, stem: str) -> tuple[pa.Array, Ids]:
        """The images of one commit that are in the index: their ids, and their faiss ids (N,)."""
        shard = self._shards.get(stem)
        if shard is None:
            return self._names[:0], self._faiss_ids[:0]
        first = int(np.searchsorted(self._faiss_ids, shard.first_id))
        some = slice(first, first + shard.num_vectors)
        return self._names[some], self._faiss_ids[some]

    def id_batches(self, rows: int) -> Iterator[tuple[list[str], Ids]]:
        """The indexed images, some at a time: their ids, and their faiss ids."""
        for start in range(0, len(self._faiss_ids), rows):
            yield self._names.slice(start, rows).to_pylist(), self._faiss_ids[start : start + rows]

    @property
    def image_ids(self) -> list[str]:
        """Every indexed image, in the index's order."""
        return self._names.to_pylist()  # type: ignore[no-any-return]

    def by_id(self, image_id: str, k: int = 10, where: str | None = None) -> list[Hit]:
        """The k nearest images of an indexed one, itself first unless `where` leaves it out."""
        place = pc.index(self._names, image_id).as_py()  # index_in would hash every id
        if place < 0:
            raise self._unknown(image_id)
        own = int(self._faiss_ids[place])
        scores, ids = self.search(self.engine.store.take(np.array([own])), k, where)
        ranked = [(int(n), float(score)) for n, score in zip(ids[0], scores[0], strict=True)]
        if where is None or self._mask(where)[own]:  # exact copies may rank before it
            ranked = [(own, ranked[0][1]), *(pair for pair in ranked if pair[0] != own)][: len(ranked)]
        return self._hits([n for n, _ in ranked], [score for _, score in ranked])

    def by_image(self, data: bytes, k: int = 10, where: str | None = None) -> list[Hit]:
        """The k nearest images of an encoded image. SearchError where it cannot be decoded."""
        return self.by_vector(self.embed(data), k, where)

    def search(self, vectors_QD: Vectors, k: int, where: str | None = None) -> tuple[Vectors, Ids]:
        """Cosines (Q, k) and faiss ids (Q, k), with -1 where a filter leaves fewer."""
        if vectors_QD.ndim != 2 or vectors_QD.shape[1] != self.record.dim:
            raise SearchError(f"the vector has {vectors_QD.shape[-1]} numbers, the index {self.record.dim}")
        if not usable(vectors_QD).all():
            raise SearchError("the vector is zero or not finite, so it has no neighbours")
        mask = None if where is None else self._mask(where)
        return self.engine.search(normalize(vectors_QD), min(k, self.record.num_vectors), only=mask)

    def _names_at(self, places: Ids) -> list[str]:
        if len(places) <= _FEW:
            return [self._names[place].as_py() for place in places.tolist()]
        return self._names.take(pa.array(places)).to_pylist()  # type: ignore[no-any-return]

    def _mask(self, where: str) -> Mask:
        """Which faiss ids the images have for which `where` is true; kept for the next query."""
        if where not in self._masks:
            files = [f"{EMBEDDINGS}/{shard.stem}.parquet" for shard in self.record.shards]
            found = self.faiss_ids_of(matching_ids(self._output, files, where))
            mask = np.zeros(self.record.next_id, np.bool_)
            mask[found[found >= 0]] = True
            self._masks = {where: mask}
        return self._masks[where]

    def embed(self, data: bytes) -> Vectors:
        """The embedding (D,) of an encoded image, as the output's own were made."""
        processor, fast = self.preprocessing
        try:
            image = decode_image(data, processor, DEFAULT_MAX_PIXELS, fast=fast)
        except ImageError as error:
            raise SearchError(f"the query is not a usable image: {error.message}") from error
        return self.embed_pixels(image.pixels)

    @property
    def preprocessing(self) -> tuple[CvtImageProcessor, bool]:
        """How images become pixels for `embed_pixels`, and whether by the fast way."""
        checkpoint, fingerprint = self._origin
        return checkpoint.processor, fingerprint.fast_decode

    def embed_pixels(self, pixels: npt.NDArray[np.uint8]) -> Vectors:
        """The embedding (D,) of pixels (H, W, 3) that were decoded by `preprocessing`."""
        return self._model(pixels[None]).embedding[0]  # type: ignore[no-any-return]

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
        pairs = [(n, score) for n, score in zip(ids, scores, strict=True) if n >= 0]
        for faiss_id, _ in pairs:
            by_shard[bisect_right(self._first_ids, faiss_id) - 1].append(faiss_id)
        rows: dict[int, dict[str, Any]] = {}
        for number, members in by_shard.items():
            rows |= self._rows(number, members)
        hits = []
        for faiss_id, score in pairs:
            row = dict(rows[faiss_id])
            hits.append(Hit(score=score, label_score=row.pop("score", None), **row))
        return hits

    def _rows(self, number: int, faiss_ids: list[int]) -> dict[int, dict[str, Any]]:
        """The committed rows of some ids of one shard; the id alone where the shard's file is gone."""
        shard = self.record.shards[number]
        places = np.searchsorted(self._faiss_ids, np.array(faiss_ids))
        names = self._names_at(places)
        wanted = dict(zip(names, faiss_ids, strict=True))
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
