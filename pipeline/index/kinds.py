"""Which FAISS index: from rows, dimension, memory and target to a type that keeps them, or a refusal.

| type | bytes a vector in memory | how it finds |
|---|---|---|
| exact | 4 D | looks at every vector |
| ivf_flat | 4 D + 8 | the nearest lists, exactly |
| ivf_sq8 | D + 8 | the nearest lists by 8-bit numbers; exact vectors on disk rank again |
| ivf_rabitq | D / 8 + 16 | the same by a bit a dimension (RaBitQ, arXiv 2405.12497) |
| opq_ivf_pq | D / 8 + 8 | the same by product quantization; far slower to train |
| hnsw | 4 D + 272 | a graph; only where asked for |

Lists that do not fit into the memory budget are searched where they lie, on disk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import faiss

from pipeline.config import IndexConfig
from pipeline.errors import ConfigError
from pipeline.index.lists import ivf_of

NAMES = ("exact", "ivf_flat", "ivf_sq8", "ivf_rabitq", "opq_ivf_pq", "hnsw")
EXACT_ROWS = 150_000
POINTS_PER_LIST = 40  # FAISS asks for 39 at least
_ROWS_PER_LIST = 48  # of which an eighth is never trained on
PART_BYTES = 2**28  # of vectors that a task turns into a part of the index at once
GRAPH_QUANTIZER_LISTS = 2**16

_ID_BYTES = 56  # a row of ids.parquet in memory, its flag and its place
_HNSW_LINK_BYTES = 272  # 2 * 32 links of 4 bytes at the lowest level, and the levels above
_TRAINING = 1.4  # of the sample; measured 1.2 to 1.35
_WORKING_BYTES = 160_000_000  # imported libraries, batches of Parquet, queries and candidates


@dataclass(frozen=True)
class Choice:
    """A type to build: its FAISS factory string, and whether its lists are held in memory."""

    type: str
    factory: str
    in_memory: bool
    num_training: int
    peak_bytes: int
    lists: bool


def choose(config: IndexConfig, rows: int, dim: int) -> Choice:
    """The type that `config` asks for or, for `auto`, the fastest one that keeps its budget and target.

    Raises ConfigError where nothing fits, naming the least budget and a type that would.
    """
    if config.type == "auto":
        candidates = _suitable(rows, dim, with_exact=rows <= EXACT_ROWS or config.target_recall == 1)
    else:
        candidates = [_planned(config.type, rows, dim, in_memory=True)]
        if candidates[0].lists:
            candidates.append(_planned(config.type, rows, dim, in_memory=False))
    fitting = [choice for choice in candidates if choice.peak_bytes <= config.memory_budget]
    if fitting:
        return fitting[0]
    raise ConfigError(_refusal(config, candidates, rows, dim))


def _suitable(rows: int, dim: int, *, with_exact: bool) -> list[Choice]:
    """What `auto` chooses from, the fastest first."""
    exact = [_planned("exact", rows, dim, in_memory=True)] if with_exact else []
    lists = [_planned(name, rows, dim, in_memory=True) for name in ("ivf_sq8", "ivf_rabitq")]
    return [*exact, *lists, _planned("ivf_rabitq", rows, dim, in_memory=False)]


def make(factory: str, dim: int) -> Any:
    """An untrained index of inner products by FAISS's factory. Raises ConfigError for other strings."""
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[-1].rpartition("Error: ")[2] or "not understood"
        raise ConfigError(
            f"index.type: {factory!r} is neither one of auto, {', '.join(NAMES)} nor a FAISS factory "
            f"string for {dim} dimensions ({reason[:200]})"
        ) from error


def deletes(choice: Choice) -> bool:
    """Whether deleted rows leave the index with the next version, instead of staying as dead ones."""
    return choice.type == "exact" or choice.lists


def part_rows(dim: int) -> int:
    """How many rows make a part of the index."""
    return max(1024, PART_BYTES // (4 * dim))


def _planned(name: str, rows: int, dim: int, *, in_memory: bool) -> Choice:
    factory = _factory(name, rows, dim)
    index = make(factory, dim)
    ivf, is_flat = ivf_of(index), isinstance(faiss.downcast_index(index), faiss.IndexFlat)
    names = rows * _ID_BYTES  # held by a search
    if ivf is None:
        code = 4 * dim + _HNSW_LINK_BYTES if "HNSW" in factory else int(index.sa_code_size())
        training = 0 if is_flat or "HNSW" in factory else min(rows, 100_000)
        peak = _WORKING_BYTES + max(rows * (code + 8) + names, training * 4 * dim * 3)
        return Choice(name, factory, True, training, peak, lists=False)
    training = min(rows, POINTS_PER_LIST * ivf.nlist)
    centroids = ivf.nlist * dim * 4 * (1.5 if "HNSW" in factory else 1)
    part = min(rows, part_rows(dim)) * (ivf.code_size + 24)
    held = rows * (ivf.code_size + 8) if in_memory else 0
    peak = _WORKING_BYTES + 2 * centroids + max(training * dim * 4 * _TRAINING, part, held + names)
    return Choice(name, factory, in_memory, training, int(peak), lists=True)


def _factory(name: str, rows: int, dim: int) -> str:
    lists = _num_lists(rows)
    coarse = f"IVF{lists}_HNSW32" if lists >= GRAPH_QUANTIZER_LISTS else f"IVF{lists}"
    pieces = next(count for count in range(max(1, dim // 8), 0, -1) if dim % count == 0)
    return {
        "exact": "Flat",
        "ivf_flat": f"{coarse},Flat",
        "ivf_sq8": f"{coarse},SQ8",
        "ivf_rabitq": f"RR{dim},{coarse},RaBitQ",
        "opq_ivf_pq": f"OPQ{pieces},{coarse},PQ{pieces}",
        "hnsw": "HNSW32,Flat",
    }.get(name, name)


def _num_lists(rows: int) -> int:
    """A power of two near twice the root of the rows, which balances finding lists and reading them."""
    lists: int = 2 ** max(0, round(math.log2(2 * math.sqrt(max(rows, 1)))))
    return max(1, min(lists, rows // _ROWS_PER_LIST))


def _refusal(config: IndexConfig, candidates: list[Choice], rows: int, dim: int) -> str:
    least = min(choice.peak_bytes for choice in candidates)
    others = [] if config.type == "auto" else _suitable(rows, dim, with_exact=True)
    fitting = next((other.type for other in others if other.peak_bytes <= config.memory_budget), None)
    remedy = f"index.memory_budget={math.ceil(least / 1e6)}MB is the least for it"
    if fitting is not None:
        remedy += f", and index.type={fitting} fits as it is"
    return (
        f"index.memory_budget: {rows:,} vectors of {dim} do not fit into "
        f"{config.memory_budget / 1e6:,.0f} MB as index.type={config.type}; {remedy}"
    )
