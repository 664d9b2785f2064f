"""Every kernel of every operator, at each configuration that it is launched with."""

from collections.abc import Iterator
from importlib import import_module

from kernels.compiled.variant import Variant

OPERATORS = ("conv_gru", "convolution", "frame_norm", "spectral_norm")


def variants() -> Iterator[Variant]:
    """Those of all operators. Importing them imports Triton."""
    for operator in OPERATORS:
        yield from import_module(f"kernels.compiled.{operator}").variants()
