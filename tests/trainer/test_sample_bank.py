"""The bank of the frozen stages' samples: what is in it, when, and what training takes from it."""

import os
import signal
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from small_runs import Tiny, contents, differences
from test_step import FACTS, RandomClips
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine.configuration import Config
from engine.errors import UserError
from engine.models.cascade import draw_window_starts
from engine.models.construction import build_generator
from engine.trainer.networks import StageBuilder
from engine.trainer.previous import PreviousStages, load_cascade
from engine.trainer.ranks import Ranks, derived_seed
from engine.trainer.sample_bank import BankedWindows
from engine.trainer.standing_statistics import fix_standing_statistics
from engine.trainer.step import Trainer

# 16x16/4 -> 32x32/2 windows, of stage 2's windows of stage 1's clips.
STAGE_3 = (
    "stages.3={resolution: 32, num_frames: 2, frame_stride: 1, "
    "generator: {temporal: separable_conv, channels: 4, multipliers: [2, 1, 1], latent_size: 8, "
    "class_embedding_size: 4}, "
    "discriminators: {channels: 4, multipliers: [1, 1, 2, 2], spatial_frames: 2}}"
)
# Two batches of four videos; one of them is replaced every other iteration.
BANK = "{num_videos: 8, refresh_every: 4}"


def banked(tiny: Tiny, number: int = 2, bank: str = BANK, *more: str) -> Config:
    stage_3 = [STAGE_3] if number == 3 else []
    return tiny.config(*stage_3, f"stages.{number}.training.sample_bank={bank}", *more)


@dataclass
class Stage:
    """A stage, its frozen earlier ones, and what its bank must hold."""

    config: Config
    number: int
    ranks: Ranks

    def __post_init__(self) -> None:
        config, device = self.config, self.ranks.device
        self.builder = StageBuilder(config, self.number, self.ranks, FACTS)
        torch.manual_seed(7)
        states = {n: build_generator(config, n).state_dict() for n in range(1, self.number)}
        self.cascade = load_cascade(config, states, device)
        latents = self.builder.latents(1)
        fix_standing_statistics(
            self.cascade,
            latents=latents,
            batch_size=4,
            num_passes=2,
            run_stage=lambda n, zs, labels: self.cascade.sample_previous(
                n + 1, zs, labels, latents.random
            ),
        )
        self.builder = replace(self.builder, previous=PreviousStages(self.cascade, ""))

    def bank(self, seed: int = 5) -> BankedWindows:
        return self.builder.bank(torch.Generator().manual_seed(seed))

    def trainer(self) -> Trainer:
        batch = self.config.stages[self.number].training.samples_per_pass
        return self.builder.trainer(RandomClips(self.config, self.number, batch))

    @torch.no_grad()
    def videos(self, batch: int) -> tuple[Tensor, Tensor]:
        """The batch-th batch of videos and labels by their seed, one video at a time."""
        path = self.config.stages[self.number].training.seed, self.number, self.ranks.rank
        latents = self.builder.latents(derived_seed("bank", *path, batch))
        zs = latents.latents(4, self.number - 1)
        labels = latents.labels(4)
        assert labels is not None
        first, *later = self.cascade.generators
        num_frames = self.config.stages[1].num_frames
        videos = [first(zs[0][i : i + 1], labels[i : i + 1], num_frames) for i in range(4)]
        for number, (generator, z) in enumerate(zip(later, zs[1:], strict=True), start=2):
            window = self.config.upsampling(number).num_frames
            starts = draw_window_starts(4, videos[0].shape[1], window, latents.random).tolist()
            videos = [
                generator(z[i : i + 1], labels[i : i + 1], videos[i][:, start : start + window])
                for i, start in enumerate(starts)
            ]
        return torch.cat(videos), labels


def held(bank: BankedWindows) -> tuple[Tensor, Tensor]:
    """Videos [N, T, C, H, W] in [-1, 1] and labels, as they lie in the bank."""
    assert bank._labels_N is not None
    videos = bank._videos_NTHWC.double().permute(0, 1, 4, 2, 3) / 127.5 - 1
    return videos, bank._labels_N.clone()


def recorded(drawn: list[int], count: int) -> bool:
    drawn.append(count)
    return True


@pytest.mark.parametrize("number", [2, 3])
def test_windows_are_of_what_the_frozen_stages_generate_for_the_seeds(
    tiny: Tiny, ranks: Ranks, number: int
) -> None:
    stage = Stage(banked(tiny, number), number, ranks)
    bank = stage.bank()
    bank.advance(0)
    num_drawn = 480
    labels_B, low_BTCHW = bank(num_drawn)
    assert labels_B is not None
    levels = (low_BTCHW.double() + 1) * 127.5
    # Three fp32 operations on values up to 127.5.
    assert (levels - levels.round()).abs().max() < 4 * 127.5 * 2**-23

    batches = [stage.videos(batch) for batch in range(2)]
    videos, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    window = stage.config.upsampling(number).num_frames
    starts = range(videos.shape[1] - window + 1)
    candidates = torch.stack([videos[:, s : s + window] for s in starts], 1).flatten(0, 1)
    errors = (low_BTCHW[:, None] - candidates[None]).abs().amax((2, 3, 4, 5))
    # Half a level of 1 / 127.5, and rounding: of the networks, whose batches are others here.
    matches = errors <= 1 / 255 + 1e-4
    assert matches.sum(1).tolist() == [1] * num_drawn
    which = matches.float().argmax(1)
    assert torch.equal(labels[which // len(starts)], labels_B)
    # Uniform over videos and starts; 5 standard deviations.
    counts = which.bincount(minlength=len(candidates)).double()
    expected = num_drawn / len(candidates)
    assert ((counts - expected).abs() < 5 * expected**0.5).all()


def test_the_oldest_batch_is_replaced(tiny: Tiny, ranks: Ranks) -> None:
    stage = Stage(banked(tiny), 2, ranks)
    batches = [stage.videos(number) for number in range(4)]
    bank = stage.bank()
    for step, expected in enumerate([(0, 1), (0, 1), (2, 1), (2, 1), (2, 3), (2, 3)]):
        drawn: list[int] = []
        before = [part[:4] for part in held(bank)], [part[4:] for part in held(bank)]
        assert bank.advance(step, partial(recorded, drawn))
        assert drawn == {0: [1, 2], 2: [1], 4: [1]}.get(step, [])
        videos, labels = held(bank)
        for place, number in enumerate(expected):
            rows = slice(4 * place, 4 * place + 4)
            assert (videos[rows] - batches[number][0]).abs().max() <= 1 / 255 + 1e-4
            assert torch.equal(labels[rows], batches[number][1])
        kept = {2: 1, 4: 0}.get(step)
        if kept is not None:
            rows = slice(4 * kept, 4 * kept + 4)
            assert torch.equal(before[kept][0], videos[rows]), "redrawn or moved"
        # What a resumed run finds, also after an earlier or a later step.
        for elsewhere in (None, 0, 9):
            resumed = stage.bank()
            if elsewhere is not None:
                resumed.advance(elsewhere)
            resumed.advance(step)
            assert torch.equal(resumed._videos_NTHWC, bank._videos_NTHWC)
            assert torch.equal(held(resumed)[1], labels)


def test_what_was_not_drawn_to_the_end_is_drawn_again(tiny: Tiny, ranks: Ranks) -> None:
    """Also what was held before, of which some is overwritten."""
    stage = Stage(banked(tiny), 2, ranks)
    bank, untouched = stage.bank(), stage.bank()
    assert bank.advance(0)
    assert not bank.advance(4, lambda count: False)
    with pytest.raises(AssertionError, match="advance comes first"):
        bank(4)
    for step in (0, 2):
        assert bank.advance(step)
        assert untouched.advance(step)
        assert torch.equal(bank._videos_NTHWC, untouched._videos_NTHWC)


def test_several_batches_are_replaced_at_once(tiny: Tiny, ranks: Ranks) -> None:
    """Four batches within three iterations, and one that was never held is never drawn."""
    stage = Stage(banked(tiny, 2, "{num_videos: 16, refresh_every: 3}"), 2, ranks)
    bank = stage.bank()
    num_drawn = []
    for step in (0, 1, 2, 3, 9):
        drawn: list[int] = []
        assert bank.advance(step, partial(recorded, drawn))
        num_drawn.append(len(drawn))
    assert num_drawn == [4, 1, 1, 2, 4]


def test_shards_of_two_ranks_have_nothing_in_common(tiny: Tiny) -> None:
    config = banked(tiny, 2, "{num_videos: 16, refresh_every: 4}")
    shards = []
    for rank in range(2):
        ranks = Ranks(rank=rank, world_size=2, local_rank=rank, device=torch.device("cpu"))
        bank = Stage(config, 2, ranks).bank()
        bank.advance(0)
        assert bank.num_videos == 8
        shards.append(held(bank)[0].flatten(1))
    together = torch.cat(shards)
    distances = torch.cdist(together, together, p=float("inf"))
    assert (distances + torch.eye(16)).min() > 2 / 255


def test_draws_follow_the_seed(tiny: Tiny, ranks: Ranks) -> None:
    stage = Stage(banked(tiny), 2, ranks)
    banks = [stage.bank(seed) for seed in (1, 1, 2)]
    for bank in banks:
        bank.advance(0)
    draws = [bank(16) for bank in banks]
    assert differences(draws[0], draws[1]) == []
    assert differences(draws[0], draws[2]) != []
    other = Stage(banked(tiny, 2, BANK, "training.seed=3"), 2, ranks).bank()
    other.advance(0)
    assert differences(held(other), held(banks[0])) != []


def test_frozen_stages_run_for_the_bank_only(tiny: Tiny, ranks: Ranks) -> None:
    """Three times per iteration without it: twice for D, once for G."""

    def counted(config: Config) -> tuple[list[int], int, Stage]:
        stage = Stage(config, 2, ranks)
        trainer = stage.trainer()
        calls: list[object] = []
        stage.cascade.generators[0].register_forward_hook(lambda *_: calls.append(None))

        def forwards() -> int:
            calls.clear()
            trainer.train_step()
            return len(calls)

        first = forwards()
        with FlopCounterMode(display=False) as counter:
            second = forwards()
        return [first, second, forwards()], counter.get_total_flops(), stage

    anew, flops_anew, _ = counted(tiny.config())
    from_bank, flops_from_bank, stage = counted(banked(tiny))
    assert anew == [3, 3, 3]
    assert from_bank == [2, 0, 1]
    with FlopCounterMode(display=False) as counter:
        stage.videos(0)
    # A whole video, of which a window is made with fewer.
    assert 2 * counter.get_total_flops() < flops_anew - flops_from_bank
    assert flops_anew - flops_from_bank < 3 * counter.get_total_flops()


def test_unconditional(tiny: Tiny, ranks: Ranks) -> None:
    stage = Stage(banked(tiny, 2, BANK, "data.num_classes=null"), 2, ranks)
    trainer = stage.trainer()
    trainer.train_step()
    assert trainer.bank is not None
    assert trainer.bank(4)[0] is None


def test_resumed_run_equals_an_uninterrupted_one(
    tiny: Tiny, cascade_run: Path, tmp_path: Path
) -> None:
    """Bit for bit; batches are replaced before and after the step that it stops at."""
    options = ("--previous", cascade_run, "--set", f"stages.2.training.sample_bank={BANK}")
    outs = tmp_path / "whole", tmp_path / "parts", tmp_path / "anew"
    whole = tiny.trained(2, outs[0], "--max-steps", "5", *options)
    tiny.trained(2, outs[1], "--max-steps", "3", *options)
    finished = tiny.train(2, outs[1], "--max-steps", "5", *options)
    assert finished.code == 0, finished.err
    assert "bank: drawing 8 videos on each rank, 0 MB of main memory" in finished.out
    assert "bank: drawn in " in finished.out
    parts = outs[1] / "stage2/checkpoints/step-00000005"
    assert differences(contents(whole), contents(parts)) == []
    # Equality means nothing if the bank is not what is trained on.
    anew = tiny.trained(2, outs[2], "--max-steps", "5", *options[:2])
    assert len(differences(contents(whole), contents(anew))) > 100


def test_a_bank_that_came_later_is_told(tiny: Tiny, cascade_run: Path, tmp_path: Path) -> None:
    """As with a newer configuration file, which has one."""
    options: tuple[str | Path, ...] = ("--previous", cascade_run, "--max-steps")
    tiny.trained(2, tmp_path, *options, "1")
    bank = ("--set", f"stages.2.training.sample_bank={BANK}")
    resumed = tiny.train(2, tmp_path, *options, "2", *bank)
    assert resumed.code == 0, resumed.err
    assert "note: changed since: sample_bank none -> 8 videos, replaced in " in resumed.out
    assert "sample_bank" not in tiny.train(2, tmp_path, *options, "3", *bank).out


def test_a_signal_ends_the_drawing_and_nothing_is_lost(
    tiny: Tiny, cascade_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step and after a resume: it is seen after the batch at hand."""
    options = ("--previous", cascade_run, "--set", f"stages.2.training.sample_bank={BANK}")
    whole = tiny.trained(2, tmp_path / "whole", "--max-steps", "2", *options)
    drawn = []
    draw = BankedWindows._draw

    def draw_and_kill(bank: BankedWindows, batch: int) -> None:
        draw(bank, batch)
        drawn.append(batch)
        os.kill(os.getpid(), signal.SIGTERM)

    out = tmp_path / "parts"
    for step in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(BankedWindows, "_draw", draw_and_kill)
            stopped = tiny.train(2, out, "--max-steps", "2", *options)
        checkpoint = out / f"stage2/checkpoints/step-{step:08}"
        assert stopped.code == 128 + signal.SIGTERM, stopped.err
        assert "done: " not in stopped.out
        assert f"interrupted: saved {checkpoint}; the same command goes on" in stopped.out
        assert "bank: drawn in" not in stopped.out
        tiny.trained(2, out, "--max-steps", str(step + 1), *options)
    assert drawn == [0, 0]
    assert differences(contents(whole), contents(out / "stage2/checkpoints/step-00000002")) == []


@pytest.mark.parametrize(("num_videos", "nearest"), [(3, "4"), (10, "8 or 12")])
def test_videos_that_ranks_cannot_share(
    tiny: Tiny, cascade_run: Path, tmp_path: Path, num_videos: int, nearest: str
) -> None:
    change = f"stages.2.training.sample_bank={{num_videos: {num_videos}}}"
    finished = tiny.train(2, tmp_path, "--previous", cascade_run, "--set", change)
    assert finished.error == (
        f"error: training.sample_bank.num_videos {num_videos} must be a multiple of 4 "
        f"(1 process x micro_batch 4); nearest: {nearest}"
    )


def test_videos_that_memory_cannot_hold(tiny: Tiny, ranks: Ranks) -> None:
    """2 PB are more than a process can address."""
    stage = Stage(banked(tiny, 2, "{num_videos: 4_000_000_000_000}"), 2, ranks)
    with pytest.raises(
        UserError, match=r"^training.sample_bank: 2304000 GB for .*lower num_videos"
    ):
        stage.bank()


def test_values_that_are_no_numbers_are_not_hidden(tiny: Tiny, ranks: Ranks) -> None:
    stage = Stage(banked(tiny), 2, ranks)
    with torch.no_grad():
        stage.cascade.generators[0].get_parameter("to_rgb.bias").fill_(float("nan"))
    with pytest.raises(UserError, match="the frozen stage 1 generates values that are not finite"):
        stage.bank().advance(0)
