"""Queries: images, ids or vectors in, hits out, as JSON, as a page or as Parquet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.errors import SearchError
from pipeline.gallery import Row, gallery_page
from pipeline.index.vectors import Vectors
from pipeline.originals import Originals
from pipeline.redact import scrub
from pipeline.search import Hit, Searcher
from pipeline.shards import IMAGE_SUFFIXES
from pipeline.storage import Storage

_QUERIES_AT_ONCE = 1024


def read_query(uri: str, output: Storage | None = None) -> bytes:
    """The bytes of a query image: a local file, or any URL that fsspec opens.

    A URL of the same service as the output is opened with the output's storage options.
    """
    place = Storage(uri, output.options_for(uri) if output else {})
    try:
        place.check_reachable()
        return place.read_bytes()
    except OSError as error:
        raise SearchError(f"cannot read the query image {place.uri}: {error}") from error


def read_vectors_file(path: Path) -> tuple[list[str], Vectors]:
    """Query vectors (N, D) and their names, from a .npy file (D,) or (N, D), or a Parquet file.

    A Parquet file has a column `embedding` of lists, and names its rows by `image_id` where it has one.
    Never loads a pickle. Raises SearchError.
    """
    return _from_parquet(path) if path.suffix.lower() in (".parquet", ".pq") else _from_npy(path)


def read_ids_file(path: Path) -> tuple[str, ...]:
    """Image ids from a text file, one a line; empty lines do not count."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SearchError(f"cannot read the ids {path}: {error}; expected text, one id a line") from error
    ids = tuple(line for line in lines if line.strip())
    if not ids:
        raise SearchError(f"{path}: no ids in it; expected one a line")
    return ids


def _from_npy(path: Path) -> tuple[list[str], Vectors]:
    try:
        vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise SearchError(
            f"cannot read the query vector {path}: {error}; expected a .npy or .parquet file"
        ) from error
    if not isinstance(vectors, np.ndarray):
        raise SearchError(f"{path}: expected a .npy file of one array, found several")
    if vectors.dtype.kind not in "fiu" or vectors.ndim not in (1, 2) or not vectors.size:
        raise SearchError(f"{path}: expected vectors of numbers, found {vectors.dtype}{vectors.shape}")
    rows = vectors.reshape(-1, vectors.shape[-1]).astype(np.float32)
    return _numbered(path, len(rows)), rows


def _from_parquet(path: Path) -> tuple[list[str], Vectors]:
    try:
        file = pq.ParquetFile(path)
        wanted = [name for name in (schema.IMAGE_ID, "embedding") if name in file.schema_arrow.names]
        if "embedding" not in wanted:
            raise SearchError(f"{path}: has no column embedding; its columns: {file.schema_arrow.names}")
        table = file.read(wanted).combine_chunks()
    except (OSError, pa.ArrowException) as error:
        raise SearchError(f"cannot read the query vectors {path}: {error}; expected Parquet") from error
    column = table.column("embedding")
    if not pa.types.is_list(column.type) and not pa.types.is_fixed_size_list(column.type):
        raise SearchError(f"{path}: expected embeddings of one length, found {column.type}")
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(lengths) != 1 or not lengths[0] or not pa.types.is_floating(column.type.value_type):
        raise SearchError(
            f"{path}: expected embeddings of one length, found {column.type} of {lengths[:5]}"
        )
    flat = pc.list_flatten(column).combine_chunks().to_numpy(zero_copy_only=False)
    names = table.column(schema.IMAGE_ID).to_pylist() if schema.IMAGE_ID in wanted else None
    return names or _numbered(path, len(column)), flat.reshape(len(column), -1).astype(np.float32)


def _numbered(path: Path, count: int) -> list[str]:
    return [str(path)] if count == 1 else [f"{path}#{number}" for number in range(count)]


@dataclass(frozen=True)
class Answer:
    """A query and what was found, for the terminal, for programs and as a page."""

    query: str
    hits: list[Hit]
    image: bytes | None
    output: Storage
    input_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        return {"query": self.query, "hits": [hit.to_json() for hit in self.hits]}

    def page(self) -> str:
        """A self-contained gallery of the query and its neighbours."""
        originals = Originals(self.output, self.input_options)
        note = f"{len(self.hits)} nearest images by cosine of their CvT embeddings, in {self.output.uri}"
        return gallery_page(f"Nearest to {self.query}", note, [self.row(originals)], originals.read)

    def row(self, originals: Originals) -> Row:
        """This answer in a gallery, with the query's own image where it can be had."""
        image, first = self.image, next(iter(self.hits), None)
        if image is None and first and first.image_id == self.query and first.shard and first.key:
            image = originals.read(first.shard, first.key)
        return Row(self.query, image, self.hits)


def gallery(answers: Sequence[Answer]) -> str:
    """A self-contained page of several answers."""
    if len(answers) == 1:
        return answers[0].page()
    output = answers[0].output
    originals = Originals(output, answers[0].input_options)
    note = f"Nearest images by cosine of their CvT embeddings, in {output.uri}"
    return gallery_page(
        f"{len(answers)} queries", note, [answer.row(originals) for answer in answers], originals.read
    )


@dataclass(frozen=True)
class Queries:
    """What was asked for: images (a file, a URL or a folder), ids, or a file of vectors."""

    images: tuple[str, ...] = ()
    image_ids: tuple[str, ...] = ()
    vectors: Path | None = None


def find(
    output: Storage,
    queries: Queries,
    *,
    k: int,
    where: str | None = None,
    input_options: Mapping[str, Any] | None = None,
) -> Iterator[Answer]:
    """Answer queries one by one.

    `input_options` are the storage options of the input, from which a page takes the originals. Raises
    SearchError at the first query that cannot be answered.
    """
    searcher, options = Searcher(output), input_options or {}
    for image in queries.images:
        for uri in _images_at(image, output):
            data = read_query(uri, output)
            yield Answer(scrub(uri), searcher.by_image(data, k, where), data, output, options)
    for image_id in queries.image_ids:
        yield Answer(image_id, searcher.by_id(image_id, k, where), None, output, options)
    if queries.vectors is not None:
        for name, vector in zip(*read_vectors_file(queries.vectors), strict=True):
            yield Answer(name, searcher.by_vector(vector, k, where), None, output, options)


def write_hits(
    output: Storage, queries: Queries, path: Path, *, k: int, where: str | None = None
) -> tuple[int, int]:
    """Answer many queries in batches, into a Parquet file of SEARCH_HITS; returns queries and hits.

    The file is there whole or not at all.
    """
    searcher = Searcher(output)
    counts = [0, 0]
    with (
        Storage(str(path.parent)).replacing(path.name) as local,
        pq.ParquetWriter(local, schema.SEARCH_HITS, compression="zstd") as writer,
    ):
        for names, vectors in _batches(searcher, queries, output):
            found = searcher.nearest(vectors, k, where)
            rows = [
                (name, rank, image_id, score)
                for name, hits in zip(names, found, strict=True)
                for rank, (image_id, score) in enumerate(hits, 1)
            ]
            named = [dict(zip(schema.SEARCH_HITS.names, row, strict=True)) for row in rows]
            writer.write_table(pa.Table.from_pylist(named, schema.SEARCH_HITS))
            counts[0] += len(names)
            counts[1] += len(rows)
    return counts[0], counts[1]


def _batches(
    searcher: Searcher, queries: Queries, output: Storage
) -> Iterator[tuple[Sequence[str], Vectors]]:
    for image in queries.images:
        for uri in _images_at(image, output):
            yield [scrub(uri)], searcher.embed(read_query(uri, output))[None]
    for start in range(0, len(queries.image_ids), _QUERIES_AT_ONCE):
        names = queries.image_ids[start : start + _QUERIES_AT_ONCE]
        yield names, searcher.vectors_of(names)
    if queries.vectors is not None:
        of_rows, vectors = read_vectors_file(queries.vectors)
        for start in range(0, len(of_rows), _QUERIES_AT_ONCE):
            some = slice(start, start + _QUERIES_AT_ONCE)
            yield of_rows[some], vectors[some]


def _images_at(uri: str, output: Storage) -> list[str]:
    """The image files of a local folder, or the file or URL itself."""
    folder = Path(uri)
    if "://" in uri or not folder.is_dir():
        return [uri]
    found = [
        str(folder / info.path)
        for info in Storage(uri).find()
        if info.path.lower().endswith(IMAGE_SUFFIXES)
    ]
    if not found:
        raise SearchError(f"{uri}: no image files in this folder")
    return found
