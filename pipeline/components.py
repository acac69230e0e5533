"""Connected components of a graph that arrives as edges: which rows hang together, whatever the order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


class Components:
    """Disjoint sets of the numbers 0 to `size` - 1. Memory: 8 bytes a number."""

    def __init__(self, size: int) -> None:
        self._parents = np.arange(size, dtype=np.int64)

    def join(self, left: Numbers, right: Numbers) -> None:
        """Put the two ends of each edge into one set.

        Each round hooks the larger root of an edge to the smaller; rounds go on until no edge lies between
        sets, which takes about as many as the logarithm of the longest chain.
        """
        while len(left):
            left_roots, right_roots = self.roots(left), self.roots(right)
            between = left_roots != right_roots
            left, right = left_roots[between], right_roots[between]
            np.minimum.at(self._parents, np.maximum(left, right), np.minimum(left, right))

    def roots(self, numbers: Numbers) -> Numbers:
        """The smallest number of each number's set, near enough to be the same for all of one set."""
        roots = self._parents[numbers]
        while True:
            above = self._parents[roots]
            if (above == roots).all():
                break
            roots = above
        self._parents[numbers] = roots
        return roots
