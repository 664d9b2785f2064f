"""The least that an operator's two passes cost; each operator's is in the floor.py of its folder.

Bytes: everything that an operator is given or returns is read or written once, and what its
docstring says must be read again is counted again. FLOPs are two per multiply-add, of the folded
form where there is one: a share of the matmul rate is then of work that is really needed.
"""

from typing import NamedTuple


class Cost(NamedTuple):
    """Of one pass."""

    num_bytes: int
    flops: int

    def __add__(self, other: object) -> "Cost":
        """Both, one after the other."""
        if not isinstance(other, Cost):
            return NotImplemented
        return Cost(self.num_bytes + other.num_bytes, self.flops + other.flops)


class Floor(NamedTuple):
    """Of one call."""

    forward: Cost
    backward: Cost
