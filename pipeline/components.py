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

        Each round hooks the larger root of an edge to the smaller one; rounds go on until no edge lies
        between sets.
        """
        while len(left):
            left_roots, right_roots = self.roots(left), self.roots(right)
            between = left_roots != right_roots
            left, right = left_roots[between], right_roots[between]
            hooked = np.maximum(left, right)
            np.minimum.at(self._parents, hooked, np.minimum(left, right))
            self.roots(hooked)  # all that this round put into chains, so that every step doubles

    def roots(self, numbers: Numbers) -> Numbers:
        """The smallest number of each number's set.

        Each step leads every one of `numbers` to where its parent's parent was: a chain of them takes as
        many steps as the logarithm of its length.
        """
        roots = self._parents[numbers]
        while True:
            above = self._parents[roots]
            if (above == roots).all():
                return roots
            self._parents[numbers] = roots = above
