"""What stage 2's networks keep for their backward pass, at the paper's size on the meta device."""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import kernels
from engine.configuration import Config, load_config
from engine.models import build_discriminators, build_generator, draw_frame_indices
from engine.planning.forward_pass import (
    generator_inputs,
    generator_saved_for_backward,
    saved_for_backward,
)

FILE = Path(__file__).parents[2] / "configs" / "kinetics600.yaml"
KINETICS = load_config(FILE)


def checkpointing(mode: str) -> Config:
    return load_config(FILE, [f"training.checkpointing={mode}"])


def test_bytes_per_sample() -> None:
    """bf16. Every convolution's input once, before its norm; operators one by one keep 6.5 times
    that, norms' insides in fp32 among it."""
    assert generator_saved_for_backward(KINETICS, 2) == 470_896_136
    with kernels.use("reference"):
        assert generator_saved_for_backward(KINETICS, 2) > 3_000_000_000


def test_bytes_per_sample_by_checkpointing() -> None:
    """Of the generator. "none" keeps a norm's result beside its input."""
    bytes_kept = [generator_saved_for_backward(checkpointing(m), 2) for m in ("none", "blocks")]
    assert bytes_kept == [847_203_848, 190_389_768]


def test_blocks_keep_their_inputs_only() -> None:
    """Counted by hand: 12 frames of 1024 channels at 4x4 (the first unit's the same at all times),
    and so on; at the end what to_rgb and tanh need. Else conditions and x_l, a thousandth."""
    num_frames, values = 12, 1024 * 4 * 4
    for size, channels in ((4, 1024), (8, 1024), (16, 1024), (32, 512), (64, 256)):
        num_inputs = 2 if size == 4 else 3  # of temporal, block1 and block2
        values += num_frames * size**2 * channels * num_inputs
    values += num_frames * 128**2 * 128
    expected = 2 * values + 4 * num_frames * 3 * 128**2
    assert expected <= generator_saved_for_backward(checkpointing("blocks"), 2) < 1.001 * expected


def discriminators_saved_for_backward(config: Config) -> int:
    stage, window = config.stages[2], config.upsampling(2)
    with torch.device("meta"):
        network = build_discriminators(config, 2)

        def forward(batch: int) -> Tensor:
            video = torch.empty(batch, stage.num_frames, 3, stage.resolution, stage.resolution)
            low = torch.empty(batch, window.num_frames, 3, *2 * (window.resolution,))
            frames = draw_frame_indices(
                batch, stage.num_frames, stage.discriminators.spatial_frames
            ).to("meta")
            scores: Tensor = network(video, torch.empty(batch, dtype=torch.long), low, frames).all
            return scores

        return saved_for_backward(forward)


def test_bytes_per_sample_of_the_discriminators() -> None:
    """Per video judged, of which a D update has two per sample. They have no norms to keep."""
    found = [discriminators_saved_for_backward(checkpointing(m)) for m in ("none", "norms")]
    assert found == [114_143_240, 114_143_240]
    assert discriminators_saved_for_backward(checkpointing("blocks")) == 20_772_872


def test_discriminators_blocks_keep_their_inputs_only() -> None:
    """Eight frames of 128x128, twelve of 64x64, and the six-channel windows of 32x32."""
    values = 0
    window = KINETICS.upsampling(2).num_frames
    for frames, size, rgb in ((8, 128, 3), (12, 64, 3), (window, 32, 6)):
        for channels in (rgb, *(96 * m for m in (1, 2, 4, 8, 16))):
            values += frames * size**2 * channels
            size = max(4, size // 2)
        values += frames * size**2 * 96 * 16  # the last block's result, after its ReLU
    found = discriminators_saved_for_backward(checkpointing("blocks"))
    assert 2 * values <= found < 1.05 * 2 * values, (found, 2 * values)


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
