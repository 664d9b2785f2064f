"""Fidelity and diversity by nearest neighbours: precision, recall, density, coverage.

- precision, recall: Kynkäänniemi et al. (arXiv 1904.06991), equations 1 and 2. A clip is in a
  set's manifold where it is no farther from some clip of the set than that clip's k-th neighbour.
- density, coverage: Naeem et al. (arXiv 2002.09797), equations 3 and 4, on real manifolds only,
  which outliers among generated clips cannot widen.

Decided: "no farther" includes equality in all four, as in the first paper.

Shapes: N real clips, M generated, D features.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
_ROWS = 1024  # of distances in memory at a time


class Neighbourhoods(NamedTuple):
    """What each clip contributes; precision is `precise_M.mean()`, and so on for the others."""

    precise_M: Array
    """1 for generated clips in the real manifold."""
    recalled_N: Array
    """1 for real clips in the generated manifold."""
    density_M: Array
    """In how many real clips' neighbourhoods a generated clip is, over k."""
    covered_N: Array
    """1 for real clips that have a generated clip in their neighbourhood."""


def neighbourhoods(real_ND: ArrayLike, generated_MD: ArrayLike, k: int) -> Neighbourhoods:
    """All four with the `k`-th neighbour (the clip itself does not count).

    Raises ValueError where a set has not more than `k` clips.
    """
    real, generated = np.asarray(real_ND, np.float64), np.asarray(generated_MD, np.float64)
    if min(len(real), len(generated)) <= k:
        raise ValueError(
            f"the {k} nearest neighbours need {k + 1} clips or more in each set, not "
            f"{len(real)} and {len(generated)}"
        )
    # |x|² + |y|² - 2x·y of large equal numbers would lose what tells neighbours apart.
    middle_D = real.mean(axis=0)
    real, generated = real - middle_D, generated - middle_D
    real_radii_N, generated_radii_M = _radii(real, k), _radii(generated, k)
    precise_M, density_M = np.zeros(len(generated)), np.zeros(len(generated))
    recalled_N, covered_N = np.zeros(len(real)), np.zeros(len(real))
    for first in range(0, len(real), _ROWS):
        rows = slice(first, first + _ROWS)
        distances_nM = _distances(real[rows], generated)
        near_real = distances_nM <= real_radii_N[rows, None]
        precise_M = np.maximum(precise_M, near_real.any(axis=0))
        density_M += near_real.sum(axis=0) / k
        covered_N[rows] = near_real.any(axis=1)
        recalled_N[rows] = (distances_nM <= generated_radii_M[None, :]).any(axis=1)
    return Neighbourhoods(precise_M, recalled_N, density_M, covered_N)


def _radii(x_ND: Array, k: int) -> Array:
    """The distance to the k-th other clip, [N]."""
    radii = np.empty(len(x_ND))
    for first in range(0, len(x_ND), _ROWS):
        distances_nN = _distances(x_ND[first : first + _ROWS], x_ND)
        own = np.arange(len(distances_nN))
        distances_nN[own, first + own] = 0  # rounding must not put another clip before it
        radii[first : first + _ROWS] = np.partition(distances_nN, k, axis=1)[:, k]
    return radii


def _distances(x_nD: Array, y_MD: Array) -> Array:
    """Squared distances of features that are centred; what rounding leaves of copies' is 0."""
    squares_nM = np.square(x_nD).sum(axis=1)[:, None] + np.square(y_MD).sum(axis=1)[None, :]
    found = squares_nM - 2 * x_nD @ y_MD.T
    found[found <= 64 * np.finfo(np.float64).eps * squares_nM] = 0
    return found
