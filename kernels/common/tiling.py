"""Whole numbers for launch grids. Triton's own helpers are traceable, and 4 µs a call for it."""


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()
