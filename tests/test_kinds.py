"""Which type is chosen, and what is refused."""

from __future__ import annotations

import re

import faiss
import pytest

from pipeline.config import IndexConfig
from pipeline.errors import ConfigError
from pipeline.index.kinds import NAMES, choose, make

MILLION = 1_000_000


def chosen(rows: int, dim: int, budget: str, kind: str = "auto", target: float = 0.95) -> tuple[str, bool]:
    config = IndexConfig.model_validate({"type": kind, "memory_budget": budget, "target_recall": target})
    choice = choose(config, rows, dim)
    assert choice.peak_bytes <= config.memory_budget
    return choice.type, choice.in_memory


@pytest.mark.parametrize(
    ("rows", "budget", "expected"),
    [
        (1_000, "4GB", ("exact", True)),
        (100_000, "4GB", ("exact", True)),
        (300_000, "2GB", ("ivf_sq8", True)),
        (MILLION, "4GB", ("ivf_sq8", True)),
        (MILLION, "1GB", ("ivf_sq8", True)),
        (MILLION, "400MB", ("ivf_rabitq", True)),
        (4 * MILLION, "600MB", ("ivf_rabitq", False)),
    ],
)
def test_auto_takes_the_fastest_type_that_keeps_the_budget(
    rows: int, budget: str, expected: tuple[str, bool]
) -> None:
    assert chosen(rows, 384, budget) == expected


def test_a_target_of_one_is_met_by_looking_at_everything() -> None:
    assert chosen(MILLION, 384, "4GB", target=1.0) == ("exact", True)


def test_what_cannot_fit_is_refused_with_the_least_budget_and_a_type_that_would() -> None:
    with pytest.raises(ConfigError, match=r"index\.type=ivf_rabitq fits") as refusal:
        chosen(MILLION, 384, "400MB", "hnsw")
    found = re.search(r"memory_budget=(\d+MB) is the least", str(refusal.value))
    assert found is not None
    assert chosen(MILLION, 384, found[1], "hnsw") == ("hnsw", True)
    with pytest.raises(ConfigError, match=r"is the least for it$"):
        chosen(MILLION, 384, "50MB")


@pytest.mark.parametrize("kind", [*NAMES, "IVF64,SQ4", "OPQ8_32,IVF64,PQ8", "IVF64,PQ8,RFlat"])
@pytest.mark.parametrize("dim", [7, 64, 384])
def test_every_name_is_a_faiss_index_for_any_width(kind: str, dim: int) -> None:
    if "PQ8" in kind and dim == 7:
        pytest.skip("a factory string of one's own has to suit the width")
    choice = choose(IndexConfig(type=kind), 10_000, dim)
    assert isinstance(make(choice.factory, dim), faiss.Index)


def test_lists_grow_with_the_root_of_the_rows() -> None:
    factories = [choose(IndexConfig(), rows, 64).factory for rows in (200_000, MILLION, 16 * MILLION)]
    assert factories == ["IVF1024,SQ8", "IVF2048,SQ8", "IVF8192,SQ8"]
