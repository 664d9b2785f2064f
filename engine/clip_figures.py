"""The figures that judge generated clips: do they move, evenly, as their class does, and variously?

Each figure catches one failure that people see at once and that losses, pixel distances and FVD
(content-debiased FVD, arXiv 2404.12391) can miss. None is enough alone: read them together, beside
the same figures of real clips and of spoilt ones (`report.py`).

This module knows tensors only, no networks and no files, so that the trainer can log these figures
too.

Shapes: B clips, T frames, S = T - 1 steps between frames, C channels, H x W pixels. Videos are
[B, T, C, H, W] with values in [-1, 1]; labels are [B] int64, or None where all clips are one class.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
"""BT.601's weights of R, G and B in luminance."""
LEVEL = 2 / 255
"""One 8-bit level, in units of [-1, 1]."""
_STILL = LEVEL / 100
"""What a mean step counts for at least, so that ratios of clips that stand still are finite."""


class Ends(NamedTuple):
    """Motion at a clip's two ends, as parts of the motion in its middle."""

    start: float
    end: float


def motion(video_BTCHW: Tensor, period: int = 1) -> float:
    """Mean of |x[t+1] - x[t]| over the middle half of the steps, in units of [-1, 1] per step.

    Catches clips that stand still, or jump about. Only the middle counts, because a network's first
    state and its zero padding can move the ends of a clip that is otherwise a picture (`ends`).
    With a `period`, the mean is over the steps of each phase, then over phases: which phases the
    middle happens to hold more of does not matter. Cannot see what moves, nor whether it goes
    anywhere: flicker is motion too (`persistence`).
    """
    steps_S = _step_sizes(video_BTCHW)
    quarter = len(steps_S) // 4
    return _mean_step(steps_S, quarter, len(steps_S) - quarter, period)


def ends(video_BTCHW: Tensor, period: int = 1) -> Ends | None:
    """Motion in the first and in the last quarter of the steps, each over that in the middle half.

    Both are near 1 in real clips. Catches motion that is only made from the padding at the ends,
    and clips that start or come to rest. Where nothing moves, both are 1. None for clips whose
    quarter is shorter than a `period`. Cannot see what happens in the middle.
    """
    steps_S = _step_sizes(video_BTCHW)
    num_steps, quarter = len(steps_S), len(steps_S) // 4
    if quarter < period:
        return None
    middle = _mean_step(steps_S, quarter, num_steps - quarter, period)
    start = _mean_step(steps_S, 0, quarter, period)
    end = _mean_step(steps_S, num_steps - quarter, num_steps, period)
    return Ends(_ratio(start, middle), _ratio(end, middle))


def judder(video_BTCHW: Tensor, period: int) -> float:
    """How much more the clip moves in one phase of `period` steps than in the median phase.

    The mean of |x[t+1] - x[t]| is taken for every phase t mod `period`; the largest is divided by
    the median (the lower one of two). A later stage repeats every frame of the stage before
    `period` times: judder catches motion that stays in jumps from one such frame to the next.
    1 is even, and what a `period` of 1 gives, and a still clip; with frames that only repeat it is
    very large (a step counts as a hundredth of an 8-bit level at least). Cannot see
    unevenness with another period, nor a clip that flickers at every step.
    """
    phases = _phase_means(_step_sizes(video_BTCHW), 0, period)
    return _ratio(phases.max().item(), phases.median().item())


def persistence(video_BTCHW: Tensor) -> float:
    """Mean of |x[t+2] - x[t]| over mean of |x[t+1] - x[t]|: does motion go on in the next step?

    2 where everything moves steadily, 1 where frames are independent, 0 where every second frame is
    the same. Catches flicker and frames in the wrong order, whatever their amount of motion. 1 for
    still clips. Cannot see anything slower than two steps.
    Raises ValueError for clips of fewer than three frames.
    """
    if video_BTCHW.shape[1] < 3:
        raise ValueError(f"{video_BTCHW.shape[1]} frames have no two steps")
    video_BTCHW = video_BTCHW.float()
    over_two = (video_BTCHW[:, 2:] - video_BTCHW[:, :-2]).abs().mean().item()
    return _ratio(over_two, _step_sizes(video_BTCHW).mean().item())


def variety(video_BTCHW: Tensor, labels_B: Tensor | None) -> dict[int, float]:
    """By class: 1 - mean correlation of what moves, over all pairs of the class's different clips.

    What moves is a clip minus its mean over time, flattened; that has zero mean, so the correlation
    is the cosine. 0 where all clips of a class move alike, 1 where their motion is unrelated. A
    clip that moves by less than one 8-bit level (root mean square) has no direction: its pairs
    count as correlated fully, so still clips have no variety. Catches a class whose
    clips all come out in one phase of one motion. Cannot see variety of colours and backgrounds
    that stand still; noise counts as variety (`persistence`). Classes with one clip are left out.
    """
    moving_BTCHW = video_BTCHW.float() - video_BTCHW.float().mean(dim=1, keepdim=True)
    moving_BN = moving_BTCHW.flatten(1)
    if labels_B is None:
        labels_B = torch.zeros(len(moving_BN), dtype=torch.int64)
    by_class = {}
    for label in sorted(set(labels_B.tolist())):
        of_class_bN = moving_BN[(labels_B == label).to(moving_BN.device)]
        if len(of_class_bN) > 1:
            by_class[label] = 1 - _mean_correlation(of_class_bN)
    return by_class


Recogniser = Callable[[Tensor], Tensor]
"""Videos [B, T, C, H, W] to the classes [B] that it takes them for."""


def recognised(recogniser: Recogniser, video_BTCHW: Tensor, labels_B: Tensor) -> float:
    """Share of clips that a classifier of real clips takes for what they shall be, in [0, 1].

    Catches classes that are mixed up or beyond recognition; by chance it is 1 / num classes.
    Cannot see what its classifier does not look at (`classifier.py`), nor a class whose clips are
    all the same. Compare with the real clips' share, which is below 1 where the classifier errs.
    """
    return (recogniser(video_BTCHW).cpu() == labels_B.cpu()).double().mean().item()


@dataclass(frozen=True)
class Figures:
    """All figures of one set of clips."""

    motion: float
    ends: Ends | None
    judder: float
    persistence: float
    recognised: dict[str, float]
    """By the classifier's name; empty without classes."""
    variety: dict[int, float]
    """By class."""


def measure(
    video_BTCHW: Tensor,
    labels_B: Tensor | None,
    *,
    period: int,
    recognisers: dict[str, Recogniser],
) -> Figures:
    """All figures; `period` is the number of frames made of one frame of stage 1."""
    shares = {}
    if labels_B is not None:
        shares = {name: recognised(r, video_BTCHW, labels_B) for name, r in recognisers.items()}
    return Figures(
        motion=motion(video_BTCHW, period),
        ends=ends(video_BTCHW, period),
        judder=judder(video_BTCHW, period),
        persistence=persistence(video_BTCHW),
        recognised=shares,
        variety=variety(video_BTCHW, labels_B),
    )


class Ratios(NamedTuple):
    """Figures that are read beside real clips', as parts of theirs: 1 is as much as theirs."""

    motion: float
    variety: float | None
    """Mean over the classes that both have pairs of; None where there are none."""
    least_variety: float | None
    """Of the class with the least: a mean hides one class that has collapsed."""


def compare(generated: Figures, real: Figures) -> Ratios:
    """Motion and variety as parts of those of real clips of the same length and classes."""
    return Ratios(
        motion_ratio(generated.motion, real.motion),
        variety_ratio(generated.variety, real.variety),
        _least_variety_ratio(generated.variety, real.variety),
    )


def motion_ratio(of: float, real: float) -> float:
    """A motion as part of the real one; finite where that stands still."""
    return of / max(real, _STILL)


def variety_ratio(by_class: dict[int, float], real_by_class: dict[int, float]) -> float | None:
    """Mean variety over the mean real one, of the classes that both have; None without any."""
    common = by_class.keys() & real_by_class.keys()
    real = sum(real_by_class[label] for label in common)
    return sum(by_class[label] for label in common) / real if real > 0 else None


def _least_variety_ratio(
    by_class: dict[int, float], real_by_class: dict[int, float]
) -> float | None:
    ratios = [
        by_class[label] / real
        for label, real in real_by_class.items()
        if label in by_class and real > 0
    ]
    return min(ratios, default=None)


def _step_sizes(video_BTCHW: Tensor) -> Tensor:
    """Mean of |x[t+1] - x[t]| over clips, channels and pixels, [S] float64 on the CPU."""
    if video_BTCHW.shape[1] < 2:
        raise ValueError("clips of one frame do not move")
    return video_BTCHW.float().diff(dim=1).abs().mean(dim=(0, 2, 3, 4)).double().cpu()


def _phase_means(steps_S: Tensor, first: int, period: int) -> Tensor:
    """Mean step of each phase that occurs; `first` is the number of the first step given."""
    phases_S = torch.arange(first, first + len(steps_S)) % period
    return torch.stack([steps_S[phases_S == phase].mean() for phase in phases_S.unique()])


def _mean_step(steps_S: Tensor, first: int, stop: int, period: int) -> float:
    """The mean of the steps from `first` to before `stop`; every phase counts the same."""
    return _phase_means(steps_S[first:stop], first, period).mean().item()


def _ratio(of: float, to: float) -> float:
    """One mean step over another of the same clips: 1 where both are still."""
    return max(of, _STILL) / max(to, _STILL)


def _mean_correlation(moving_BN: Tensor) -> float:
    num = len(moving_BN)
    norms_B = moving_BN.norm(dim=1)
    moves_B = norms_B >= LEVEL * moving_BN.shape[1] ** 0.5
    directions_MN = moving_BN[moves_B] / norms_B[moves_B, None]
    num_moving = len(directions_MN)
    # |Σd|² holds every pair twice, and every clip with itself once.
    of_moving = directions_MN.sum(dim=0).square().sum().item() - num_moving
    num_pairs = num * (num - 1)
    num_moving_pairs = num_moving * (num_moving - 1)
    return (of_moving + num_pairs - num_moving_pairs) / num_pairs
