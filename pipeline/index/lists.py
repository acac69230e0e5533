"""Inverted lists on disk: filled a part at a time, merged without ever being in memory as a whole.

FAISS stores an IVF index as its trained head, then every list's codes and ids (`ilar`). A part is such a
file of some rows; merging copies the parts' lists, memory-mapped, one list after the other into one file,
which FAISS reads or maps like any of its own. Dead ids are left out on the way. It costs the bytes of the
index once, and no memory in proportion to it.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from pipeline.index.vectors import Ids, Mask, Vectors

_EMPTY_LISTS_BYTES = 32  # "ilar", number of lists, code size, "sprs", an empty vector


def ivf_of(index: Any) -> Any:
    """The inverted-file index with plain lists inside `index`, or None where it is of another make.

    Plain lists alone or behind a vector transform take ids of one's own and can be merged on disk.
    """
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    if not isinstance(inner, faiss.IndexIVF):
        return None
    lists = faiss.downcast_InvertedLists(inner.invlists)
    plain = isinstance(lists, faiss.ArrayInvertedLists | faiss.OnDiskInvertedLists)
    return inner if plain else None


def empty_of(index: Any) -> Any:
    """The trained index without its lists, as a new index."""
    return faiss.deserialize_index(np.frombuffer(_head(index, 0) + _no_lists(index), np.uint8))


def fill(trained: Any, blocks: Iterable[tuple[Ids, Vectors]], num_rows: int) -> None:
    """Add the rows of `blocks`, `num_rows` in all, to an empty trained index.

    Rows are assigned to lists first and the lists made just as long as they need to be; growing step by
    step would take twice the memory. Rows are transformed twice rather than kept.
    """
    ivf = ivf_of(trained)
    kept = list(blocks)
    assigned = [_assign(ivf, _transformed(trained, vectors)) for _, vectors in kept]
    sizes = np.bincount(np.concatenate(assigned), minlength=ivf.nlist)
    lists = faiss.downcast_InvertedLists(ivf.invlists)
    for number in np.flatnonzero(sizes):
        lists.resize(int(number), int(sizes[number]))
        lists.resize(int(number), 0)
    for (ids, vectors), places in zip(kept, assigned, strict=True):
        rows = _transformed(trained, vectors)
        pointers = (faiss.swig_ptr(array) for array in (rows, ids, places))
        ivf.add_core(len(ids), *pointers)
    trained.ntotal = ivf.ntotal = num_rows


def merge(parts: Sequence[Path], target: Path, alive: Mask) -> tuple[int, float]:
    """Write one index of all parts' rows whose id is `alive`; returns their number and the imbalance.

    `alive` has a flag for every id there has been. Memory: a list at a time.
    """
    mapped = [faiss.read_index(str(part), faiss.IO_FLAG_MMAP) for part in parts]
    ivfs = [ivf_of(index) for index in mapped]
    num_lists, code_size = ivfs[0].nlist, ivfs[0].code_size
    chosen = [[alive[_ids(ivf, number)] for ivf in ivfs] for number in range(num_lists)]
    sizes = np.array([sum(int(mask.sum()) for mask in masks) for masks in chosen], np.uint64)
    total = int(sizes.sum())
    with target.open("wb") as file:
        file.write(_head(mapped[0], total))
        file.write(b"ilar" + struct.pack("<QQ", num_lists, code_size))
        file.write(b"full" + struct.pack("<Q", num_lists) + sizes.tobytes())
        for number, masks in enumerate(chosen):
            for ivf, mask in zip(ivfs, masks, strict=True):
                if mask.any():
                    file.write(np.ascontiguousarray(_codes(ivf, number)[mask]).data)
            for ivf, mask in zip(ivfs, masks, strict=True):
                if mask.any():
                    file.write(np.ascontiguousarray(_ids(ivf, number)[mask]).data)
    return total, imbalance_of(sizes)


def imbalance_of(sizes: Any) -> float:
    """How unevenly rows lie in lists: 1 where all are as long, 2 where a search reads twice as much."""
    lengths = np.asarray(sizes, np.float64)
    return float(len(lengths) * (lengths**2).sum() / max(lengths.sum(), 1) ** 2)


def _assign(ivf: Any, vectors: Vectors) -> Ids:
    return np.ascontiguousarray(ivf.quantizer.assign(vectors, 1).ravel())


def _transformed(index: Any, vectors: Vectors) -> Vectors:
    """The rows as the inner index takes them; on one thread, so that every build rounds alike."""
    outer = faiss.downcast_index(index)
    rows = np.ascontiguousarray(vectors)
    if isinstance(outer, faiss.IndexPreTransform):
        with one_thread():
            for number in range(outer.chain.size()):
                transform = faiss.downcast_VectorTransform(outer.chain.at(number))
                rows = np.ascontiguousarray(transform.apply(rows))
    return rows


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """FAISS on one thread."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _codes(ivf: Any, number: int) -> Any:
    length, size = ivf.invlists.list_size(number), ivf.code_size
    if not length:
        return np.empty((0, size), np.uint8)
    return faiss.rev_swig_ptr(ivf.invlists.get_codes(number), length * size).reshape(length, size)


def _ids(ivf: Any, number: int) -> Ids:
    length = ivf.invlists.list_size(number)
    if not length:
        return np.empty(0, np.int64)
    return faiss.rev_swig_ptr(ivf.invlists.get_ids(number), length)  # type: ignore[no-any-return]


def _no_lists(index: Any) -> bytes:
    ivf = ivf_of(index)
    assert ivf is not None
    return b"ilar" + struct.pack("<QQ", ivf.nlist, ivf.code_size) + b"sprs" + struct.pack("<Q", 0)


def _head(index: Any, num_rows: int) -> bytes:
    """The trained index as FAISS writes it, up to its lists, saying that it holds `num_rows`."""
    ivf = ivf_of(index)
    assert ivf is not None
    kept, counts = ivf.invlists, (index.ntotal, ivf.ntotal)
    empty = faiss.ArrayInvertedLists(ivf.nlist, ivf.code_size)
    owned = ivf.own_invlists
    try:
        ivf.own_invlists = False
        ivf.replace_invlists(empty, False)
        index.ntotal = ivf.ntotal = num_rows
        data: bytes = faiss.serialize_index(index).tobytes()
    finally:
        ivf.replace_invlists(kept, False)
        ivf.own_invlists = owned
        index.ntotal, ivf.ntotal = counts
    assert data[-_EMPTY_LISTS_BYTES:] == _no_lists(index), "FAISS writes its lists in another way"
    return data[:-_EMPTY_LISTS_BYTES]
