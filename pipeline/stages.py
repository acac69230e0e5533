"""What a worker of the cluster runs first: the reading of a shard, the model in its actor.

Leaves: CHUNKS. Imports little: whatever a worker imports keeps the first images waiting.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.errors import PipelineError
from pipeline.readers import read_shard
from pipeline.samples import ReadOptions
from pipeline.shards import Work

if TYPE_CHECKING:
    from pipeline.embed import Embedder


def read_work(batch: pa.Table, options: ReadOptions) -> Iterator[pa.Table]:
    """A shard's images as CHUNKS; `batch` has its Work, and how many images its first chunk has."""
    (item,) = batch.to_pylist()
    options = replace(options, first_images=item["first_images"])
    yield from read_shard(Work.from_json(item["spec"]), options)


class Embed:
    """The embedder inside its actor: torch is imported there, and not in the driver.

    What a user can mend is raised with the first chunk: Ray hands on a task's error, but of one in an
    actor's start the text alone.
    """

    def __init__(self, **options: Any) -> None:
        from pipeline.embed import Embedder, EmbedOptions

        self._embedder: Embedder | PipelineError
        try:
            self._embedder = Embedder(EmbedOptions(**options))
        except PipelineError as error:
            self._embedder = error

    def __call__(self, chunk: pa.Table) -> pa.Table:
        if isinstance(self._embedder, PipelineError):
            raise self._embedder
        return self._embedder(chunk)
