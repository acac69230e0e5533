"""The pieces of a build that can run anywhere: in this process, or as Ray tasks over the cluster.

Each reads what earlier pieces left in storage, writes a file of its own, whole, and returns what it is
called and its checksum; one that was killed is run again and writes the same.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar

import faiss

from pipeline.index import lists
from pipeline.index.files import FileRef, fetch
from pipeline.index.vectors import Segment, VectorStore
from pipeline.storage import Storage

T = TypeVar("T")


class Runner(Protocol):
    """Calls a function for each tuple of arguments; results come in their order."""

    def __call__(self, function: Callable[..., T], items: Iterable[Sequence[Any]]) -> Iterator[T]: ...


def add_part(
    output: Storage, scratch: Storage, trained: FileRef, segment: Segment, first: int, count: int, dim: int
) -> FileRef:
    """Add `count` rows of a segment from row `first` on to an empty index; leaves a file of their lists."""
    index = faiss.read_index(str(fetch(scratch, trained)))
    store = VectorStore((segment,), dim, lambda file: fetch(output, file))
    rows = store.rows(0)[first : first + count]
    start = segment.first_id + first
    lists.fill(index, store.cut(rows, start), count)
    path = f"{trained.path.rpartition('/')[0]}/part-{start:012d}.faiss"
    with scratch.replacing(path) as local:
        faiss.write_index(index, str(local))
        return FileRef.of(path, local)


def in_this_process(function: Callable[..., T], items: Iterable[Sequence[Any]]) -> Iterator[T]:
    """One after the other, each on all cores."""
    for item in items:
        yield function(*item)


@contextlib.contextmanager
def runner(workers: Literal["auto"] | int) -> Iterator[tuple[Runner, bool]]:
    """How to run the pieces, and whether that may be on other machines."""
    if workers == "auto" and "RAY_ADDRESS" not in os.environ:
        yield in_this_process, False
        return
    from pipeline.cluster import Cluster  # Ray, which takes seconds to start

    cluster = Cluster(verbose=False)
    try:
        number = len(cluster.hosts) if workers == "auto" else workers
        yield cluster.tasks(number, "building the index"), True
    finally:
        cluster.close()
