"""Networks from a configuration, unrolled videos, training windows and joint training."""

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.configuration import Config, config_from_tree
from engine.errors import UserError
from engine.models import (
    ClipGenerator,
    GeneratorCascade,
    JointGenerator,
    UpsamplingGenerator,
    build_discriminators,
    build_generator,
    build_joint_generator,
    collect_statistics,
    draw_window_starts,
    norm_statistics,
    take_windows,
)
from engine.views import nearest_view

LABELS = torch.tensor([1, 3])


def tree() -> dict[str, Any]:
    def stage(resolution: int, num_frames: int, stride: int, temporal: str) -> dict[str, Any]:
        return {
            "resolution": resolution,
            "num_frames": num_frames,
            "frame_stride": stride,
            "generator": {
                "temporal": temporal,
                "channels": 4,
                "multipliers": [2, 1, 1],
                "latent_size": 16,
                "class_embedding_size": 6,
            },
            "discriminators": {"channels": 4, "multipliers": [1, 2]},
        }

    return {
        "name": "test",
        "data": {"num_classes": 5},
        "training": {"iterations": 1, "global_batch": 1, "micro_batch": 1},
        "stages": {
            1: stage(8, 5, 6, "conv_gru"),
            2: stage(16, 6, 3, "separable_conv"),
            3: stage(32, 6, 1, "separable_conv"),
        },
    }


def config(**data: Any) -> Config:
    raw = tree()
    raw["data"].update(data)
    return config_from_tree(raw, "test")


def cascade(num_stages: int = 3) -> GeneratorCascade:
    torch.manual_seed(0)
    stages = config()
    return GeneratorCascade([build_generator(stages, n) for n in range(1, num_stages + 1)], stages)


def latents(count: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 16) for _ in range(count)]


def test_networks_are_those_of_the_configuration() -> None:
    stages = config()
    first, third = build_generator(stages, 1), build_generator(stages, 3)
    assert isinstance(first, ClipGenerator)
    assert isinstance(third, UpsamplingGenerator)
    assert (third.low_resolution, third.frame_step, third.resolution) == (16, 3, 32)
    assert first.latent_size == 16
    assert first.embedding is not None
    assert build_discriminators(stages, 1).matching is None
    matching = build_discriminators(stages, 3).matching
    assert matching is not None
    assert (matching.low_resolution, matching.frame_step) == (16, 3)


def test_networks_obey_switches() -> None:
    raw = tree()
    raw["data"] = {}
    raw["stages"][2]["discriminators"]["matching"] = False
    raw["stages"][2]["training"] = {"precision": "bf16"}
    raw["stages"][2]["generator"]["temporal"] = "conv_gru"
    stages = config_from_tree(raw, "test")
    generator = build_generator(stages, 2)
    assert generator.embedding is None
    assert generator.compute_dtype == torch.bfloat16
    assert type(generator.units[0].temporal).__name__ == "RecurrentBlock"
    network = build_discriminators(stages, 2)
    assert network.matching is None
    assert network.spatial.tower.compute_dtype == torch.bfloat16
    assert network.spatial.tower.embedding is None
    assert build_generator(stages, 1).compute_dtype == torch.float32


@pytest.mark.parametrize(("num_frames", "first_frames"), [(12, 2), (13, 3), (1, 1), (40, 7)])
def test_generate_unrolls_to_any_length(num_frames: int, first_frames: int) -> None:
    """Each stage runs over the whole previous video; six frames come of one of stage 1."""
    stages, zs = cascade(), latents(3)
    video = stages.generate(zs, LABELS, num_frames)
    assert video.shape == (2, num_frames, 3, 32, 32)
    assert not video.requires_grad
    first, second, third = stages.generators
    with torch.no_grad():
        expected = first(zs[0], LABELS, first_frames)
        expected = third(zs[2], LABELS, second(zs[1], LABELS, expected))
    assert torch.equal(video, expected[:, :num_frames])


def test_generate_from_fewer_stages() -> None:
    assert cascade(1).generate(latents(1), LABELS, 7).shape == (2, 7, 3, 8, 8)
    assert cascade(2).generate(latents(2), LABELS, 7).shape == (2, 7, 3, 16, 16)
    with pytest.raises(ValueError, match="2 stages need as many latents, not 3"):
        cascade(2).generate(latents(3), LABELS, 7)


def test_statistics_of_all_stages_are_collected_at_once() -> None:
    stages, zs = cascade(), latents(3)
    collect_statistics(stages, lambda i: stages.generate(zs, LABELS, 13), 1)
    statistics = norm_statistics(stages)
    lengths = {key.split(".")[1]: len(value) for key, value in statistics.items()}
    assert lengths == {"0": 3, "1": 6, "2": 18}
    alone = stages.generate([z[:1] for z in zs], LABELS[:1], 13)
    # Convolutions round differently at another batch size.
    torch.testing.assert_close(alone, stages.generate(zs, LABELS, 13)[:1], rtol=0, atol=1e-3)


def test_windows_of_stage_2_are_cut_from_stage_1_clips() -> None:
    stages, zs = cascade(1), latents(1)
    with torch.no_grad():
        whole = stages.generators[0](zs[0], LABELS, 5)
    random = torch.Generator().manual_seed(0)
    starts = set()
    for _ in range(40):
        window = stages.sample_window(2, zs, LABELS, random)
        assert window.shape == (2, 3, 3, 8, 8)
        assert not window.requires_grad
        found = [
            [t for t in range(3) if torch.equal(window[b], whole[b, t : t + 3])] for b in range(2)
        ]
        assert all(len(f) == 1 for f in found)
        starts.add((found[0][0], found[1][0]))
    assert {s for s, _ in starts} == {0, 1, 2}  # all three places that fit
    assert any(a != b for a, b in starts)  # each sample its own


@pytest.mark.parametrize("temporal", ["conv_gru", "separable_conv"])
def test_windows_are_those_of_whole_clips_where_statistics_are_fixed(temporal: str) -> None:
    """Stage 1 then leaves out frames behind its last recurrence, which changes no other."""
    raw = tree()
    raw["stages"][1]["generator"]["temporal"] = temporal
    settings = config_from_tree(raw, "test")
    torch.manual_seed(0)
    stages, zs = GeneratorCascade([build_generator(settings, 1)], settings), latents(1)
    collect_statistics(stages, lambda i: stages.generate(zs, LABELS, 5), 1)
    with torch.no_grad():
        whole = stages.generators[0](zs[0], LABELS, 5)
    num_frames: list[int] = []
    last_norm = stages.generators[0].get_submodule("norm")
    last_norm.register_forward_pre_hook(
        lambda norm, inputs: num_frames.append(inputs[0].video.shape[1])
    )
    window = stages.sample_window(2, zs, LABELS, torch.Generator().manual_seed(5))
    starts = draw_window_starts(2, 5, 3, torch.Generator().manual_seed(5))
    torch.testing.assert_close(window, take_windows(whole, starts, 3), rtol=0, atol=1e-5)
    assert num_frames == [3 if temporal == "conv_gru" else 5]


def test_windows_of_one_unit_refuse_statistics_of_another_length() -> None:
    """No norm of it sees the whole clip."""
    raw = tree()
    raw["stages"][1]["generator"]["multipliers"] = [2]
    settings = config_from_tree(raw, "test")
    stages, zs = GeneratorCascade([build_generator(settings, 1)], settings), latents(1)
    collect_statistics(stages, lambda i: stages.generate(zs, LABELS, 9), 1)
    with pytest.raises(UserError, match="fixed for 9 frames, but the video has 5"):
        stages.sample_window(2, zs, LABELS)


def test_windows_of_stage_3_come_through_stage_2() -> None:
    stages, zs = cascade(2), latents(2)
    window = stages.sample_window(3, zs, LABELS, torch.Generator().manual_seed(5))
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        video = stages.generators[0](zs[0], LABELS, 5)
        video = take_windows(video, draw_window_starts(2, 5, 3, random), 3)
        video = stages.generators[1](zs[1], LABELS, video)
        expected = take_windows(video, draw_window_starts(2, 6, 2, random), 2)
    assert torch.equal(window, expected)
    with pytest.raises(ValueError, match="no input for stage 4 from 2 stages"):
        stages.sample_window(4, zs, LABELS)


def test_take_windows_refuses_none_and_passes_gradients() -> None:
    with pytest.raises(ValueError, match="window of 4 frames does not fit into 3"):
        draw_window_starts(2, 3, 4)
    video = torch.arange(12.0).view(2, 6, 1, 1, 1).requires_grad_()
    window = take_windows(video, torch.tensor([1, 3]), 2)
    assert window.flatten(1).tolist() == [[1, 2], [9, 10]]
    window.sum().backward()
    assert video.grad is not None
    assert video.grad.flatten(1).tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]]


def test_joint_generator_is_the_cascade_with_gradients() -> None:
    torch.manual_seed(0)
    joint = build_joint_generator(config(), 3)
    zs = latents(3)
    starts = joint.draw_window_starts(2, torch.Generator().manual_seed(5))
    low, video = joint(zs, LABELS, starts)
    assert low.shape == (2, 2, 3, 16, 16)
    assert video.shape == (2, 6, 3, 32, 32)
    stages = GeneratorCascade(list(joint.generators)[:2], config())
    window = stages.sample_window(3, zs[:2], LABELS, torch.Generator().manual_seed(5))
    assert torch.equal(low, window)
    torch.testing.assert_close(video, joint.generators[2](zs[2], LABELS, window))
    video.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in joint.generators[0].parameters())
    with pytest.raises(ValueError, match="one window start fewer"):
        joint(zs, LABELS, starts[:1])
    with pytest.raises(ValueError, match="at least two stages"):
        JointGenerator(list(joint.generators)[:1], config())


def test_stages_fit_their_discriminators() -> None:
    """The scores of a generated video with its x_l: shapes of one stage fit those of the next."""
    stages, zs = config(), latents(2)
    upsampler, network = build_generator(stages, 2), build_discriminators(stages, 2)
    low = cascade(1).sample_window(2, zs[:1], LABELS)
    scores = network(upsampler(zs[1], LABELS, low), LABELS, low, torch.tensor([[0, 5], [2, 3]]))
    assert [tuple(s.shape) for s in scores] == [(2, 2), (2, 6), (2, 3)]
    real = torch.rand(2, 6, 3, 16, 16)
    view = nearest_view(real, resolution=8, frame_step=2)
    assert network(real, LABELS, view, torch.tensor([[0, 5], [2, 3]])).all.shape == (2, 11)


def test_a_configured_x_l_reaches_whole_videos() -> None:
    """low_frames counts in windows and videos; edge_frames in videos, which `unroll` makes."""
    raw = tree()
    raw["stages"][2]["generator"] |= {"low_frames": "interpolate", "edge_frames": 2}
    cascade_config = config_from_tree(raw, "test")
    generators = [build_generator(cascade_config, number) for number in (1, 2)]
    first, second = generators
    assert isinstance(second, UpsamplingGenerator)
    assert (second.low_frames, second.edge_frames) == ("interpolate", 2)
    zs = [torch.randn(2, 16) for _ in range(2)]
    with torch.no_grad():
        low = first(zs[0], LABELS, 3)
        generated = GeneratorCascade(generators, cascade_config).generate(zs, LABELS, 6)
        assert torch.equal(generated, second.unroll(zs[1], LABELS, low))
        assert not torch.allclose(generated, second(zs[1], LABELS, low))
