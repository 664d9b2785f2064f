"""`micro_batch: auto`: what is taken, and that a run trains with it and goes on with it."""

from functools import partial
from pathlib import Path

import pytest
import torch
from forks import Forks
from small_runs import Tiny

from engine.configuration import Config, with_training
from engine.errors import UserError
from engine.planning import micro_batch
from engine.planning.meta_step import Step, run_step
from engine.planning.micro_batch import StageMemory, settle_micro_batch
from engine.planning.rank_memory import Scaling, find_peak
from engine.processors import local_processes
from engine.trainer.checkpoints import open_checkpoint

# ZeRO-1 would add buckets of 0.2 GB, beside which activations are nothing.
AUTO = ("training.micro_batch=auto", "training.global_batch=16", "training.zero_stage=0")


_counted: dict[str, Step] = {}


def count_step(config: Config, number: int) -> Step:
    """As `run_step`, each once."""
    key = f"{number} {config.model_dump_json()}"
    if key not in _counted:
        _counted[key] = run_step(config, number)
    return _counted[key]


@pytest.fixture(autouse=True)
def counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch, "StageMemory", partial(StageMemory, run=count_step))


def peak(config: Config, samples: int, number: int = 2) -> int:
    """As planned, on one rank."""
    step = count_step(with_training(config, number, micro_batch=samples), number)
    scaling = Scaling(0, 1, accumulates=samples < 16)
    return find_peak(step, config.stages[number].training, scaling).total


def memory_for(num_bytes: float) -> float:
    """Of a device of which that much is left to tensors, in GB."""
    return (num_bytes / 1e9 + 2) / 0.95


def settled(config: Config, memory_gb: float, num_ranks: int = 1) -> int:
    found, _ = settle_micro_batch(config, 2, num_ranks=num_ranks, memory_gb=memory_gb)
    return found.stages[2].training.samples_per_pass


def test_the_largest_that_fits(tiny: Tiny) -> None:
    config = tiny.config(*AUTO)
    assert settled(config, 80) == 16
    assert settled(config, 80, num_ranks=4) == 4
    assert settled(config, memory_for(peak(config, 16) + 1000)) == 16
    assert settled(config, memory_for(peak(config, 16) - 1000)) == 8
    # Between those that are counted the plan is an upper bound, here by a tenth.
    assert settled(config, memory_for(peak(config, 8) * 1.15)) == 8
    assert settled(config, memory_for(peak(config, 8) * 0.95)) == 4
    assert settled(config, memory_for(peak(config, 1) + 1000)) == 1
    _, note = settle_micro_batch(config, 2, num_ranks=1, memory_gb=80)
    assert note == (
        "micro_batch: auto is 16, of 16 samples per process; planned peak "
        f"{peak(config, 16) / 1e9:.2g} of 80 GB"
    )


def test_what_32_bits_allow(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is told, and the refusal of what must be done at once."""
    monkeypatch.setattr(Step, "most_samples", 11)
    config = tiny.config(*AUTO)
    found, note = settle_micro_batch(config, 2, num_ranks=1, memory_gb=80)
    assert found.stages[2].training.micro_batch == 8
    assert note.endswith(" of 80 GB; 32-bit indices allow 11")
    with pytest.raises(UserError, match="suits 74 of 80 GB, and 11 samples, beyond which 32-bit"):
        settled(tiny.config(*AUTO, "training.reuse_fakes=true"), 80)


def test_what_the_settings_allow(tiny: Tiny) -> None:
    bank = "stages.2.training.sample_bank={num_videos: 12}"  # whole batches of 4
    assert settled(tiny.config(*AUTO, bank), 80) == 4
    config = tiny.config(*AUTO)
    less = memory_for(peak(config, 16) * 0.9)
    with pytest.raises(
        UserError,
        match="no part suits 0 of 2 GB, and reuse_fakes",
    ):
        settled(tiny.config(*AUTO, "training.reuse_fakes=true"), less)
    assert settled(tiny.config(*AUTO, "training.reuse_fakes=true"), 80) == 16
    assert settled(tiny.config(*AUTO, "training.acceleration=cuda_graphs"), less) == 4 < 8
    assert settled(config, less) == 8
    compares = "stages.2.discriminators.minibatch_stddev=true"
    with pytest.raises(
        UserError, match="no part suits"
    ):  # one sample would, but has none to compare with
        settled(tiny.config(*AUTO, compares), memory_for(peak(config, 1) * 1.2))


@pytest.mark.parametrize(
    ("overrides", "num_ranks", "memory_gb", "message"),
    [
        (
            [],
            1,
            2.1,
            "auto, and of 16 samples per process no part suits 0 of 2 GB; engine/plan.py shows",
        ),
        ([], 3, 80, "global_batch 16 is no multiple of 3 processes x micro_batch 1; nearest"),
        (["stages.2.training.sample_bank={num_videos: 3}"], 2, 80, "num_videos 3 must be a"),
    ],
)
def test_what_cannot_be(
    tiny: Tiny, overrides: list[str], num_ranks: int, memory_gb: float, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        settled(tiny.config(*AUTO, *overrides), memory_gb, num_ranks)


def test_a_run_says_it_and_goes_on_with_it(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, auto = tmp_path / "out", [word for key in AUTO for word in ("--set", key)]
    monkeypatch.setattr(micro_batch, "device_memory_gb", lambda device: 80.0)
    first = tiny.train(1, out, *auto, "--max-steps", "1")
    assert first.code == 0, first.err
    assert "note: micro_batch: auto is 16, of 16 samples per process" in first.out
    assert "batch 16 = 1 CPU x 16 samples x 1 accumulated" in first.out
    # A GPU that holds less: the run's norms keep their samples.
    monkeypatch.setattr(micro_batch, "device_memory_gb", lambda device: 2.2)
    second = tiny.trained(1, out, *auto, "--max-steps", "2")
    assert open_checkpoint(second).config().stages[1].training.micro_batch == 16


def test_ranks_must_agree(tiny: Tiny, forks: Forks, tmp_path: Path) -> None:
    """Two ranks, of which one has less memory than the other."""
    config = tiny.config(*AUTO)
    less = memory_for(peak(config, 4, number=1) * 1.2)
    script = tmp_path / "train.py"
    script.write_text(
        "import os, engine.train, engine.command_line\n"
        "from engine.planning import micro_batch\n"
        f"memory = 80.0 if os.environ['RANK'] == '0' else {less}\n"
        "micro_batch.device_memory_gb = lambda device: memory\n"
        "engine.command_line.run(engine.train.main)\n"
    )
    keys = [word for key in AUTO for word in ("--set", key)]
    finished = forks.script(2, script, *tiny.options(1, tmp_path / "out", *keys))
    assert finished.code == 2
    assert "error: micro_batch: auto came to 4 and to 8 on different ranks; use" in finished.err


def test_memory_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert local_processes() == 4
    quarter = micro_batch.device_memory_gb(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert micro_batch.device_memory_gb(torch.device("cpu")) == pytest.approx(4 * quarter)
