"""Distances between feature sets: closed forms, torchmetrics, scipy, and what rounding may do."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from engine.evaluation.distances import (
    Frechet,
    KernelMMD,
    Moments,
    frechet_distance,
    moments,
)

Array = NDArray[np.float64]


def features(num: int, size: int, seed: int, shift: float = 0.0) -> Array:
    """Correlated normal features: [num, size]."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(size).normal(size=(size, size)) / math.sqrt(size)
    return random.normal(size=(num, size)) @ mixing + shift


def test_gaussians_of_known_moments() -> None:
    """With covariances that commute it is |m - n|² + Σ (√s - √r)²; s, r the eigenvalues."""
    rotation = scipy.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    s, r = np.array([4.0, 1, 0.25, 9, 0]), np.array([1.0, 1, 4, 0, 16])
    mean, other = np.arange(5.0), np.ones(5)
    found = frechet_distance(
        Moments(mean, rotation * s @ rotation.T), Moments(other, rotation * r @ rotation.T)
    )
    assert found == pytest.approx(15 + np.square(np.sqrt(s) - np.sqrt(r)).sum(), rel=1e-12)


def test_covariances_that_do_not_commute() -> None:
    """2x2: tr (S R)^(1/2) = √(tr SR + 2 √det SR)."""
    s, r = np.array([[2.0, 0.5], [0.5, 1]]), np.array([[1.0, -0.7], [-0.7, 3]])
    product = s @ r
    root = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    expected = np.trace(s) + np.trace(r) - 2 * root
    found = frechet_distance(Moments(np.zeros(2), s), Moments(np.zeros(2), r))
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("num", "other"), [(200, 150), (30, 12)])
def test_as_torchmetrics_and_scipy_have_it(num: int, other: int) -> None:
    """More clips than features (20), and fewer, where the covariances are singular.

    torchmetrics takes roots of the product's eigenvalues: ε of the largest becomes √ε.
    """
    x, y = features(num, 20, 1), features(other, 20, 2, shift=0.3)
    found = Frechet(x, y, unbiased=True)()
    first, second = (torch.from_numpy(each) for each in (x, y))
    theirs = _compute_fid(first.mean(0), first.T.cov(), second.mean(0), second.T.cov()).item()
    assert found == pytest.approx(theirs, rel=1e-6)
    if num > 20 < other:
        s, r = np.cov(x.T), np.cov(y.T)
        root = scipy.linalg.sqrtm(s @ r).real
        means = np.square(x.mean(0) - y.mean(0)).sum()
        assert found == pytest.approx(means + np.trace(s + r - 2 * root), rel=1e-9)


@pytest.mark.parametrize("unbiased", [True, False])
def test_both_forms_agree(unbiased: bool) -> None:
    """Products of clips, and covariances of features: 25 clips of 40 features, weighted too."""
    x, y = features(25, 40, 3), features(20, 40, 4, shift=100)
    weights = np.random.default_rng(0).integers(0, 3, size=25).astype(float)
    other = np.random.default_rng(1).integers(0, 3, size=20).astype(float)
    for w, v in ((None, None), (weights, other)):
        expected = frechet_distance(
            moments(x, unbiased=unbiased, weights_N=w), moments(y, unbiased=unbiased, weights_N=v)
        )
        assert Frechet(x, y, unbiased=unbiased)(w, v) == pytest.approx(expected, rel=1e-9)


def test_weights_repeat_clips() -> None:
    x, y = features(60, 10, 5), features(50, 10, 6)
    w = np.random.default_rng(2).integers(0, 4, size=60)
    v = np.random.default_rng(3).integers(0, 4, size=50)
    repeated, other = np.repeat(x, w, axis=0), np.repeat(y, v, axis=0)
    assert Frechet(x, y, unbiased=True)(w.astype(float), v.astype(float)) == pytest.approx(
        Frechet(repeated, other, unbiased=True)(), rel=1e-9
    )
    # All of one clip but two: too few for a root, so that resamples take the longer way.
    few = np.array([58.0, 1, 1] + [0] * 57)
    assert Frechet(x, y, unbiased=True)(few, None) == pytest.approx(
        Frechet(np.repeat(x, few.astype(int), axis=0), y, unbiased=True)(), rel=1e-6
    )
    covariance = moments(x, unbiased=True, weights_N=w.astype(float)).covariance_DD
    np.testing.assert_allclose(covariance, np.cov(repeated.T), rtol=1e-9, atol=1e-12)
    biased = moments(x, unbiased=False).covariance_DD
    np.testing.assert_allclose(biased, np.cov(x.T, bias=True), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("num", "size"), [(10, 300), (64, 32), (2, 5), (300, 300)])
def test_it_is_zero_for_the_same_and_never_negative(num: int, size: int) -> None:
    """Also where features are large and covariances singular: sqrtm has returned -341."""
    x = features(num, size, 7, shift=1000)
    scale = np.square(x - x.mean(0)).sum() / (num - 1)
    same = frechet_distance(moments(x, unbiased=True), moments(x[::-1], unbiased=True))
    for found in (Frechet(x, x[::-1], unbiased=True)(), same):
        assert 0 <= found <= 1e-9 * scale
    constant = np.ones_like(x)
    assert Frechet(constant, constant, unbiased=True)() == 0
    assert Frechet(constant, constant + 2, unbiased=True)() == pytest.approx(4 * size)


def test_the_mmd_is_torchmetrics_and_a_loop() -> None:
    x, y = features(12, 6, 8), features(9, 6, 9, shift=0.4)
    found = KernelMMD(x, y)()

    def mean(kernels: list[float]) -> float:
        return sum(kernels) / len(kernels)

    def k(a: Array, b: Array) -> float:
        return float((sum(i * j for i, j in zip(a, b, strict=True)) / 6 + 1) ** 3)

    expected = (
        mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
        + mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
        - 2 * mean([k(a, b) for a in x for b in y])
    )
    assert found == pytest.approx(expected, rel=1e-9)
    first, second = torch.from_numpy(x[:9]), torch.from_numpy(y)  # theirs takes equal numbers
    assert KernelMMD(x[:9], y)() == pytest.approx(poly_mmd(first, second).item(), rel=1e-9)


def test_the_mmd_is_unbiased() -> None:
    """The mean over disjoint samples of one distribution is 0 within 4 standard errors; the biased
    estimator would be off by the kernel's mean diagonal over N, more than 20 of them.
    """
    found = [KernelMMD(features(20, 8, s), features(20, 8, s + 1000))() for s in range(200)]
    error = np.std(found, ddof=1) / math.sqrt(200)
    assert abs(np.mean(found)) < 4 * error
    diagonal = np.power(np.square(features(1000, 8, 0)).sum(1) / 8 + 1, 3).mean()
    assert 2 * diagonal / 20 > 20 * error


def test_mmd_of_subsets() -> None:
    x, y = features(30, 6, 1), features(40, 6, 2, shift=1)
    mmd = KernelMMD(x, y)
    mean, deviation = mmd.of_subsets(10, 50, seed=0)
    assert mmd.of_subsets(10, 50, seed=0) == (mean, deviation)
    assert abs(mean - mmd()) < 4 * deviation / math.sqrt(50)
    assert mmd.of_subsets(30, 1, seed=0)[0] != mmd()  # 30 of the 40
    with pytest.raises(ValueError, match="subsets of 31"):
        mmd.of_subsets(31, 1, seed=0)


def test_the_bootstraps_mmd_leaves_out_copies() -> None:
    """Weights of two for each clip change nothing; with copies counted the value would rise."""
    x, y = features(10, 6, 1), features(10, 6, 2)
    twice = np.full(10, 2.0)
    assert KernelMMD(x, y)(twice, twice) == pytest.approx(KernelMMD(x, y)(), rel=1e-9)


def test_what_has_no_distance() -> None:
    x = features(5, 3, 0)
    with pytest.raises(ValueError, match="two clips or more"):
        Frechet(x[:1], x, unbiased=True)()
    with pytest.raises(ValueError, match="must be finite"):
        Frechet(x, np.full_like(x, math.nan), unbiased=True)
    with pytest.raises(ValueError, match="3 features against 2"):
        Frechet(x, x[:, :2], unbiased=True)
    with pytest.raises(ValueError, match="two different clips"):
        KernelMMD(x, x)(np.eye(5)[0] * 5, None)
