"""--rehearse: what one process foretells of many ranks, against what two real ranks write."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks, ranks_of
from small_runs import REPOSITORY, Finished, Tiny, call, contents, flat, python
from torch import Tensor

import engine.train
from engine.configuration import load_config
from engine.errors import UserError
from engine.models.construction import build_discriminators, build_generator
from engine.rehearsal import shares
from engine.rehearsal.shares import MADE_UP_VIDEOS, find_index, share_epoch
from engine.trainer.ranks import derived_seed
from engine.video.index import VideoIndex
from engine.video.sampler import ClipSampler

# (stage, ZeRO stage) of the two real runs; the second one stands on the first.
RUNS = [(1, 1), (2, 3)]


def rehearsed(
    forks: Forks, folder: Path, num_ranks: int, runs: list[list[str]]
) -> list[dict[str, Any]]:
    """What rehearsals found, in a process of their own."""
    file = folder / "rehearsals.json"
    file.write_text(json.dumps(runs))
    done = forks.alone("tests/rehearsal/rehearsals.py", str(num_ranks), file)
    assert done.code == 0, done.out + done.err
    found: list[dict[str, Any]] = json.loads(done.out.splitlines()[-1])
    return found


def options_of(tiny: Tiny, out: Path) -> list[list[str]]:
    """train.py's, of `RUNS`: half of the batch per rank, in two micro-batches."""
    fixed = ("--max-steps", "1", "--set", "training.micro_batch=1")
    return [
        tiny.options(
            stage, out, *fixed, "--set", f"training.zero_stage={zero}", "--previous", str(out)
        )
        for stage, zero in RUNS
    ]


@pytest.fixture(scope="module")
def real(tiny: Tiny, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two real ranks trained a step of `RUNS`."""
    out = tmp_path_factory.mktemp("real")
    done = forks.job("train", options_of(tiny, out), ranks_of(2), seconds=600)
    assert done.code == 0, done.out + done.err
    return out


@pytest.fixture(scope="module")
def found(
    real: Path, tiny: Tiny, forks: Forks, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Rehearsals of the same, and of a joint one with an average, on the real index.

    `real` has made the data set; nothing else of it is used, or to be found.
    """
    folder = tmp_path_factory.mktemp("rehearsed")
    out = folder / "out"
    joint = ("--set", "stages.2.joint=true", "--set", "training.ema_decay=0.5")
    share = ("--set", "training.micro_batch=2", "--data", tiny.data)
    runs = [
        *options_of(tiny, out),
        tiny.options(2, out, *joint, *share),
    ]
    results = rehearsed(forks, folder, 2, runs)
    assert not out.exists()
    return results


def tensor_sizes(value: Any) -> dict[str, int]:
    return {path: leaf.numel() for path, leaf in flat(value).items() if isinstance(leaf, Tensor)}


@pytest.mark.slow
@pytest.mark.parametrize("run", range(len(RUNS)))
def test_files_and_tensors_are_those_of_two_real_ranks(
    real: Path, found: list[dict[str, Any]], run: int
) -> None:
    """Every file's name, and every tensor's place and number of values in it: ZeRO's shards,
    whose numbers are odd here, the last rank's without padding, buffers, moments."""
    stage, _ = RUNS[run]
    checkpoint = real / f"stage{stage}/checkpoints/step-00000001"
    written = contents(checkpoint)
    by_rank = found[run]["by_rank"]
    foretold = {name: file for files in by_rank for name, file in files.items()}
    assert foretold.keys() == written.keys()
    assert len(written) == 7  # of two ranks three each, and the generator's
    for name, value in written.items():
        sizes = tensor_sizes(value)
        assert len(sizes) >= 2
        assert foretold[name]["tensors"] == sizes, name
        # A file adds names, shapes and the like: 300 bytes a tensor.
        rest = (checkpoint / name).stat().st_size - foretold[name]["num_bytes"]
        assert 0 < rest < 8192 + 400 * len(sizes), name
    assert all(any(name.endswith(f"{rank:05d}.pt") for name in by_rank[rank]) for rank in (0, 1))
    assert found[run]["num_files"] == len(written) + 1
    size = (checkpoint / "meta.json").stat().st_size
    # Files' sizes are written in it, with one digit more or less.
    assert abs(found[run]["meta_bytes"] - size) <= len(written)


@pytest.mark.slow
def test_previous_is_that_of_two_real_ranks(real: Path, found: list[dict[str, Any]]) -> None:
    """Though no checkpoint of stage 1 is there to read."""
    assert found[0]["previous"] is None
    kept = torch.load(real / "stage2/previous.pt", weights_only=True)
    assert found[1]["previous"]["tensors"] == tensor_sizes(kept)


@pytest.mark.slow
def test_partitions_are_those_that_two_real_ranks_train(
    real: Path, found: list[dict[str, Any]]
) -> None:
    """Adam's first moments: as many as a rank updates, without the padding."""
    for (stage, zero), result in zip(RUNS, found, strict=False):
        written = contents(real / f"stage{stage}/checkpoints/step-00000001")
        for part in result["partitions"]:
            if part["zero_stage"] == zero:
                moments = [
                    sum(values.numel() for values in value["values"]["exp_avg"].values())
                    for name, value in sorted(written.items())
                    if name.startswith(f"{part['network']}-")
                ]
                assert sum(moments) == part["num_parameters"]
                padding = 2 * part["num_partitioned"] - part["num_parameters"]
                assert [part["num_partitioned"] - count for count in moments] == [0, padding]


@pytest.mark.slow
def test_collectives_of_the_norms(found: list[dict[str, Any]]) -> None:
    """In the forward pass of two D updates and of G's, and in G's backward pass.

    Stage 1's generator has a unit of two blocks with two norms each, and a tail with one; stage 2's
    two units of three blocks.
    """
    assert found[0]["collectives"]["all_reduce of norm statistics"][0] == 5 * (3 + 1)
    assert found[1]["collectives"]["all_reduce of norm statistics"][0] == 13 * (3 + 1)


@pytest.mark.slow
def test_joint_stages_and_an_average(found: list[dict[str, Any]], tiny: Tiny) -> None:
    tensors = found[2]["by_rank"][0]["generator.pt"]["tensors"]
    for number in (1, 2):
        names = build_generator(tiny.config(), number).state_dict().keys()
        assert {f"/generators/{number}/{name}" for name in names} <= tensors.keys()
    assert any(name.startswith("/average/") for name in tensors)
    assert found[2]["previous"] is None


@pytest.mark.slow
def test_shares_of_the_real_index(found: list[dict[str, Any]], tiny: Tiny) -> None:
    """Rank 0 begins with clips 0 and 2 of the sampler that stage 2 trains on."""
    result = found[2]["shares"]
    index = VideoIndex.load(tiny.data / "index.jsonl")
    assert result["epoch"] == len(index.entries) == 8
    assert result["clips_of_rank"] == [4, 4]
    trained_on = ClipSampler(
        [entry.num_frames for entry in index.entries],
        num_frames=4,
        frame_stride=1,
        seed=derived_seed("clips", 0, 2, 0),
        random_crop=True,
        horizontal_flip=False,
    )
    assert result["first_batch"] == [trained_on.request(k).video for k in (0, 2)]


@pytest.mark.long
def test_128_ranks_at_the_papers_size(tmp_path: Path) -> None:
    """The command that must be quick, and its limit, in seconds of one core."""
    out = tmp_path / "out"
    options = ("--config", "configs/kinetics600.yaml", "--stage", "2", "--rehearse", "128")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = python("engine/train.py", *options, "--out", out, seconds=600)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.code == 0, done.err
    assert done.err == ""
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 120
    assert not out.exists()
    assert "batch: 512 = 128 ranks x 4 samples x 1 accumulated" in done.out
    assert f"made up, {MADE_UP_VIDEOS} videos" in done.out
    assert "386 files" in done.out  # 3 of each rank, the generator's and meta.json
    config = load_config(REPOSITORY / "configs/kinetics600.yaml")
    with torch.device("meta"):
        networks = {
            "generator": build_generator(config, 2),
            "discriminators": build_discriminators(config, 2),
        }
    parts = table(done)
    assert len(parts) == 8
    for (zero, name), (num_parameters, whole, updated, padding) in parts.items():
        parameters = [p.numel() for p in networks[name].parameters()]
        assert num_parameters == sum(parameters)
        num_ranks = 1 if zero == 0 else 128
        assert num_ranks * updated == num_parameters + padding
        # One piece, aligned to two values on each rank; at ZeRO-3 every parameter by itself.
        most = {0: 0, 1: 2 * 128 - 1, 2: 2 * 128 - 1, 3: 127 * len(parameters)}[zero]
        assert 0 <= padding <= most
        small = sum(p for p in parameters if p <= 10_000)
        assert whole == (small if zero == 3 else num_parameters)


def table(done: Finished) -> dict[tuple[int, str], list[int]]:
    """(ZeRO stage, network) -> the numbers of its line."""
    lines = [line.replace("*", "").split() for line in done.out.splitlines()]
    return {
        (int(words[0]), words[1]): [int(word.replace(",", "")) for word in words[2:]]
        for words in lines
        if len(words) == 6 and words[0] in "0123"
    }


# The shares, without DeepSpeed


def sampler(num_videos: int) -> ClipSampler:
    return ClipSampler(
        [20] * num_videos,
        num_frames=3,
        frame_stride=2,
        seed=5,
        random_crop=True,
        horizontal_flip=False,
    )


@pytest.mark.parametrize("num_videos", [1, 7, 1009, 1024])
def test_shares_of_an_epoch(num_videos: int) -> None:
    """Sizes that the batch of 128 x 2 divides, or not, or exceeds: clip k is rank k % 128's."""
    found = share_epoch(sampler(num_videos), world_size=128, micro_batch=2)
    assert found.clips_of_rank == tuple(len(range(r, num_videos, 128)) for r in range(128))
    assert found.num_batches == -(-num_videos // 256)
    assert found.first_batch == tuple(sampler(num_videos).request(k).video for k in (0, 128))


def test_a_clip_that_two_ranks_get_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(position: int, *, rank: int, world_size: int, batch_size: int) -> range:
        return range(position, position + batch_size * world_size, world_size)

    monkeypatch.setattr(shares, "batch_numbers", wrong)
    with pytest.raises(RuntimeError, match="clip 0 goes to 4 ranks"):
        share_epoch(sampler(16), world_size=4, micro_batch=2)


def test_a_video_that_is_left_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClipSampler, "video", lambda self, number: min(number, 3))
    with pytest.raises(RuntimeError, match="not one clip of every usable video"):
        share_epoch(sampler(16), world_size=4, micro_batch=2)


def test_made_up_indexes(tiny: Tiny, tmp_path: Path) -> None:
    """Of the sample set's size before it is made; of Kinetics' without a path; else the user's."""
    config = tiny.config(f"data.path={tmp_path / 'nothing'}")
    source = find_index(config, asked=False)
    assert "made up, 8 videos of 16 frames" in source.description
    assert [entry.label for entry in source.index.entries] == [0, 1] * 4
    kinetics = load_config(REPOSITORY / "configs/kinetics600.yaml")
    assert len(find_index(kinetics, asked=False).index.entries) == MADE_UP_VIDEOS
    plain = tiny.config(f"data.path={tmp_path / 'nothing'}", "data.procedural=null")
    with pytest.raises(UserError, match="no data at"):
        find_index(plain, asked=True)


# Mistakes: one line, exit code 2, at once


KINETICS = ("--config", str(REPOSITORY / "configs/kinetics600.yaml"), "--stage", "2")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--rehearse", "0"), "--rehearse must be at least 1 GPU"),
        (("--rehearse", "-3"), "--rehearse must be at least 1 GPU"),
        # 100 x 4 is no divisor of 512.
        (("--rehearse", "100"), "training.global_batch 512"),
        (("--rehearse", "1024"), "training.global_batch 512"),
        (("--rehearse", "2000000000"), "nearest that work: global_batch 2000000000"),
        (
            (
                *("--rehearse", "131072", "--set", "stages.2.training.global_batch=131072"),
                *("--set", "stages.2.training.sample_bank=null"),
            ),
            "--rehearse 131072: at most 65536 GPUs can be played",
        ),
        (("--rehearse", "8", "--stage", "3"), "--stage 3: "),
        (
            ("--rehearse", "512", "--set", "stages.2.discriminators.minibatch_stddev=true"),
            "global_batch 512 leaves each of 512 processes one; use fewer processes",
        ),
    ],
)
@pytest.mark.timeout(20)  # at once, whatever was typed
def test_mistakes(more: tuple[str, ...], message: str) -> None:
    assert message in call(engine.train.main, *KINETICS, *more).error


def test_not_under_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = call(engine.train.main, *KINETICS, "--rehearse", "8").error
    assert "start it with python engine/train.py, without a launcher" in error
