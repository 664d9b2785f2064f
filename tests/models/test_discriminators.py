"""What each discriminator sees, how it scores, and that its parts can be switched off."""

from typing import Any, cast

import pytest
import torch
from small_networks import discriminators
from torch import Tensor
from torch.nn import functional as F

import kernels
from engine.models.blocks import DiscriminatorBlock
from engine.models.discriminators import (
    ResidualTower,
    TemporalDiscriminator,
    draw_frame_indices,
    stddev_within_classes,
)


def clip(batch: int = 2, num_frames: int = 4, resolution: int = 16) -> Tensor:
    torch.manual_seed(1)
    return torch.rand(batch, num_frames, 3, resolution, resolution) * 2 - 1


INDICES = torch.tensor([[0, 2, 3], [1, 3, 0]])
LABELS = torch.tensor([1, 3])


def test_scores_of_all_discriminators_together() -> None:
    torch.manual_seed(0)
    network = discriminators(num_classes=5)
    scores = network(clip(), LABELS, clip(2, 2, 8), INDICES)
    assert scores.matching is not None
    assert [s.shape for s in scores] == [(2, 3), (2, 4), (2, 2)]
    assert torch.equal(scores.all, torch.cat([scores.spatial, scores.temporal, scores.matching], 1))
    assert list(scores.by_name()) == ["spatial", "temporal", "matching"]


def test_without_matching_and_without_classes() -> None:
    network = discriminators(matching=False)
    scores = network(clip(), None, None, INDICES)
    assert scores.matching is None
    assert list(scores.by_name()) == ["spatial", "temporal"]
    assert scores.all.shape == (2, 7)
    with pytest.raises(ValueError, match="takes no labels"):
        network(clip(), LABELS, None, INDICES)
    with pytest.raises(ValueError, match="needs labels"):
        discriminators(num_classes=5)(clip(), None, clip(2, 2, 8), INDICES)
    with pytest.raises(ValueError, match="needs the low-resolution video"):
        discriminators()(clip(), None, None, INDICES)


def test_spatial_judges_each_chosen_frame_alone() -> None:
    torch.manual_seed(0)
    spatial, video = discriminators(num_classes=5).spatial, clip()
    scores = spatial(video, LABELS, INDICES)
    for b in range(2):
        for k, t in enumerate(INDICES[b].tolist()):
            alone = spatial(video[b : b + 1, t : t + 1], LABELS[b : b + 1], torch.tensor([[0]]))
            torch.testing.assert_close(scores[b, k], alone[0, 0])


def test_temporal_sees_the_whole_clip_at_half_its_resolution() -> None:
    torch.manual_seed(0)
    temporal, video = discriminators().temporal, clip(num_frames=7)
    scores = temporal(video, None)
    # Two 3x3x3 blocks of two convolutions reach four frames to either side.
    changed = video.clone()
    changed[:, 6] += 0.5
    differs = (temporal(changed, None) != scores).any(dim=0)
    assert differs.tolist() == [False, False, True, True, True, True, True]
    # A pattern that averages to nothing over 2x2 pixels cannot be seen.
    checkers = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(8, 8)
    torch.testing.assert_close(temporal(video + checkers, None), scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_frames", [1, 3])
def test_short_clips_keep_their_frames(num_frames: int) -> None:
    """Windows of three frames (Kinetics) must reach the scores: time is not pooled."""
    network = discriminators()
    assert network.temporal(clip(num_frames=num_frames), None).shape == (2, num_frames)
    assert network.matching is not None
    low = clip(2, num_frames, 8)
    assert network.matching(clip(num_frames=2 * num_frames), None, low).shape == (2, num_frames)


def test_matching_compares_the_view_with_x_l() -> None:
    torch.manual_seed(0)
    matching, video, low = discriminators().matching, clip(), clip(2, 2, 8)
    assert matching is not None
    scores = matching(video, None, low)
    unseen = video.clone()
    unseen[:, 1::2] = 0
    unseen[..., 1::2, :] = 0
    unseen[..., :, 1::2] = 0
    assert torch.equal(matching(unseen, None, low), scores)
    seen = video.clone()
    seen[..., ::2, ::2] += 0.1
    assert not torch.allclose(matching(seen, None, low), scores)
    assert not torch.allclose(matching(video, None, low + 0.1), scores)


def test_head_is_sum_pooling_and_projection() -> None:
    torch.manual_seed(0)
    tower = ResidualTower(
        in_channels=3,
        resolution=8,
        channels=4,
        multipliers=(1, 2),
        num_volumetric=0,
        num_classes=5,
        compute_dtype=torch.float32,
    )
    x = clip(resolution=8)
    h = x
    for block in tower.blocks:
        h = block(h)
    assert h.shape == (2, 4, 8, 4, 4)
    features = torch.relu(h).sum(dim=(3, 4))
    assert tower.embedding is not None
    classes = tower.embedding.normalized()[LABELS]
    assert tower.score.bias is not None
    torch.nn.init.constant_(tower.score.bias, 0.25)
    linear = features @ tower.score.normalized()[0] + 0.25
    expected = linear + (features * classes[:, None]).sum(dim=2)
    torch.testing.assert_close(tower(x, LABELS), expected)


@pytest.mark.parametrize("leading_relu", [False, True])
@pytest.mark.parametrize(
    ("volumetric", "pooling"),
    [(False, None), (False, (1, 2, 2)), (True, None), (True, (1, 2, 2)), (True, (2, 2, 2))],
)
def test_block(volumetric: bool, leading_relu: bool, pooling: kernels.Pooling | None) -> None:
    torch.manual_seed(0)
    block = DiscriminatorBlock(
        3, 5, volumetric=volumetric, leading_relu=leading_relu, pooling=pooling
    )
    for convolution in (block.conv1, block.conv2, block.shortcut):
        torch.nn.init.normal_(convolution.bias_in(None))
    x = torch.randn(2, 3, 3, 8, 8)
    conv = kernels.conv3d if volumetric else kernels.conv2d
    h = conv(F.relu(x) if leading_relu else x, *block.conv1.operands(torch.float32))
    h = conv(F.relu(h), *block.conv2.operands(torch.float32))
    h = h + kernels.conv2d(x, block.shortcut.normalized(), block.shortcut.bias)
    if pooling is not None:  # avg_pool3d takes [B, C, T, H, W]
        h = F.avg_pool3d(h.transpose(1, 2), pooling).transpose(1, 2)
    torch.testing.assert_close(block(x), h, check_stride=False)


def pooling(tower: ResidualTower) -> list[Any]:
    """Block by block."""
    return [block.end.resample for block in cast(list[DiscriminatorBlock], list(tower.blocks))]


def volumetric(tower: ResidualTower) -> list[bool]:
    """Block by block."""
    return [block.end.volumetric for block in cast(list[DiscriminatorBlock], list(tower.blocks))]


def test_blocks_of_a_tower() -> None:
    """No ReLU on pixels, two volumetric blocks, pooling down to 4x4 and never in the last."""
    temporal, spatial = discriminators().temporal.tower, discriminators().spatial.tower
    assert [b.leading_relu for b in temporal.blocks] == [False, True, True]
    assert volumetric(temporal) == [True, True, False]
    assert volumetric(spatial) == [False, False, False]
    assert pooling(spatial) == [(1, 2, 2), (1, 2, 2), None]  # 16 → 8 → 4
    assert pooling(temporal) == [(1, 2, 2), None, None]  # 8 → 4
    shallow = ResidualTower(
        in_channels=3,
        resolution=32,
        channels=4,
        multipliers=(1, 2),
        num_volumetric=0,
        num_classes=None,
        compute_dtype=torch.float32,
    )
    assert pooling(shallow) == [(1, 2, 2), None]  # the last never does


def test_time_is_pooled_where_asked_for_and_in_volumetric_blocks_only() -> None:
    torch.manual_seed(0)
    network = TemporalDiscriminator(
        resolution=64, channels=4, multipliers=(1, 2, 2, 2), pool_time=True
    )
    assert pooling(network.tower) == [(2, 2, 2), (2, 2, 2), (1, 2, 2), None]
    assert network(torch.randn(2, 12, 3, 64, 64), None).shape == (2, 3)


def test_bf16_scores_are_fp32_and_close() -> None:
    def run(dtype: torch.dtype) -> Tensor:
        torch.manual_seed(0)
        network = discriminators(num_classes=5, compute_dtype=dtype)
        scores: Tensor = network(clip(), LABELS, clip(2, 2, 8), INDICES).all
        scores.sum().backward()
        assert all(p.grad is not None for p in network.parameters())
        return scores

    exact, coarse = run(torch.float32), run(torch.bfloat16)
    assert coarse.dtype == torch.float32
    assert not torch.equal(exact, coarse)
    assert (exact - coarse).abs().max() < 0.05 * exact.abs().max()


def test_frames_are_drawn_without_replacement_and_repeatably() -> None:
    first, second = (draw_frame_indices(64, 10, 8, torch.Generator().manual_seed(3)) for _ in "ab")
    assert torch.equal(first, second)
    assert first.shape == (64, 8)
    assert all(len(set(row)) == 8 for row in first.tolist())
    assert first.unique().tolist() == list(range(10))
    assert len({tuple(sorted(row)) for row in first.tolist()}) > 16  # of 45 possible sets
    short = draw_frame_indices(5, 3, 8)
    assert [sorted(row) for row in short.tolist()] == [[0, 1, 2]] * 5


def test_spread_is_the_deviation_within_a_class_and_a_batch() -> None:
    """Two batches of four samples, one after the other; against numbers from torch.std."""
    torch.manual_seed(0)
    h = torch.randn(8, 2, 3, 4, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 0, 1, 0, 1, 2])
    spread = stddev_within_classes(h, labels, num_batches=2)
    for members in ([0, 2, 3], [4, 6]):
        expected = h[members].std(dim=0).expand(len(members), -1, -1, -1, -1)
        # Within what keeps the root's derivative finite.
        torch.testing.assert_close(spread[members], expected, rtol=0, atol=1e-3)
    # Alone in their class in their batch: 5 has no partner, though 0 has one in the other batch.
    assert (spread[[1, 5, 7]] == 0).all()
    torch.testing.assert_close(
        stddev_within_classes(h, None), h.std(dim=0).expand_as(h), rtol=0, atol=1e-3
    )


def test_spread_can_be_differentiated_where_samples_are_equal() -> None:
    h = torch.ones(4, 1, 2, 2, 2, requires_grad=True)
    stddev_within_classes(h, None).sum().backward()
    assert h.grad is not None
    assert (h.grad == 0).all()
    h64 = torch.rand(4, 1, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 1, 1])
    assert torch.autograd.gradcheck(lambda h: stddev_within_classes(h, labels), h64)


def test_minibatch_stddev_tells_a_collapsed_batch_from_a_varied_one() -> None:
    """One clip four times over scores unlike itself among others; without them, the same."""
    labels = torch.tensor([1, 1, 1, 1])
    indices = torch.tensor([[0, 1]] * 4)
    varied = clip(batch=4)
    collapsed = varied[:1].expand(4, -1, -1, -1, -1)
    for minibatch_stddev in (False, True):
        torch.manual_seed(0)
        network = discriminators(num_classes=5, matching=False, minibatch_stddev=minibatch_stddev)
        among_others = network(varied, labels, None, indices).all[0]
        alike = network(collapsed, labels, None, indices).all[0]
        differs = not torch.allclose(among_others, alike, rtol=1e-3, atol=1e-4)
        assert differs == minibatch_stddev
        # Reals and fakes in one pass are judged as they are in two.
        both = network(
            torch.cat([varied, collapsed]),
            labels.repeat(2),
            None,
            indices.repeat(2, 1),
            num_batches=2,
        ).all
        torch.testing.assert_close(both[0], among_others, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both[4], alike, rtol=1e-4, atol=1e-5)
