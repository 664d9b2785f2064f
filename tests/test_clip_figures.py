"""The figures by hand, and each spoilt kind of clip failing the figure that is meant for it."""

import pytest
import torch
from torch import Tensor

from engine.clip_figures import (
    LEVEL,
    Ends,
    Figures,
    compare,
    ends,
    judder,
    measure,
    motion,
    persistence,
    recognised,
    variety,
    variety_ratio,
)

T, PERIOD = 32, 4
ROUNDING = 1e-6  # a few units of fp32 in correlations of 1


def pixels(*values: float, num_clips: int = 1) -> Tensor:
    """Clips of one grey pixel with these values over time."""
    return (
        torch.tensor(values, dtype=torch.float32)
        .reshape(1, -1, 1, 1, 1)
        .expand(num_clips, -1, 1, 1, 1)
    )


def drifting(num_clips: int = 8, num_frames: int = T, speed: float = 0.25) -> Tensor:
    """A plane wave per clip, of its own direction and phase, that drifts by `speed` radians a step.

    Labels of two classes: `LABELS`.
    """
    random = torch.Generator().manual_seed(0)
    phase_B, angle_B = torch.rand(2, num_clips, generator=random) * 2 * torch.pi
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    along_BHW = 0.8 * (
        angle_B.cos()[:, None, None] * x[None] + angle_B.sin()[:, None, None] * y[None]
    )
    t_T = speed * torch.arange(num_frames)
    wave_BTHW = torch.sin(along_BHW[:, None] + phase_B[:, None, None, None] + t_T[:, None, None])
    return 0.8 * wave_BTHW[:, :, None].expand(-1, -1, 3, -1, -1)


LABELS = torch.tensor([0, 1] * 4)


def still(video: Tensor) -> Tensor:
    return video[:, :1].expand_as(video)


def juddering(video: Tensor) -> Tensor:
    return video[:, ::PERIOD].repeat_interleave(PERIOD, dim=1)


def collapsed(video: Tensor) -> Tensor:
    return video[:2].repeat(len(video) // 2, 1, 1, 1, 1)  # of either class one


def shuffled(video: Tensor) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.stack([clip[torch.randperm(len(clip), generator=random)] for clip in video])


def moving_at_the_ends(video: Tensor) -> Tensor:
    """The middle stands still for the middle half of the steps and more."""
    times = torch.arange(T).clamp(max=6) + (torch.arange(T) - 25).clamp(min=0)
    return video[:, times]


def read(video: Tensor) -> Figures:
    return measure(video, LABELS, period=PERIOD, recognisers={})


def test_motion_is_of_the_middle_half() -> None:
    """Eight steps, of which four count: 1, 0, 3 and 0."""
    video = pixels(0, 9, 9, 10, 10, 7, 7, 7, 20)
    assert motion(video) == pytest.approx((0 + 1 + 0 + 3) / 4)
    # By phases of two steps: (0 + 0) / 2 and (1 + 3) / 2, and again their mean.
    assert motion(video, 2) == pytest.approx(1)
    # Steps 2, 3 and 4 of seven are the middle when the quarter is one step; 5 too.
    assert motion(pixels(0, 9, 10, 12, 15, 19, 24, 50)) == pytest.approx((1 + 2 + 3 + 4 + 5) / 5)


def test_phases_count_the_same_however_many_the_middle_holds() -> None:
    """32 frames, moving by 4 at every fourth step: the middle holds such a step 5 times of 17."""
    video = juddering(torch.arange(32.0).reshape(1, -1, 1, 1, 1))
    assert motion(video) == pytest.approx(4 * 5 / 17)
    assert motion(video, PERIOD) == pytest.approx(1)


def test_motion_is_a_mean_over_clips_channels_and_pixels() -> None:
    video = torch.zeros(2, 3, 2, 1, 2)
    video[1, 1, 0, 0, 1] = 8  # one of eight values leaps up, then down
    assert motion(video) == pytest.approx(1)


def test_ends_by_hand() -> None:
    """Eight steps: the first two 1 and 3, the middle 2 each, the last two 0 and 1."""
    video = pixels(0, 1, 4, 6, 8, 10, 12, 12, 13)
    assert ends(video) == pytest.approx(Ends(start=1, end=0.25))
    assert ends(video, period=2) == pytest.approx(Ends(start=1, end=0.25))
    assert ends(video, period=3) is None  # a quarter does not hold all phases
    assert ends(pixels(*[5.0] * 9)) == Ends(1, 1)


def test_judder_by_hand() -> None:
    """Steps 1, 1, 6 / 2, 1, 4: phases 1.5, 1 and 5; the median is 1.5."""
    video = pixels(0, 1, 2, 8, 10, 11, 15)
    assert judder(video, 3) == pytest.approx(5 / 1.5)
    # Of two phases, (1 + 6 + 1) / 3 and (1 + 2 + 4) / 3, the lower one.
    assert judder(video, 2) == pytest.approx(8 / 7)
    assert judder(video, 1) == 1
    assert judder(pixels(2, 2, 2, 2), 2) == 1


def test_persistence_by_hand() -> None:
    assert persistence(pixels(0, 1, 2, 3, 4)) == pytest.approx(2)
    assert persistence(pixels(0, 1, 1, 2, 2)) == pytest.approx(1 / (2 / 4))
    # Over two steps |3 - 0|, |0 - 4|; over one 4, 1, 4.
    assert persistence(pixels(0, 4, 3, 0)[:, :4]) == pytest.approx((3 + 4) / 2 / (8 / 3))
    assert persistence(pixels(0, 1, 0, 1, 0)) == pytest.approx(0, abs=LEVEL)
    assert persistence(pixels(3, 3, 3)) == 1


def test_persistence_of_independent_frames_is_1() -> None:
    """As |x[t] - x[s]| has one mean for all t and s; two means of N values each, deviation 0.8/√N,
    that share their frames."""
    noise = torch.randn(4, 8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    num = 4 * 6 * 3 * 16 * 16
    assert persistence(noise) == pytest.approx(1, abs=5 * 2 * 0.8 / num**0.5)


def test_variety_by_hand() -> None:
    """Directions after each clip's mean is taken: (-1, 1), (-2, 2), (1, -1) and (1, 1, -1, -1)."""
    same = torch.cat([pixels(0, 2), pixels(5, 9)])
    assert variety(same, None) == pytest.approx({0: 0}, abs=ROUNDING)
    opposite = torch.cat([pixels(0, 2), pixels(9, 7)])
    assert variety(opposite, None) == pytest.approx({0: 2})
    # Three pairs: correlations 1, -1 and -1.
    three = torch.cat([same, pixels(9, 7)])
    assert variety(three, None) == pytest.approx({0: 1 + 1 / 3})
    unrelated = torch.cat([pixels(0, 0, 2, 2), pixels(0, 2, 0, 2)])
    assert variety(unrelated, None) == pytest.approx({0: 1})


def test_variety_is_within_classes() -> None:
    """A class's one phase is another's opposite: each alone has no variety; one clip has none."""
    video = torch.cat([pixels(0, 2), pixels(9, 7), pixels(1, 4), pixels(3, 2), pixels(0, 1)])
    labels = torch.tensor([3, 5, 3, 5, 4])
    assert variety(video, labels) == pytest.approx({3: 0, 5: 0}, abs=ROUNDING)


def test_variety_against_pairs_one_by_one() -> None:
    video = torch.randn(5, 6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    video[3] = video[3, :1]  # stands still: correlates fully with all others
    total = 0.0
    for i in range(5):
        for j in range(5):
            if i != j:
                pair = torch.stack([(clip - clip.mean(0)).flatten() for clip in video[[i, j]]])
                total += 1 if 3 in (i, j) else torch.corrcoef(pair.double())[0, 1].item()
    assert variety(video, None)[0] == pytest.approx(1 - total / 20, abs=ROUNDING)


def test_a_flicker_below_one_level_is_no_direction() -> None:
    video = torch.cat([pixels(0, 1), pixels(1, 0)])
    assert variety(0.9 * 2 * LEVEL * video, None) == {0: 0}
    assert variety(1.1 * 2 * LEVEL * video, None) == pytest.approx({0: 2})


def test_variety_ratio_is_of_the_classes_that_both_have() -> None:
    assert variety_ratio({0: 0.2, 1: 0.4, 2: 9.0}, {0: 1.0, 1: 0.5, 7: 9.0}) == pytest.approx(0.4)
    assert variety_ratio({0: 0.2}, {1: 1.0}) is None


def test_recognised_is_a_share() -> None:
    def by_brightness(video: Tensor) -> Tensor:
        return (video.mean(dim=(1, 2, 3, 4)) > 0).long()

    video = torch.cat([pixels(-1, -1), pixels(1, 1), pixels(1, 1), pixels(1, -2)])
    assert recognised(by_brightness, video, torch.tensor([0, 1, 0, 0])) == 0.75
    # A set can be measured without classes; then nobody recognises anything.
    video = torch.cat([video, video], dim=1)
    labels = torch.tensor([0, 1, 0, 0])
    with_classes = measure(video, labels, period=1, recognisers={"bright": by_brightness})
    assert with_classes.recognised == {"bright": 0.75}
    assert measure(video, None, period=1, recognisers={"bright": by_brightness}).recognised == {}


def test_whole_clips_pass() -> None:
    """Steady motion in other directions: the other half's figures, as far as eight clips go."""
    real, other = read(drifting()), read(drifting(16)[8:])
    ratios = compare(other, real)
    assert ratios.motion == pytest.approx(1, abs=0.1)
    assert ratios.variety is not None
    assert ratios.variety > 0.5
    assert other.ends == pytest.approx(Ends(1, 1), abs=0.1)
    assert other.judder == pytest.approx(1, abs=0.1)
    # A sine by 2δ and by δ: sin δ / sin(δ/2) = 2 cos(δ/2), for steps of δ = 0.25 radians.
    assert other.persistence == pytest.approx(2 * torch.cos(torch.tensor(0.125)).item(), abs=0.02)


def test_still_clips_have_no_motion_and_no_variety() -> None:
    real, figures = read(drifting()), read(still(drifting()))
    assert compare(figures, real).motion == 0
    assert compare(figures, real).variety == 0


def test_motion_at_the_ends_does_not_fill_in() -> None:
    real, figures = read(drifting()), read(moving_at_the_ends(drifting()))
    assert compare(figures, real).motion == 0
    assert figures.ends is not None
    assert min(figures.ends) > 100


def test_juddering_clips_move_as_much_and_judder() -> None:
    """4 radians in four steps or at once; a sine of the larger step is a little shorter."""
    real, figures = read(drifting()), read(juddering(drifting()))
    assert compare(figures, real).motion == pytest.approx(1, abs=0.1)
    assert figures.judder > 100
    # Half the motion in the jumps: 1 + 4 of 1 to 1.
    figures = read((drifting() + juddering(drifting())) / 2)
    assert figures.judder == pytest.approx(5, rel=0.2)


def test_collapsed_clips_move_as_much_but_all_alike() -> None:
    real, figures = read(drifting()), read(collapsed(drifting()))
    assert compare(figures, real).motion > 0.5
    assert figures.variety == pytest.approx({0: 0, 1: 0}, abs=ROUNDING)
    assert figures.judder == pytest.approx(1, abs=0.1)


def test_shuffled_clips_do_not_go_on_in_the_next_step() -> None:
    real, figures = read(drifting()), read(shuffled(drifting()))
    assert figures.persistence == pytest.approx(1, abs=0.1)
    assert compare(figures, real).motion > 3
    # Made as slow as real clips they move as much, and only persistence tells.
    mean = drifting().mean(dim=1, keepdim=True)
    faint = mean + (shuffled(drifting()) - mean) / compare(figures, real).motion
    assert compare(read(faint), real).motion == pytest.approx(1)
    assert read(faint).judder < 1.5
    assert read(faint).persistence < 1.1


def test_clips_that_are_too_short() -> None:
    with pytest.raises(ValueError, match="one frame"):
        motion(pixels(1))
    with pytest.raises(ValueError, match="two steps"):
        persistence(pixels(1, 2))
