"""ZeRO 0 to 3 on two and four ranks (CPU, gloo): one process's training, sharded and resumed."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from forks import Forks, ranks_of
from small_runs import Tiny, contents, differences, logged, network_in
from torch import Tensor

from engine.models.construction import build_generator

ZERO_STAGES = (0, 1, 2, 3)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # of all runs together
]


class Run(NamedTuple):
    """A stage trained at a ZeRO stage."""

    stage: int
    zero: int
    offload: bool = False
    wide: bool = False
    """So that ZeRO-3 shards weights too: it leaves those of less than 10,000 values whole."""

    @property
    def overrides(self) -> list[str]:
        """As after `--set`."""
        offload = str(self.offload).lower()
        keys = {"zero_stage": self.zero, "offload_optimizer": offload, "discriminator_steps": 1}
        channels = 20 if self.wide else 4
        return [
            *(f"training.{key}={value}" for key, value in keys.items()),
            *(
                f"stages.{self.stage}.{n}.channels={channels}"
                for n in ("generator", "discriminators")
            ),
        ]


# By number of ranks. All of stage 1, with its ConvGRU; of stage 2, with windows and a matching
# discriminator, what costs more than it adds is left out.
OFFLOADED = [Run(1, 1, offload=True), Run(1, 3, offload=True)]
WIDE = [Run(stage, zero, wide=True) for stage in (1, 2) for zero in (0, 3)]
SHARED = {
    1: [Run(1, 0), Run(2, 0)],
    2: [*(Run(1, zero) for zero in ZERO_STAGES), *OFFLOADED, Run(2, 2)],
    4: [*(Run(1, zero) for zero in ZERO_STAGES), Run(2, 1), Run(2, 3)],
}
# (ranks, run) that stops after a step, and that which goes on from there.
CONVERTED = [
    ((2, Run(1, 1)), (1, Run(1, 1))),
    ((2, Run(1, 1)), (4, Run(1, 2))),
    ((2, Run(1, 1)), (2, Run(1, 3))),
    ((2, Run(1, 1)), (2, Run(1, 1, offload=True))),
    ((4, Run(1, 3)), (2, Run(1, 3))),
    ((2, WIDE[1]), (2, WIDE[0])),
    ((2, WIDE[0]), (2, WIDE[1])),
    ((1, Run(2, 0)), (2, Run(2, 2))),
]
RESUMED = [*(Run(1, zero) for zero in (0, 1, 2)), *OFFLOADED, WIDE[1], WIDE[3]]


@pytest.fixture(scope="module")
def outs(tiny: Tiny, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of this file.

    `shared_file`s are of ranks that share one global batch. In a folder per run of train.py 'whole'
    trained two steps, and 'parts' resumed from its first.
    """
    folder = tmp_path_factory.mktemp("zero")
    for num_ranks, function, arguments in jobs(tiny, folder):
        finished = forks.job(function, arguments, ranks_of(num_ranks), seconds=1800)
        assert finished.code == 0, finished.out + finished.err
        if function == "train" and num_ranks == 1:
            (folder / "elsewhere.out").write_text(finished.out)
    return folder


def jobs(tiny: Tiny, folder: Path) -> list[Any]:
    """What forked_jobs.py is to do: number of ranks, function, arguments."""
    commands = [line for run in RESUMED for line in command_lines(tiny, folder, run)]
    shared: list[Any] = [
        [
            num_ranks,
            "share",
            [str(tiny.config_file), *(sharing(folder, num_ranks, r) for r in runs)],
        ]
        for num_ranks, runs in [*SHARED.items(), (2, WIDE)]
    ]
    savers = {str(shared_file(folder, *before)): saved(folder, *before) for before, _ in CONVERTED}
    for _, _, (_, *runs) in shared:
        for run in runs:
            if run["file"] in savers:
                run["saves"] = str(savers[run["file"]])
    goes_on = [
        [num_ranks, "share", [str(tiny.config_file), going_on(folder, before, (num_ranks, run))]]
        for before, (num_ranks, run) in CONVERTED
    ]
    alone = sharing(folder, 2, Run(1, 0))
    alone["overrides"].append("training.synchronized_norms=false")
    alone["file"] = str(folder / "alone.pt")
    # One process goes on from the first step of two.
    elsewhere = tiny.options(1, folder / "elsewhere", *FEWER, "--resume", first_of_two(folder))
    return [
        *shared,
        *goes_on,
        [2, "share", [str(tiny.config_file), alone]],
        [2, "train", commands],
        [1, "train", [elsewhere]],
    ]


def sharing(folder: Path, num_ranks: int, run: Run) -> dict[str, Any]:
    """Four samples in a forward pass of all ranks, accumulated twice in stage 1 if not wide."""
    global_batch = 8 if run.stage == 1 and not run.wide else 4
    batches = [f"micro_batch={4 // num_ranks}", f"global_batch={global_batch}"]
    rates = ["generator_lr=0.01", "discriminator_lr=0.01"]
    return {
        "stage": run.stage,
        # There weights move by lr times their gradients: with these by enough to matter.
        "overrides": [*run.overrides, *(f"training.{each}" for each in (*batches, *rates))],
        "file": str(shared_file(folder, num_ranks, run)),
        "one_by_one": run.wide,
    }


FEWER = (
    *("--max-steps", "2", "--set", "training.discriminator_steps=1"),
    *("--set", "training.ema_decay=0.5"),
)


def first_of_two(folder: Path) -> Path:
    """A checkpoint of two ranks at ZeRO-1, which keep an average and accumulate."""
    return checkpoint(folder / str(tuple(RESUMED[1])) / "whole", 1, 1)


def going_on(folder: Path, before: tuple[int, Run], after: tuple[int, Run]) -> dict[str, Any]:
    """The second step of `before`, on other ranks or at another ZeRO stage."""
    run = sharing(folder, *after)
    more = {
        "loads": str(saved(folder, *before)),
        "file": str(converted_file(folder, before, after)),
    }
    return run | more


def saved(folder: Path, num_ranks: int, run: Run) -> Path:
    return folder / f"saved-{num_ranks}-{tuple(run)}"


def converted_file(folder: Path, before: tuple[int, Run], after: tuple[int, Run]) -> Path:
    return folder / f"converted-{before[0]}-{tuple(before[1])}-{after[0]}-{tuple(after[1])}.pt"


def shared_file(folder: Path, num_ranks: int, run: Run) -> Path:
    return folder / f"shared-{num_ranks}-{tuple(run)}.pt"


def command_lines(tiny: Tiny, folder: Path, run: Run) -> list[list[str]]:
    """Of a whole run and of the rest of it."""
    # Half of the global batch per rank, in two micro-batches: accumulation and sharding together.
    settings = [*run.overrides, "training.checkpoint_every=1", "training.micro_batch=1"]
    settings += ["training.ema_decay=0.5"]
    options = ["--max-steps", "2", *(part for each in settings for part in ("--set", each))]
    if run.stage == 2:
        options += ["--previous", str(folder / str(tuple(RESUMED[1])) / "whole")]
    whole, parts = (folder / str(tuple(run)) / name for name in ("whole", "parts"))
    first = checkpoint(whole, run.stage, 1)
    return [
        tiny.options(run.stage, whole, *options),
        tiny.options(run.stage, parts, *options, "--resume", first),
    ]


def checkpoint(out: Path, stage: int, step: int) -> Path:
    return out / f"stage{stage}" / "checkpoints" / f"step-{step:08d}"


def generator(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path / "generator.pt", weights_only=True)
    return state


@pytest.mark.parametrize(
    ("num_ranks", "run"), [(n, run) for n in (2, 4) for run in SHARED[n]], ids=str
)
def test_ranks_train_as_one_process_does(outs: Path, num_ranks: int, run: Run) -> None:
    """The same global batch, with synchronised norms: the split changes the order of sums only.

    Sums within kernels, over ranks and micro-batches: a few roundings each, which the second
    step's losses see through some 20 layers: 20 eps.
    """
    alone = torch.load(shared_file(outs, 1, Run(run.stage, 0)), weights_only=True)
    assert alone["measures"][0]["loss_G"] != alone["measures"][1]["loss_G"]
    assert_same(alone, torch.load(shared_file(outs, num_ranks, run), weights_only=True))


@pytest.mark.parametrize("stage", [1, 2])
def test_sharded_weights_train_as_whole_ones(outs: Path, stage: int) -> None:
    """On two ranks both and without accumulation: a sum of two gradients has one order.

    The wider a network, the likelier is a ReLU whose input is as close to 0 as a rounding: on the
    other side of it its gradient is another. Hence all divide their weights one by one, in which
    nothing is rounded otherwise.
    """
    whole, sharded = (
        torch.load(shared_file(outs, 2, Run(stage, zero, wide=True)), weights_only=True)
        for zero in (0, 3)
    )
    for weights in whole["weights"].values():
        assert sum(value.numel() > 10_000 for value in weights.values()) >= 4
    assert_same(whole, sharded)


def test_one_process_goes_on_where_two_stopped(outs: Path) -> None:
    """With their clips and average; the micro-batch, ZeRO's ranks and latents may differ."""
    console = (outs / "elsewhere.out").read_text()
    assert "changed since: ranks 2 -> 1, micro_batch 1 -> 4; latents are drawn anew" in console
    two, one = (
        torch.load(path / "rank-00000.pt", weights_only=True)["trainer"]
        for path in (
            checkpoint(outs / str(tuple(RESUMED[1])) / "whole", 1, 2),
            checkpoint(outs / "elsewhere", 1, 2),
        )
    )
    assert one["reals"]["position"] == two["reals"]["position"] == 8
    assert not one["random"].equal(two["random"])
    held = contents(checkpoint(outs / "elsewhere", 1, 2))
    assert held["generator-00000.pt"]["step"] == 2
    assert held["generator.pt"]["average"] is not None


@pytest.mark.parametrize(("before", "after"), CONVERTED, ids=str)
def test_other_ranks_and_zero_stages_go_on(
    outs: Path, before: tuple[int, Run], after: tuple[int, Run]
) -> None:
    """With the weights, moments, buffers and clips that were saved: the second step is the one that
    the ranks would have done that wrote them, to rounding."""
    expected = torch.load(shared_file(outs, *before), weights_only=True)
    found = torch.load(converted_file(outs, before, after), weights_only=True)
    assert len(found["measures"]) == 1
    assert expected["measures"][0]["loss_G"] != expected["measures"][1]["loss_G"]
    shards = [
        torch.load(file, weights_only=True) for file in sorted(saved(outs, *before).glob("G-*.pt"))
    ]
    loaded = {name: value.flatten() for name, value in found["before"]["G"].items()}
    held = network_in({f"G-{n}": shard for n, shard in enumerate(shards)}, "G")
    assert loaded.keys() == held.keys()
    assert all(loaded[name].equal(value.flatten()) for name, value in held.items())
    assert_same(expected | {"measures": expected["measures"][1:]}, found)


def assert_same(expected: dict[str, Any], compared: dict[str, Any]) -> None:
    """Measures and weights, within the roundings of `test_ranks_train_as_one_process_does`.

    A weight may be off by a ten-thousandth of its tensor's largest update and two roundings.
    """
    eps = torch.finfo(torch.float32).eps
    assert compared["measures"] == [
        pytest.approx(step, rel=20 * eps, abs=20 * eps) for step in expected["measures"]
    ]
    for network, weights in expected["weights"].items():
        others, before = compared["weights"][network], expected["before"][network]
        assert others.keys() == weights.keys()
        for name, value in weights.items():
            update = (value - before[name]).abs().max()
            limits = 1e-4 * update + 2 * eps * value.abs().clamp(min=1)
            errors = (others[name] - value).abs()
            assert bool((errors <= limits).all()), (network, name, errors.max(), update)


def test_norms_of_each_rank_alone_train_otherwise(outs: Path) -> None:
    """Else the equality above would say nothing about them."""
    shared = shared_file(outs, 2, Run(1, 0))
    losses = [
        torch.load(file, weights_only=True)["measures"][0]["loss_G"]
        for file in (shared, outs / "alone.pt")
    ]
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("run", RESUMED, ids=str)
def test_resumed_run_equals_an_uninterrupted_one(outs: Path, run: Run) -> None:
    folder = outs / str(tuple(run))
    whole, parts = (checkpoint(folder / name, run.stage, 2) for name in ("whole", "parts"))
    held = contents(whole)
    for network in ("generator", "discriminators"):
        # ZeRO-0 leaves everything to rank 0; at the others every rank has a share.
        held_by_second = held[f"{network}-00001.pt"]["starts"]
        assert bool(held_by_second) == (run.zero > 0)
    assert {"rank-00000.pt", "rank-00001.pt"} <= held.keys()
    assert differences(held, contents(parts)) == []
    assert logged(parts.parent.parent) == logged(whole.parent.parent)[1:]


def test_generator_file_is_whole(outs: Path, tiny: Tiny) -> None:
    """Unsharded at ZeRO-3 too: the same names and shapes, and not the first step's values."""
    for run in RESUMED:
        network = build_generator(tiny.config(*run.overrides), run.stage)
        expected = {name: value.shape for name, value in network.state_dict().items()}
        whole = outs / str(tuple(run)) / "whole"
        first, second = (
            generator(checkpoint(whole, run.stage, step))["generators"][run.stage]
            for step in (1, 2)
        )
        assert {name: value.shape for name, value in second.items()} == expected
        assert len(differences(first, second)) > 10


def test_ranks_see_different_clips_and_noise(outs: Path) -> None:
    held = contents(checkpoint(outs / str(tuple(RESUMED[1])) / "whole", 1, 2))
    states: list[dict[str, Tensor]] = [held[f"rank-0000{n}.pt"]["trainer"] for n in (0, 1)]
    assert not states[0]["random"].equal(states[1]["random"])
    assert states[0]["reals"] == states[1]["reals"]  # the position counts both ranks' clips
