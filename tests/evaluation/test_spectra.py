"""Power spectra of images whose spectra are known: plane waves, constants, white noise."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.clip_figures import LEVEL
from engine.evaluation.spectra import (
    Radius,
    frames_looked_at,
    power,
    radial_mean,
    spectra,
    spectral_distances,
)

SIDE = 32


def wave(across: float, down: float, side: int = SIDE) -> Tensor:
    """A plane wave of so many cycles per image, amplitude 1."""
    place = torch.arange(side, dtype=torch.float64) / side
    return torch.cos(2 * math.pi * (across * place[None, :] + down * place[:, None]) + 0.3)


def noise(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=torch.float64)


@pytest.mark.parametrize(("across", "down"), [(5, 0), (0, 5), (3, 4), (-4, 3), (6, 6), (16, 0)])
def test_a_plane_wave_has_its_power_at_its_radius(across: int, down: int) -> None:
    """cos² sums to N²/2: N²/4 at each of two frequencies, or all of it where they are the same.

    At 16 of 32 cycles both are one; a phase of 0.3 leaves cos²(0.3) of N² there.
    """
    found = power(wave(across, down))
    radius = round(math.hypot(across, down))
    at_nyquist = across == SIDE // 2
    total = SIDE**2 * (math.cos(0.3) ** 2 if at_nyquist else 0.5)
    assert found[down % SIDE, across % SIDE].item() == pytest.approx(
        total if at_nyquist else total / 2, rel=1e-9
    )
    means = radial_mean(found)
    assert len(means) == SIDE // 2 + 1
    num_at_radius = sum(
        round(math.hypot(u, v)) == radius
        for u in range(-SIDE // 2, SIDE // 2)
        for v in range(-SIDE // 2, SIDE // 2)
    )
    assert means[radius].item() == pytest.approx(total / num_at_radius, rel=1e-9)
    means[radius] = 0
    assert means.max().item() < 1e-20 * SIDE**4  # ε² of the FFT's largest value


def test_a_constant_is_all_at_radius_zero() -> None:
    means = radial_mean(power(torch.full((SIDE, SIDE), 0.5)))
    assert means[0].item() == pytest.approx(0.25 * SIDE**2)
    assert means[1:].abs().max().item() < 1e-20


@pytest.mark.parametrize("side", [8, 9, 32])
def test_parseval(side: int) -> None:
    image = noise(3, side, side)
    sums, squares = power(image).sum(dim=(-2, -1)), image.square().sum(dim=(-2, -1))
    torch.testing.assert_close(sums, squares, rtol=1e-12, atol=0)


def test_white_noise_is_flat() -> None:
    """Power at a frequency has mean s² and deviation s² (twice that of squares, where it is real).

    Of 400 images each radius but 0 has 4 frequencies or more in 2 independent pairs, so that its
    mean has a deviation of s²/√800 at most; 5 of them are allowed, of 16 radii.
    """
    means = radial_mean(power(2 * noise(400, SIDE, SIDE))).mean(dim=0)
    assert means[1:].sub(4).abs().max().item() < 5 * 4 / math.sqrt(800)


def test_as_a_loop_finds_it() -> None:
    """Frequencies and radii one by one, as rapsd's description says, on an odd and an even side."""
    for side in (6, 7):
        image = noise(side, side, seed=side)
        transformed = np.fft.fftshift(np.fft.fft2(image.numpy()))
        rings: dict[int, list[float]] = {}
        for row in range(side):
            for column in range(side):
                radius = round(math.hypot(row - side // 2, column - side // 2))
                rings.setdefault(radius, []).append(abs(transformed[row, column]) ** 2 / side**2)
        expected = [sum(rings[radius]) / len(rings[radius]) for radius in range(side // 2 + 1)]
        found = radial_mean(power(image))
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_only_squares_have_radii() -> None:
    with pytest.raises(ValueError, match="4x6 pixels"):
        radial_mean(torch.ones(4, 6))


def test_of_videos_it_is_luminance_of_the_frames_asked_for() -> None:
    """Green weighs 0.587; frame 1 holds the wave, frame 0 nothing; clips are averaged."""
    video = torch.zeros(2, 3, 3, SIDE, SIDE, dtype=torch.float64)
    video[0, 1, 1] = wave(4, 0)
    found = spectra(video, [0, 1])
    assert found.shape == (2, SIDE // 2 + 1)
    assert found[0].abs().max() == 0
    torch.testing.assert_close(found[1], 0.587**2 * radial_mean(power(wave(4, 0))) / 2)


def test_distances() -> None:
    real = torch.ones(2, 5)
    other = real.clone()
    other[0, 0] = 1e6  # brightness, which does not count
    assert spectral_distances(other, real)[0] == 0
    other[1, 2] = 100  # two decades at one of four radii
    assert spectral_distances(other, real)[1] == pytest.approx(math.sqrt(2**2 / 4))
    assert spectral_distances(10 * real, real) == pytest.approx([1, 1])


def test_nothing_is_as_little_as_rounding_to_8_bits() -> None:
    rounding = torch.full((1, 5), LEVEL**2 / 12)
    assert spectral_distances(torch.zeros(1, 5), rounding) == [0]
    assert spectral_distances(rounding, 1000 * rounding) == pytest.approx([3], rel=1e-5)


@pytest.mark.parametrize(
    ("num_frames", "num", "expected"),
    [(16, 4, [0, 5, 10, 15]), (8, 8, list(range(8))), (3, 4, [0, 1, 2]), (1, 4, [0])],
)
def test_frames_looked_at(num_frames: int, num: int, expected: list[int]) -> None:
    assert frames_looked_at(num_frames, num) == expected


@pytest.mark.parametrize("radius", ["rounded", "floored"])
@pytest.mark.parametrize("side", [7, 16])
def test_both_conventions_of_the_radius(radius: Radius, side: int) -> None:
    """Against loops over the frequencies; the two differ."""
    image = noise(side, side)
    transformed = np.abs(np.fft.fft2(image.numpy())) ** 2 / side**2
    whole: Any = np.round if radius == "rounded" else np.floor
    found: dict[int, list[float]] = {}
    for row in range(side):
        for column in range(side):
            cycles = [n if n <= (side - 1) // 2 else n - side for n in (row, column)]
            at = int(whole(np.sqrt(cycles[0] ** 2 + cycles[1] ** 2)))
            found.setdefault(at, []).append(transformed[row, column])
    expected = [np.mean(found[at]) for at in range(side // 2 + 1)]
    means = radial_mean(power(image), radius)
    np.testing.assert_allclose(means, expected, rtol=1e-12)
    others = radial_mean(power(image), "floored" if radius == "rounded" else "rounded")
    assert not torch.allclose(means, others)
