"""Distances between two sets of features: Fréchet's (FID, FVD) and the kernel MMD's (KID, KVD).

All statistics are float64. The classes here keep what many resamples of the same clips share: the
bootstrap (`bootstrap.py`) asks for a distance again under other weights, and a weight is how often
a clip was drawn.

Shapes: N, M clips in the two sets, D features.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class Moments(NamedTuple):
    """Mean and covariance of features."""

    mean_D: Array
    covariance_DD: Array


def moments(features_ND: ArrayLike, *, unbiased: bool, weights_N: Array | None = None) -> Moments:
    """Of features, each counted `weights_N` times; the weights' sum is the number of clips.

    `unbiased` divides by that number less one, as the original FVD does (TF-GAN); otherwise by the
    number, as StyleGAN's code does. Raises ValueError where too few clips are left to divide by.
    """
    x_ND = _features(features_ND)
    weights_N = np.ones(len(x_ND)) if weights_N is None else np.asarray(weights_N, np.float64)
    divisor = _divisor(weights_N, unbiased)
    mean_D = weights_N @ x_ND / weights_N.sum()
    centred_ND = (x_ND - mean_D) * np.sqrt(weights_N)[:, None]
    return Moments(mean_D, centred_ND.T @ centred_ND / divisor)


def frechet_distance(first: Moments, second: Moments) -> float:
    """Squared 2-Wasserstein distance of Gaussians: |m - n|² + tr S + tr R - 2 tr (S R)^(1/2).

    Heusel et al. (arXiv 1706.08500), equation 6. With S = A Aᵀ and R = B Bᵀ from eigenvectors, the
    last trace is the sum of AᵀB's singular values, so that nothing is squared on the way to a
    square root: covariances may be singular, and the result is never negative (what rounding
    leaves below 0 is 0). `scipy.linalg.sqrtm` has returned -341 here. Raises ValueError for
    values that are not finite, or shapes that differ.
    """
    mean_D = first.mean_D - second.mean_D
    a_Da, b_Db = _root(first.covariance_DD), _root(second.covariance_DD)
    cross = _nuclear_norm(a_Da.T @ b_Db)
    return _frechet(float(mean_D @ mean_D), np.square(a_Da).sum(), np.square(b_Db).sum(), cross)


class Frechet:
    """Fréchet distance of two sets of features, for any weights of their clips.

    Where the sets are no larger than D, only their products with each other are needed (a kernel
    form): no D x D matrix is made, and no rank is lost.
    """

    def __init__(self, first_ND: ArrayLike, second_MD: ArrayLike, *, unbiased: bool) -> None:
        first, second = _features(first_ND), _features(second_MD)
        if first.shape[1] != second.shape[1]:
            raise ValueError(f"{first.shape[1]} features against {second.shape[1]}")
        # Centred together, because differences of large equal numbers lose digits.
        middle_D = (first.mean(axis=0) + second.mean(axis=0)) / 2
        self._first_ND, self._second_MD = first - middle_D, second - middle_D
        self._unbiased = unbiased
        self._products_NM: Array | None = None
        if max(len(first), len(second)) <= first.shape[1]:
            self._products_NM = self._first_ND @ self._second_MD.T

    def __call__(self, weights_N: Array | None = None, weights_M: Array | None = None) -> float:
        """The distance; `weights` as in `moments`."""
        if self._products_NM is None:
            both = (
                moments(self._first_ND, unbiased=self._unbiased, weights_N=weights_N),
                moments(self._second_MD, unbiased=self._unbiased, weights_N=weights_M),
            )
            if weights_N is None and weights_M is None:
                return frechet_distance(*both)
            return _frechet_by_cholesky(*both)
        weights_N = np.ones(len(self._first_ND)) if weights_N is None else weights_N
        weights_M = np.ones(len(self._second_MD)) if weights_M is None else weights_M
        mean_D, trace, scale_N = self._parts(self._first_ND, weights_N)
        other_D, other_trace, scale_M = self._parts(self._second_MD, weights_M)
        centred_NM = (
            self._products_NM
            - (self._first_ND @ other_D)[:, None]
            - (self._second_MD @ mean_D)[None, :]
            + mean_D @ other_D
        )
        # Clips that were not drawn are rows of zeros.
        drawn = np.ix_(weights_N > 0, weights_M > 0)
        cross = _nuclear_norm((centred_NM * scale_N[:, None] * scale_M[None, :])[drawn])
        difference_D = mean_D - other_D
        return _frechet(float(difference_D @ difference_D), trace, other_trace, cross)

    def _parts(self, x_ND: Array, weights_N: Array) -> tuple[Array, float, Array]:
        """Mean, trace of the covariance, and what scales the centred rows to its root."""
        divisor = _divisor(weights_N, self._unbiased)
        mean_D = weights_N @ x_ND / weights_N.sum()
        trace = weights_N @ np.square(x_ND - mean_D).sum(axis=1) / divisor
        return mean_D, float(trace), np.sqrt(weights_N / divisor)


class KernelMMD:
    """Squared maximum mean discrepancy with the kernel (x·y / D + 1)³, unbiased.

    Bińkowski et al. (arXiv 1801.01401), equation 4: KID on Inception's features; KVD on I3D's
    (Unterthiner et al., arXiv 1812.01717). It may be negative. Under weights, pairs of a clip with
    itself are left out however often it was drawn: they would make every resample look far off.
    """

    def __init__(self, first_ND: ArrayLike, second_MD: ArrayLike) -> None:
        first, second = _features(first_ND), _features(second_MD)
        self._xx, self._yy = _cubic(first, first), _cubic(second, second)
        self._xy = _cubic(first, second)

    def __call__(self, weights_N: Array | None = None, weights_M: Array | None = None) -> float:
        """The discrepancy; `weights` as in `moments`. Raises ValueError for sets of one clip."""
        n = np.ones(len(self._xx)) if weights_N is None else weights_N
        m = np.ones(len(self._yy)) if weights_M is None else weights_M
        across = n @ self._xy @ m / (n.sum() * m.sum())
        return float(_within(self._xx, n) + _within(self._yy, m) - 2 * across)

    def of_subsets(self, size: int, num_subsets: int, seed: int) -> tuple[float, float]:
        """Mean and standard deviation (divided by `num_subsets`) over random subsets, as KID's
        authors report it. Raises ValueError where a set has fewer than `size` clips.
        """
        if size > min(len(self._xx), len(self._yy)):
            raise ValueError(f"subsets of {size} of {len(self._xx)} and {len(self._yy)} clips")
        random = np.random.default_rng(seed)
        found = []
        for _ in range(num_subsets):
            weights = [np.zeros(len(k)) for k in (self._xx, self._yy)]
            for each in weights:
                each[random.choice(len(each), size, replace=False)] = 1
            found.append(self(*weights))
        return float(np.mean(found)), float(np.std(found))


def _features(given: ArrayLike) -> Array:
    x_ND = np.asarray(given, dtype=np.float64)
    if x_ND.ndim != 2 or len(x_ND) == 0:
        raise ValueError(f"features must be [N, D], not {list(x_ND.shape)}")
    if not np.isfinite(x_ND).all():
        raise ValueError("features must be finite")
    return x_ND


def _divisor(weights_N: Array, unbiased: bool) -> float:
    divisor = float(weights_N.sum()) - unbiased
    if divisor <= 0:
        raise ValueError("an unbiased covariance needs two clips or more")
    return divisor


def _root(covariance_DD: Array) -> Array:
    """A of A Aᵀ; eigenvalues that are rounding errors are left out."""
    if not np.isfinite(covariance_DD).all():
        raise ValueError("covariances must be finite")
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    # √ would turn an error of ε into one of √ε, for each of D - rank directions.
    kept = values_D > len(values_D) * np.finfo(np.float64).eps * max(values_D[-1], 0)
    return vectors_DD[:, kept] * np.sqrt(values_D[kept])


def _frechet_by_cholesky(first: Moments, second: Moments) -> float:
    """`frechet_distance` in a quarter of the time, for resamples, of which there are hundreds.

    The eigenvalues of LᵀRL, S = L Lᵀ, are those of SR; their roots are sure to √ε of the largest,
    which the spread of resamples dwarfs. Singular covariances take the other way.
    """
    try:
        lower_DD = np.linalg.cholesky(first.covariance_DD)
    except np.linalg.LinAlgError:
        return frechet_distance(first, second)
    values_D = np.linalg.eigvalsh(lower_DD.T @ second.covariance_DD @ lower_DD)
    cross = float(np.sqrt(np.maximum(values_D, 0)).sum())
    mean_D = first.mean_D - second.mean_D
    trace, other_trace = (float(np.trace(each.covariance_DD)) for each in (first, second))
    return _frechet(float(mean_D @ mean_D), trace, other_trace, cross)


def _nuclear_norm(matrix: Array) -> float:
    return float(np.linalg.svd(matrix, compute_uv=False).sum()) if matrix.size else 0.0


def _frechet(means: float, trace: float, other_trace: float, cross: float) -> float:
    return float(means + max(trace + other_trace - 2 * cross, 0.0))


def _cubic(x_ND: Array, y_MD: Array) -> Array:
    return np.power(x_ND @ y_MD.T / x_ND.shape[1] + 1, 3)


def _within(kernel_NN: Array, weights_N: Array) -> float:
    """Mean of the kernel over pairs of different clips."""
    squares_N = np.square(weights_N)
    num_pairs = weights_N.sum() ** 2 - squares_N.sum()
    if num_pairs <= 0:
        raise ValueError("the MMD needs two different clips or more in each set")
    return float((weights_N @ kernel_NN @ weights_N - squares_N @ np.diag(kernel_NN)) / num_pairs)
