"""What generators depend on, where x_l enters, and that precision and checkpointing are exact."""

from typing import Any

import pytest
import torch
from small_networks import clip_generator, upsampling_generator
from torch import Tensor

import kernels
from engine.models import blocks
from engine.models.blocks import GeneratorBlock2D, GeneratorBlock3D, Temporal
from engine.models.features import Features
from engine.models.generator import ClipGenerator, GeneratorTrunk
from engine.models.layers import Injection, NoInjection, Shortcut
from engine.models.upsampler import UpsamplingGenerator, interpolate_frames, repeat_ends

BOTH = pytest.mark.parametrize("temporal", ["conv_gru", "separable_conv"])


def inputs(batch: int = 2, low_frames: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    low = torch.rand(batch, low_frames, 3, 8, 8) * 2 - 1
    return torch.randn(batch, 16), torch.arange(batch), low


@BOTH
def test_clip_of_any_length_depends_on_z_and_label(temporal: Temporal) -> None:
    torch.manual_seed(0)
    generator = clip_generator(num_classes=5, temporal=temporal)
    z, labels, _ = inputs()
    video = generator(z, labels, 3)
    assert video.shape == (2, 3, 3, 16, 16)
    assert video.abs().max() <= 1
    assert video.std() > 0.1
    assert generator(z, labels, 1).shape == (2, 1, 3, 16, 16)
    assert not torch.allclose(video, generator(z + 1, labels, 3))
    changed = generator(z, torch.tensor([0, 4]), 3)
    assert not torch.allclose(video[1], changed[1])


@BOTH
def test_upsampling_depends_on_z_label_and_every_frame_of_x_l(temporal: Temporal) -> None:
    torch.manual_seed(0)
    generator = upsampling_generator(num_classes=5, temporal=temporal)
    z, labels, low = inputs()
    video = generator(z, labels, low)
    assert video.shape == (2, 4, 3, 16, 16)
    assert not torch.allclose(video, generator(z + 1, labels, low))
    assert not torch.allclose(video[1], generator(z, torch.tensor([0, 4]), low)[1])
    for t in range(2):
        changed = low.clone()
        changed[:, t] += 0.5
        assert not torch.allclose(video[:, 2 * t], generator(z, labels, changed)[:, 2 * t])
    assert generator(z, labels, low[:, :1]).shape[1] == 2
    assert generator(z, labels, torch.cat([low] * 3, 1)).shape[1] == 12


def test_recurrent_generator_is_causal() -> None:
    """Frame t is the same whatever is generated after it; a separable conv looks ahead."""
    torch.manual_seed(0)
    z = inputs()[0]
    recurrent, separable = clip_generator(), clip_generator(temporal="separable_conv")
    torch.testing.assert_close(recurrent(z, None, 5)[:, :3], recurrent(z, None, 3))
    assert not torch.allclose(separable(z, None, 5)[:, :3], separable(z, None, 3))


def test_frames_differ_from_each_other() -> None:
    torch.manual_seed(0)
    video = clip_generator()(inputs()[0], None, 4)
    assert (video[:, 1:] - video[:, :-1]).abs().mean() > 1e-3


def parts(generator: GeneratorTrunk) -> list[Any]:
    """Every unit's temporal module and two blocks, in order."""
    units: list[Any] = list(generator.units)
    return [part for unit in units for part in (unit.temporal, unit.block1, unit.block2)]


def injections(generator: GeneratorTrunk) -> list[bool]:
    return [isinstance(part.injection, Injection) for part in parts(generator)]


@BOTH
def test_x_l_enters_wherever_the_output_is_no_larger(temporal: Temporal) -> None:
    # 4 → 8, 8 → 16, 16 → 16 pixels; x_l is 8x8.
    expected = [True, True, True, True, True, False, False, False, False]
    assert injections(upsampling_generator(temporal=temporal)) == expected
    assert not any(injections(clip_generator(temporal=temporal)))


def test_x_l_of_the_paper_enters_up_to_32_pixels() -> None:
    with torch.device("meta"):
        generator = UpsamplingGenerator(
            resolution=128,
            channels=8,
            multipliers=(8, 8, 4, 2, 1),
            temporal="separable_conv",
            low_resolution=32,
            frame_step=2,
        )
    assert injections(generator) == 11 * [True] + 4 * [False]


@BOTH
def test_every_injection_adds_the_projected_x_l(temporal: Temporal) -> None:
    """Each place receives 1x1conv(x_l), frames repeated, at its own size."""
    torch.manual_seed(0)
    generator = upsampling_generator(temporal=temporal)
    z, _, low = inputs()
    places = [part for part in parts(generator) if isinstance(part.injection, Injection)]
    records: list[tuple[Features, Tensor, Tensor, Features]] = []
    for part in places:
        part.register_forward_hook(lambda _, args, y: records.append((*args, y)))
    generator(z, None, low)
    assert len(records) == len(places) == 5
    for part, (x, cond, _, result) in zip(places, tuple(records), strict=True):
        y = result.video
        injection, part.injection = part.injection, NoInjection()
        without = part(x, cond, None).video
        weight, bias = injection.projection.operands(torch.float32)
        small = low[..., :: 8 // y.shape[-1], :: 8 // y.shape[-1]].repeat_interleave(2, dim=1)
        added = torch.einsum("btihw,oi->btohw", small, weight[:, 0, 0])
        torch.testing.assert_close(y, without + added + bias[:, None, None], check_stride=False)


def test_frames_between_two_of_x_l_lie_on_the_way() -> None:
    """A ramp 0, 3, 6 by three: every step is 1, and behind the last frame nothing is known."""
    ramp = torch.tensor([0.0, 3.0, 6.0]).reshape(1, 3, 1, 1, 1).expand(2, 3, 3, 2, 2)
    frames = interpolate_frames(ramp, 3)
    assert frames.shape == (2, 9, 3, 2, 2)
    expected = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 6, 6]).reshape(1, 9, 1, 1, 1)
    torch.testing.assert_close(frames, expected.expand_as(frames))
    assert torch.equal(interpolate_frames(ramp, 1), ramp)


def test_interpolated_x_l_is_what_would_be_injected_at_the_output_s_frames() -> None:
    """A generator that interpolates makes of x_l what one without a step makes of the frames."""
    torch.manual_seed(0)
    generator = upsampling_generator()
    z, _, low = inputs()
    repeated = generator(z, None, low)
    generator.low_frames = "interpolate"
    interpolated = generator(z, None, low)
    assert not torch.allclose(interpolated, repeated)
    generator.frame_step = 1
    torch.testing.assert_close(generator(z, None, interpolate_frames(low, 2)), interpolated)
    generator.low_frames = "repeat"
    torch.testing.assert_close(generator(z, None, low.repeat_interleave(2, 1)), repeated)


def test_unrolling_continues_x_l_by_its_first_and_last_frame() -> None:
    torch.manual_seed(0)
    generator = upsampling_generator()
    z, _, low = inputs()
    assert torch.equal(generator.unroll(z, None, low), generator(z, None, low))
    generator.edge_frames = 2
    by_hand = torch.cat([low[:, :1], low[:, :1], low, low[:, -1:], low[:, -1:]], 1)
    assert torch.equal(repeat_ends(low, 2), by_hand)
    unrolled = generator.unroll(z, None, low)
    assert unrolled.shape[1] == 2 * low.shape[1]
    assert torch.equal(unrolled, generator(z, None, by_hand)[:, 4:-4])
    # What is seen in training are windows, as they are.
    assert not torch.allclose(unrolled, generator(z, None, low))


def test_2d_block_is_what_the_paper_draws() -> None:
    torch.manual_seed(0)
    x, cond = torch.randn(2, 3, 6, 4, 4), torch.randn(2, 5)
    for upsample, out in ((False, 6), (False, 4), (True, 6)):
        block = GeneratorBlock2D(6, out, 5, upsample=upsample, inject=False)
        _scramble_biases(block)
        h = block.norm1(Features(x), cond).value()
        h, shortcut = (
            v.repeat_interleave(2, 3).repeat_interleave(2, 4) if upsample else v for v in (h, x)
        )
        h = Features(kernels.conv2d(h, *block.conv1.operands(torch.float32)))
        h = block.norm2(h, cond).value()
        h = kernels.conv2d(h, *block.conv2.operands(torch.float32))
        if upsample or out != 6:
            assert isinstance(block.shortcut, Shortcut)
            weight, bias = block.shortcut.normalized(), block.shortcut.bias
            shortcut = kernels.conv2d(shortcut, weight, bias)
        else:
            assert isinstance(block.shortcut, torch.nn.Identity)
        y = block(Features(x), cond, None).video
        torch.testing.assert_close(y, h + shortcut, check_stride=False)


def test_3d_block_is_residual() -> None:
    torch.manual_seed(0)
    x, cond = torch.randn(2, 3, 6, 4, 4), torch.randn(2, 5)
    block = GeneratorBlock3D(6, 5, inject=False)
    _scramble_biases(block)
    h = block.norm1(Features(x), cond).value()
    h = Features(kernels.separable_conv3d(h, *block.conv1.operands(torch.float32)))
    h = kernels.separable_conv3d(block.norm2(h, cond).value(), *block.conv2.operands(torch.float32))
    torch.testing.assert_close(block(Features(x), cond, None).video, h + x, check_stride=False)


def _scramble_biases(module: torch.nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)


@pytest.mark.parametrize("kind", ["clip", "upsampling"])
@BOTH
def test_bf16_computes_in_bf16_and_stays_close(kind: str, temporal: Temporal) -> None:
    def run(dtype: torch.dtype) -> tuple[Tensor, set[torch.dtype]]:
        torch.manual_seed(0)
        make: Any = clip_generator if kind == "clip" else upsampling_generator
        generator = make(num_classes=5, temporal=temporal, compute_dtype=dtype)
        seen: set[torch.dtype] = set()
        for unit in generator.units:
            unit.register_forward_hook(
                lambda _, args, y: seen.update((args[0].video.dtype, y.video.dtype))
            )
        z, labels, low = inputs()
        video = generator(z, labels, 4 if kind == "clip" else low)
        video.sum().backward()
        assert all(
            p.grad is not None and p.grad.dtype == torch.float32 for p in generator.parameters()
        )
        return video, seen

    exact, seen = run(torch.float32)
    assert seen == {torch.float32}
    coarse, seen = run(torch.bfloat16)
    assert seen == {torch.bfloat16}
    assert coarse.dtype == torch.float32
    assert not torch.equal(exact, coarse)
    # 2⁻⁸ per rounding, a random walk through some thirty of them: about 2 %.
    assert (exact - coarse).square().mean().sqrt() < 0.03


def test_wrong_inputs_are_named() -> None:
    z, labels, low = inputs()
    with pytest.raises(ValueError, match=r"z must be \[B, 16\]"):
        clip_generator()(torch.randn(2, 8), None, 3)
    with pytest.raises(ValueError, match="needs labels"):
        clip_generator(num_classes=5)(z, None, 3)
    with pytest.raises(ValueError, match="takes no labels"):
        clip_generator()(z, labels, 3)
    with pytest.raises(ValueError, match="x_l must be"):
        upsampling_generator()(z, None, low[..., :4])
    with pytest.raises(ValueError, match="cannot go from 4 to 32"):
        ClipGenerator(resolution=32, channels=4, multipliers=(2, 1), temporal="conv_gru")
    with pytest.raises(ValueError, match="was given none"):
        blocks.GeneratorBlock3D(4, 5, inject=True)(
            Features(torch.randn(1, 2, 4, 4, 4)), torch.randn(1, 5), None
        )
