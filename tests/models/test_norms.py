"""Conditional norms in their three modes, alone and inside a generator."""

from typing import Any

import pytest
import torch
from small_networks import clip_generator, upsampling_generator
from torch import Tensor, nn

import kernels
from engine.errors import UserError
from engine.models.features import Features
from engine.models.norms import (
    FrameNorm,
    collect_statistics,
    fix_norm_statistics,
    frame_norms,
    norm_statistics,
)


def test_condition_makes_gain_and_bias() -> None:
    torch.manual_seed(0)
    norm = FrameNorm(4, 3)
    x, cond = torch.randn(2, 3, 4, 5, 5), torch.randn(2, 3)
    gain = 1 + cond @ norm.gain.normalized().T
    bias = cond @ norm.bias.normalized().T
    torch.testing.assert_close(norm(Features(x), cond).value(), kernels.frame_norm(x, gain, bias))
    neutral = norm(Features(x), torch.zeros(2, 3)).value()
    torch.testing.assert_close(neutral, kernels.frame_norm(x, torch.ones(2, 4), torch.zeros(2, 4)))


def test_collected_statistics_are_those_of_all_passes_together() -> None:
    """Of equal passes, the mean of means and second moments is the union's mean and variance."""
    torch.manual_seed(0)
    norm = FrameNorm(4, 3)
    passes = [2 * torch.randn(2, 3, 4, 5, 5) + i for i in range(4)]
    collect_statistics(norm, lambda i: norm(Features(passes[i]), torch.zeros(2, 3)), 4)
    mean, var = kernels.frame_statistics(torch.cat(passes))
    assert norm.mean is not None
    assert norm.var is not None
    torch.testing.assert_close(norm.mean, mean)
    torch.testing.assert_close(norm.var, var)


def test_a_pass_that_collects_still_uses_its_own_batch() -> None:
    torch.manual_seed(0)
    norm = FrameNorm(4, 3)
    x, other, cond = torch.randn(2, 3, 4, 5, 5), torch.randn(2, 3, 4, 5, 5) + 5, torch.randn(2, 3)
    expected, outputs = norm(Features(x), cond).value(), []
    collect_statistics(
        norm, lambda i: outputs.append(norm(Features(x if i else other), cond).value()), 2
    )
    torch.testing.assert_close(outputs[1], expected)
    assert not outputs[1].requires_grad


def _generate(generator: nn.Module, z: Tensor, num_frames: int = 4) -> Tensor:
    video: Tensor = generator(z, None, num_frames)
    return video


def test_fixed_statistics_make_samples_independent_of_their_batch() -> None:
    torch.manual_seed(0)
    generator = clip_generator()
    z = torch.randn(3, 16)
    with torch.no_grad():
        assert not torch.allclose(_generate(generator, z)[:1], _generate(generator, z[:1]))
        collect_statistics(generator, lambda i: _generate(generator, torch.randn(4, 16)), 3)
        # Convolutions round differently at another batch size.
        torch.testing.assert_close(
            _generate(generator, z)[:1], _generate(generator, z[:1]), rtol=0, atol=1e-4
        )


def test_statistics_are_of_every_norm_and_survive_a_round_trip() -> None:
    torch.manual_seed(0)
    generator, z = clip_generator(), torch.randn(3, 16)
    assert norm_statistics(generator) == {}
    live = _generate(generator, z)
    collect_statistics(generator, lambda i: _generate(generator, torch.randn(4, 16)), 2)
    fixed, statistics = _generate(generator, z), norm_statistics(generator)
    assert len(statistics) == 2 * len(frame_norms(generator)) == 2 * (3 * 4 + 1)
    assert all(v.shape[0] == 4 for v in statistics.values())
    assert not any(k.endswith((".mean", ".var")) for k in generator.state_dict())
    fix_norm_statistics(generator, None)
    assert torch.equal(_generate(generator, z), live)
    fix_norm_statistics(generator, statistics)
    assert torch.equal(_generate(generator, z), fixed)
    assert not torch.allclose(fixed, live)


def test_fixed_statistics_refuse_another_length() -> None:
    generator = clip_generator()
    collect_statistics(generator, lambda i: _generate(generator, torch.randn(2, 16)), 1)
    with pytest.raises(UserError, match="fixed for 4 frames, but the video has 5"):
        _generate(generator, torch.randn(2, 16), num_frames=5)


def test_statistics_of_another_network_are_refused() -> None:
    generator = clip_generator()
    collect_statistics(generator, lambda i: _generate(generator, torch.randn(2, 16)), 1)
    statistics = norm_statistics(generator)
    with pytest.raises(UserError, match="not of this generator"):
        fix_norm_statistics(upsampling_generator(), statistics)
    statistics["norm.mean"] = statistics["norm.mean"][:, :-1]
    with pytest.raises(UserError, match="norm has 4 channels"):
        fix_norm_statistics(generator, statistics)


def test_failed_collection_leaves_batch_statistics() -> None:
    torch.manual_seed(0)
    generator, z = clip_generator(), torch.randn(2, 16)
    live = _generate(generator, z)

    def run_pass(i: int) -> None:
        _generate(generator, z)
        if i == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_statistics(generator, run_pass, 3)
    assert torch.equal(_generate(generator, z), live)
    _generate(generator, z, 5)  # no longer remembers: mixing lengths would be refused
    with pytest.raises(RuntimeError, match="no pass ran"):
        collect_statistics(generator, lambda i: None, 1)
    with pytest.raises(ValueError, match="of 4 and of 3 frames"):
        collect_statistics(generator, lambda i: _generate(generator, z, 4 - i), 2)
    assert torch.equal(_generate(generator, z), live)


def test_moments_are_asked_for_where_a_norm_takes_the_batchs_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    generator = upsampling_generator()
    z, low = torch.randn(2, 16), torch.randn(2, 2, 3, 8, 8)
    asked: list[bool] = []
    original = kernels.conv2d

    def recorded(x: Any, *args: Any, **named: Any) -> Any:
        if isinstance(x, kernels.Normalized):  # not a shortcut
            asked.append(x.wants_moments)
        return original(x, *args, **named)

    monkeypatch.setattr(kernels, "conv2d", recorded)
    generator(z, None, low)
    assert set(asked[:-1]) == {True}
    assert not asked[-1]  # to RGB, after which no norm comes
    asked.clear()
    # Also while statistics are collected, which are taken for themselves.
    collect_statistics(generator, lambda _: generator(z, None, low), 1)
    generator(z, None, low)
    assert set(asked) == {False}
