"""What stage 2's generator keeps for its backward pass, at the paper's size on the meta device."""

from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
from benchmarks.accounting import generator_inputs, generator_saved_for_backward
from engine.configuration import load_config
from engine.models import build_generator

KINETICS = load_config(Path(__file__).parents[2] / "configs" / "kinetics600.yaml")


def test_bytes_per_sample() -> None:
    """bf16. Every convolution's input once, before its norm; operators one by one keep 6.5 times
    that, norms' insides in fp32 among it."""
    assert generator_saved_for_backward(KINETICS, 2) == 470_896_136
    with kernels.use("reference"):
        assert generator_saved_for_backward(KINETICS, 2) > 3_000_000_000


def test_no_convolution_is_computed_twice_for_it() -> None:
    """A backward pass is two products for each of the forward pass's, and no more."""
    with torch.device("meta"):
        generator = build_generator(KINETICS, 2)
        inputs = generator_inputs(KINETICS, 2, 1, generator.latent_size)
        with FlopCounterMode(display=False) as forward:
            y = generator(*inputs)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
    twice = 2 * forward.get_total_flops()
    # Nothing needs the gradient of z or x_l: a little less than twice.
    assert 0.99 * twice < backward.get_total_flops() <= twice
