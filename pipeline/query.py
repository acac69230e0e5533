"""One query from a person: an image, an id or a vector in, hits out, as JSON or as a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import SearchError
from pipeline.gallery import Row, gallery_page
from pipeline.index.vectors import Vectors
from pipeline.originals import Originals
from pipeline.redact import scrub
from pipeline.search import Hit, Searcher
from pipeline.storage import Storage


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


def read_vector(path: Path) -> Vectors:
    """A query vector from a .npy file of shape (D,) or (1, D). Never loads a pickle."""
    try:
        vector = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise SearchError(f"cannot read the query vector {path}: {error}; expected a .npy file") from error
    if not isinstance(vector, np.ndarray):
        raise SearchError(f"{path}: expected a .npy file of one array, found several")
    if vector.dtype.kind not in "fiu" or vector.ndim not in (1, 2) or vector.size != vector.shape[-1]:
        raise SearchError(f"{path}: expected one vector of numbers, found {vector.dtype}{vector.shape}")
    return vector.ravel().astype(np.float32)


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
        originals, image, first = Originals(self.output, self.input_options), self.image, self.hits[0]
        if image is None and first.image_id == self.query and first.shard and first.key:
            image = originals.read(first.shard, first.key)
        row = Row(self.query, image, self.hits)
        note = f"{len(self.hits)} nearest images by cosine of their CvT embeddings, in {self.output.uri}"
        return gallery_page(f"Nearest to {self.query}", note, [row], originals.read)


def find(
    output: Storage,
    *,
    image: str | None,
    image_id: str | None,
    vector: Path | None,
    k: int,
    input_options: Mapping[str, Any] | None = None,
) -> Answer:
    """Answer one query: an image (file or URL), an indexed image's id, or a vector in a .npy file.

    `input_options` are the storage options of the input, from which a page takes the originals.
    """
    searcher, options = Searcher(output), input_options or {}
    if image is not None:
        data = read_query(image, output)
        return Answer(scrub(image), searcher.by_image(data, k), data, output, options)
    if image_id is not None:
        return Answer(image_id, searcher.by_id(image_id, k), None, output, options)
    assert vector is not None
    return Answer(str(vector), searcher.by_vector(read_vector(vector), k), None, output, options)
