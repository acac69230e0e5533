"""Index types without lists of their own to merge: made, and written, as a whole in memory.

Flat is written anew each time. Others take new rows and keep dead ones, which a selector then leaves out.
Refine types take no ids: a row's place is its id, which is so since ids are dense.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from pipeline.index.vectors import Ids, VectorStore


def write_exact(store: VectorStore, live: Ids, path: Path) -> None:
    """A flat index of the live rows with their ids. Memory: the vectors once."""
    flat = faiss.IndexFlatIP(store.dim)
    index = faiss.IndexIDMap(flat)
    flat.codes.resize(len(live) * store.dim * 4)  # growing step by step would take twice as much
    flat.ntotal = len(live)
    target = faiss.rev_swig_ptr(flat.get_xb(), len(live) * store.dim).reshape(len(live), store.dim)
    done = 0
    for ids, vectors in store.blocks(live):
        target[done : done + len(ids)] = vectors
        done += len(ids)
    faiss.copy_array_to_vector(live, index.id_map)
    index.ntotal = len(live)
    faiss.write_index(index, str(path))


def with_ids(index: Any) -> Any:
    """A trained index, wrapped so that it takes ids where it does not by itself."""
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexRefine | faiss.IndexIDMap) or _takes_ids(inner):
        return index
    return faiss.IndexIDMap(index)


def add(index: Any, store: VectorStore, new: Ids) -> None:
    """Add the rows of these ids (ascending, following those that are in)."""
    positional = isinstance(faiss.downcast_index(index), faiss.IndexRefine)
    for ids, vectors in store.blocks(new):
        rows = np.ascontiguousarray(vectors)
        if positional:
            assert index.ntotal == ids[0], "a row's place is its id"
            index.add(rows)
        else:
            index.add_with_ids(rows, ids)


def remove(index: Any, dead: Ids) -> None:
    """Take rows out, where the type can; else they stay, and a selector leaves them out."""
    with contextlib.suppress(RuntimeError):  # FAISS's way to say that it does not know how
        index.remove_ids(dead)


def _takes_ids(index: Any) -> bool:
    if isinstance(index, faiss.IndexPreTransform):
        return _takes_ids(faiss.downcast_index(index.index))
    return isinstance(index, faiss.IndexIVF)
