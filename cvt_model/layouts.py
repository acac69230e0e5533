"""What a weight file calls the network's parameters, and the check that it holds exactly those.

What enters: our names (those of transformers' `CvtForImageClassification`) and a layout. What
leaves: the file's names, and errors in the file's names. It must not know how files are read.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cvt_model.errors import CheckpointError
from cvt_model.weights import (
    OPTIONAL_SUFFIX,
    Shape,
    Shapes,
    read_shapes,
    read_tensors,
    shortlist,
)

if TYPE_CHECKING:
    from torch import Tensor

Files = tuple[Path, ...]

STAGES_PREFIX = "cvt."  # of the stages' parameters inside CvtForImageClassification
HEAD = ("layernorm.weight", "layernorm.bias", "classifier.weight", "classifier.bias")


class Rule(NamedTuple):
    """One row of a rename table: a regular expression in our name, and what stands for it."""

    ours: str
    theirs: str


@dataclass(frozen=True)
class Layout:
    """A kind of weight file. Tensors are read under their own names, turned to torch's axes."""

    described_by: str  # what told the shape of the network; this and the remedy are for messages
    remedy: str
    rules: tuple[Rule, ...]  # applied to one of our names, one after the other
    read_shapes: Callable[[Files], Shapes]  # as stored
    read_tensors: Callable[[Files], "Iterator[tuple[str, Tensor]]"]
    shape_as_stored: Callable[[Shape], Shape]  # its own inverse for matrices

    def rename(self, key: str) -> str:
        """The file's name of one of our parameters."""
        for ours, theirs in self.rules:
            key = re.sub(ours, theirs, key)
        return key

    def holds(self, shapes: Shapes, prefix: str) -> bool:
        """Whether any parameter of a part of the head ("layernorm", "classifier") is there."""
        return any(self.rename(key) in shapes for key in HEAD if key.startswith(prefix))


def same_shape(shape: Shape) -> Shape:
    """As torch stores it."""
    return shape


TRANSFORMERS = Layout(
    described_by="config.json",
    remedy="give the config.json that was saved with these weights",
    rules=(),
    read_shapes=read_shapes,
    read_tensors=read_tensors,
    shape_as_stored=same_shape,
)
TRANSFORMERS_HEADLESS = replace(TRANSFORMERS, rules=(Rule(f"^{re.escape(STAGES_PREFIX)}", ""),))


def transformers_layout(shapes: Shapes) -> Layout:
    """Our own names; those that `CvtModel` alone wrote have no prefix."""
    prefixed = any(key.startswith(STAGES_PREFIX) for key in shapes)
    return TRANSFORMERS if prefixed else TRANSFORMERS_HEADLESS


def match_keys(
    source: str, layout: Layout, expected: Mapping[str, Shape], found: Shapes, ignored: tuple[str, ...]
) -> dict[str, str]:
    """Our name for each of the file's; `ignored` are ours that the file may hold besides.

    Raises CheckpointError where the file holds not exactly the network's parameters, naming in the
    file's own words all that is missing, unexpected or of another shape.
    """
    ours_of = {layout.rename(key): key for key in expected}
    shapes = {name: layout.shape_as_stored(expected[key]) for name, key in ours_of.items()}
    required = (name for name, key in ours_of.items() if not key.endswith(OPTIONAL_SUFFIX))
    missing = [name for name in required if name not in found]
    allowed = ours_of.keys() | {layout.rename(key) for key in ignored}
    misshapen = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in shapes.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{len(names)} {kind}: {shortlist(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", [name for name in found if name not in allowed]),
            ("of another shape", misshapen),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{source}: the weights do not fit {layout.described_by}; parameters "
            f"{'; '.join(problems)}; {layout.remedy}"
        )
    return ours_of
