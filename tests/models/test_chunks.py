"""A video made in chunks is the video made at once, whatever the chunks."""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
from test_cascade import tree
from torch import Tensor

from engine.configuration import config_from_tree
from engine.models import (
    ClipGenerator,
    GeneratorCascade,
    UpsamplingGenerator,
    build_generator,
    collect_statistics,
)
from engine.models.chunks import (
    ClipState,
    clip_chunks,
    continue_clip,
    cut_at,
    halo_of,
    statistics_rows,
)
from engine.models.layers import ConvGRU
from engine.models.norms import frame_norms
from engine.models.spectral import spectral_weights, update_spectral_norm
from engine.planning.counters import Phases, Update, UpdateBytes

LABELS = torch.tensor([1, 3])
FORMS: dict[str, dict[int, dict[str, Any]]] = {
    "paper": {},
    "interpolated, ends repeated": {
        2: {"low_frames": "interpolate", "edge_frames": 1},
        3: {"low_frames": "interpolate", "edge_frames": 2},
    },
    "ConvGRUs upsample": {
        2: {"temporal": "conv_gru", "edge_frames": 1},
        3: {"temporal": "conv_gru", "low_frames": "interpolate", "edge_frames": 1},
    },
    "convolutions from noise": {1: {"temporal": "separable_conv"}},
}


def cascade(form: str, num_frames: int) -> GeneratorCascade:
    """Of three stages, unrolled sixfold, with statistics of `num_frames` frames."""
    raw = tree()
    for number, changes in FORMS[form].items():
        raw["stages"][number]["generator"] |= changes
    config = config_from_tree(raw, "test")
    torch.manual_seed(0)
    made = GeneratorCascade([build_generator(config, number) for number in (1, 2, 3)], config)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():  # frames shall differ: what stands still looks the same in any chunk
        for module in made.modules():
            if isinstance(module, ConvGRU):
                for gate in (module.reset, module.update, module.candidate):
                    gate.bias_in(None).normal_(generator=random)
    update_spectral_norm(made, num_iterations=3)
    assert spectral_weights(made)

    def run_pass(number: int) -> None:
        made.generate(latents(number), LABELS, num_frames)

    collect_statistics(made, run_pass, 3)
    return made.requires_grad_(False)


def clip_generator(made: GeneratorCascade) -> ClipGenerator:
    first = made.generators[0]
    assert isinstance(first, ClipGenerator)
    return first


def latents(seed: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 16, generator=random) for _ in range(3)]


def in_chunks(made: GeneratorCascade, sizes: list[int]) -> Tensor:
    chunks = list(made.stream(latents(9), LABELS, list(accumulate(sizes))))
    assert [chunk.shape[1] for chunk in chunks] == sizes
    return torch.cat(chunks, dim=1)


@pytest.mark.parametrize("sizes", [[13], [1, 4, 4, 4], [1, 8, 4], [1] * 13, [12, 1]], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_any_chunks_make_the_same_video(form: str, sizes: list[int]) -> None:
    made = cascade(form, 13)
    expected = made.generate(latents(9), LABELS, 13)
    assert (expected[:, 1:] - expected[:, :-1]).abs().amax((0, 2, 3, 4)).min() > 1e-3
    # To rounding: a convolution may choose another algorithm for another number of frames.
    torch.testing.assert_close(in_chunks(made, sizes), expected, rtol=1e-4, atol=1e-5)


def test_more_chunks_than_the_halo_reaches() -> None:
    made = cascade("interpolated, ends repeated", 60)
    expected = made.generate(latents(9), LABELS, 60)
    for sizes in ([7] * 8 + [4], [24, 36]):
        torch.testing.assert_close(in_chunks(made, sizes), expected, rtol=1e-4, atol=1e-5)


def test_with_half_the_halo_chunks_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    made = cascade("paper", 48)
    expected = made.generate(latents(9), LABELS, 48)
    monkeypatch.setattr("engine.models.chunks.halo_of", lambda made: max(0, halo_of(made) - 3))
    assert (in_chunks(made, [24, 24]) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["paper", "ConvGRUs upsample"])
def test_a_recurrent_clip_goes_on_from_its_state(form: str) -> None:
    first = clip_generator(cascade(form, 30))
    z, state, made = latents(9)[0], ClipState(), []
    for number in (2, 1, 2):
        video, state = continue_clip(first, z, LABELS, number, state)
        made.append(video)
    assert state.num_frames == 5
    torch.testing.assert_close(torch.cat(made, dim=1), first(z, LABELS, 5), rtol=1e-4, atol=1e-5)
    assert all(gru.hidden_BCHW is None for gru in first.modules() if isinstance(gru, ConvGRU))


def test_the_first_frames_of_a_recurrent_clip_do_not_depend_on_what_follows() -> None:
    first = clip_generator(cascade("paper", 30))  # statistics of 5 frames
    z = latents(9)[0]
    clips = [next(clip_chunks(first, z, LABELS, [4, length])) for length in (5, 8, 40)]
    assert torch.equal(clips[0], clips[1])
    assert torch.equal(clips[0], clips[2])


def test_the_first_frames_of_a_long_video_do_not_depend_on_what_follows() -> None:
    """Up to half of the statistics' length, less what the stages' halos reach."""
    made = cascade("paper", 120)
    videos = [next(made.stream(latents(9), LABELS, [24, length])) for length in (120, 126, 300)]
    torch.testing.assert_close(videos[1], videos[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(videos[2], videos[0], rtol=1e-4, atol=1e-5)


def test_rows_of_other_lengths() -> None:
    made = cascade("paper", 36)
    first, second, third = made.generators
    assert isinstance(third, UpsamplingGenerator)

    def rows(generator: Any, total: int, period: int = 1) -> list[int]:
        return list(statistics_rows(generator, 0, total, total=total, period=period))

    assert rows(first, 4) == [0, 1, 2, 3]
    assert rows(first, 9) == [0, 1, 2, 3, 4, 5, 5, 5, 5]
    assert rows(second, 12, period=2) == list(range(12))
    assert rows(second, 16, period=2) == [*range(6), 6, 7, 6, 7, *range(6, 12)]
    assert rows(second, 6, period=2) == [0, 1, 2, 3, 10, 11]
    assert rows(third, 36, period=6) == list(range(36))
    assert rows(third, 48, period=6) == [*range(18), *range(18, 24), *range(18, 24), *range(18, 36)]
    assert rows(third, 6, period=6) == list(range(6))
    middle = statistics_rows(third, 20, 30, total=48, period=6)
    assert list(middle) == rows(third, 48, period=6)[20:30]


def test_statistics_stay_as_they_were() -> None:
    made = cascade("paper", 13)
    before = {name: norm.mean for name, norm in frame_norms(made).items()}
    stream = made.stream(latents(9), LABELS, [2, 60])
    next(stream)
    del stream
    assert all(norm.mean is before[name] for name, norm in frame_norms(made).items())


def test_statistics_of_the_batch_are_refused() -> None:
    made = cascade("paper", 13)
    for norm in frame_norms(made).values():
        norm.fix(None)
    with pytest.raises(ValueError, match="only with fixed norm statistics"):
        next(made.stream(latents(9), LABELS, [4, 8]))
    convolutions = clip_generator(cascade("convolutions from noise", 13))
    with pytest.raises(ValueError, match="no state to go on from"):
        continue_clip(convolutions, latents(9)[0], LABELS, 2)


def test_cut_at_keeps_no_more_than_it_must() -> None:
    taken = []

    def chunks() -> Iterator[Tensor]:
        for number in range(4):
            taken.append(number)
            yield torch.full((1, 3, 1, 1, 1), float(number))

    cut = cut_at(chunks(), [2, 3, 7])
    assert next(cut).flatten().tolist() == [0, 0]
    assert taken == [0]
    assert next(cut).flatten().tolist() == [0]
    assert next(cut).flatten().tolist() == [1, 1, 1, 2]
    assert taken == [0, 1, 2]


def test_memory_does_not_grow_with_the_length() -> None:
    """Counted on the meta device: every byte that is live at one time."""
    made = cascade("interpolated, ends repeated", 12).to("meta")
    peaks = []
    for length in (192, 384):
        counted, phases = Update(), Phases()
        live = UpdateBytes(phases, block_bytes=1)
        with live, live.counted_for(counted):
            zs = [torch.empty(2, 16, device="meta") for _ in range(3)]
            ends = range(24, length + 1, 24)
            chunks = made.stream(zs, torch.ones(2, dtype=torch.long, device="meta"), ends)
            assert sum(chunk.shape[1] for chunk in chunks) == length
        peaks.append(max(counted.most.values()))
    assert peaks[0] == peaks[1]
    output_bytes = 2 * 384 * 3 * 32 * 32 * 4
    assert peaks[0] < output_bytes
