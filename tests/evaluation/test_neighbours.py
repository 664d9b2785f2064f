"""Precision, recall, density and coverage: by hand on a line, by a loop, and of Gaussians."""

import math

import numpy as np
import pytest

from engine.evaluation import neighbours
from engine.evaluation.neighbours import neighbourhoods


def line(*places: float) -> np.ndarray:
    return np.array(places)[:, None]


def test_by_hand() -> None:
    """k = 1. Real radii 1, 1, 3 (at 0, 1, 4); generated 0.5, 0.5, 18.5 (at 1, 1.5, 20)."""
    found = neighbourhoods(line(0, 1, 4), line(1, 1.5, 20), k=1)
    assert found.precise_M.tolist() == [1, 1, 0]
    assert found.density_M.tolist() == [3, 2, 0]
    assert found.covered_N.tolist() == [1, 1, 1]
    assert found.recalled_N.tolist() == [0, 1, 1]  # 4 is within 18.5 of 20


@pytest.mark.parametrize("rows", [1024, 7])
def test_as_a_loop_finds_it(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_ROWS", rows)
    random = np.random.default_rng(0)
    real, generated, k = random.normal(size=(23, 3)), random.normal(size=(17, 3)) + 0.7, 3
    radii = [sorted(math.dist(a, b) for b in real)[k] for a in real]
    others = [sorted(math.dist(a, b) for b in generated)[k] for a in generated]
    found = neighbourhoods(real, generated, k)
    near = [[math.dist(a, b) <= r for b in generated] for a, r in zip(real, radii, strict=True)]
    assert found.covered_N.tolist() == [float(any(row)) for row in near]
    assert found.precise_M.tolist() == [float(any(column)) for column in zip(*near, strict=True)]
    density = [sum(column) / k for column in zip(*near, strict=True)]
    assert found.density_M.tolist() == pytest.approx(density)
    recalled = [
        float(any(math.dist(a, b) <= r for b, r in zip(generated, others, strict=True)))
        for a in real
    ]
    assert found.recalled_N.tolist() == recalled
    assert 0 < sum(recalled) < 23


def test_of_one_distribution_and_of_far_ones() -> None:
    """Of one distribution density is 1 in expectation and coverage 1 - 2^-k (Naeem et al., section
    3.3); far apart, all are 0.
    """
    random = np.random.default_rng(1)
    real, generated = random.normal(size=(400, 6)), random.normal(size=(400, 6))
    found = neighbourhoods(real, generated, k=5)
    assert found.density_M.mean() == pytest.approx(1, abs=0.1)
    # Standard error √(0.031 · 0.969 / 400) = 0.009, and neighbours are not independent.
    assert found.covered_N.mean() == pytest.approx(1 - 2**-5, abs=0.03)
    assert [part.max() for part in neighbourhoods(real, generated + 100, k=5)] == [0] * 4


def test_copies_are_their_own_neighbours_only_once() -> None:
    """Also of large equal values, and where all generated clips are one."""
    real = np.random.default_rng(2).normal(size=(30, 4)) * 1e-4 + 1e6
    found = neighbourhoods(real, real.copy(), k=2)
    assert [part.min() for part in (found.precise_M, found.recalled_N, found.covered_N)] == [1] * 3
    one = neighbourhoods(real, real[:1].repeat(30, axis=0), k=2)
    assert (one.precise_M.min(), one.recalled_N.sum()) == (1, 1)
    apart = neighbourhoods(real, real + 0.01, k=2)
    assert apart.precise_M.max() == 0


def test_too_few() -> None:
    with pytest.raises(ValueError, match="the 3 nearest neighbours need 4 clips"):
        neighbourhoods(line(1, 2, 3), line(1, 2, 3, 4), k=3)
