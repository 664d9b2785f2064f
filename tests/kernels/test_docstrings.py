"""The examples in the operators' docstrings do what they say."""

import doctest
from inspect import isfunction

import pytest
import torch

import kernels

SETTINGS = {"chosen", "implementations", "meta_as", "set_default", "use"}
OPERATORS = [
    name for name in kernels.__all__ if isfunction(getattr(kernels, name)) and name not in SETTINGS
]


@pytest.mark.parametrize("name", OPERATORS)
def test_the_example_is_true(name: str) -> None:
    torch.manual_seed(0)
    scope = {"torch": torch, "kernels": kernels}
    [example] = doctest.DocTestFinder(recurse=False).find(getattr(kernels, name), name, globs=scope)
    assert example.examples, f"kernels.{name} has no example"
    said: list[str] = []
    results = doctest.DocTestRunner().run(example, out=said.append)
    assert results.failed == 0, "".join(said)


def test_every_operator_is_among_them() -> None:
    assert {"frame_norm", "conv2d", "conv_gru", "upsample_conv", "spectral_normalize_all"} <= {
        *OPERATORS
    }
