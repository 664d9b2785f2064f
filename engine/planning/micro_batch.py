"""`training.micro_batch: auto`: the largest micro-batch that is planned to fit a device's memory.

Planned is an upper bound, which may lie some per cent above what a divisor of the batch takes. And
no tensor may have more values than a 32-bit index counts (`Step.most_samples`).

Few samples leave a GPU waiting for Python: at 4 of them an iteration of Kinetics' stage 2 takes the
host longer to launch than a GPU is predicted to compute. Norm statistics are over all samples of a
pass, so more of them are also closer to the paper's, which accumulates nothing.
"""

import os
from collections.abc import Iterable

import torch

from engine.configuration import Config, Training, accumulation_steps, with_training
from engine.errors import UserError
from engine.planning.assumptions import reserve_gb
from engine.planning.peak import Scaling
from engine.planning.stage_memory import StageMemory, divisors
from engine.processors import local_processes
from engine.trainer.sample_bank import batches_per_rank


def settle_micro_batch(
    config: Config, number: int, *, num_ranks: int, memory_gb: float
) -> tuple[Config, str]:
    """The configuration with a number for "auto", and a line about it.

    `memory_gb` is a device's, in 10^9 bytes, of which `reserve_gb` is left to all but tensors.
    Raises UserError where the batch cannot be shared, or not even one sample fits.
    """
    training = config.stages[number].training
    one = training.model_copy(update={"micro_batch": 1, "reuse_fakes": False})
    share = accumulation_steps(one, num_ranks)
    if training.sample_bank is not None:
        batches_per_rank(training.sample_bank, one, num_ranks)
    memory = StageMemory(config, number, {})
    limit_gb = max(0.0, memory_gb - reserve_gb(memory_gb))
    found = largest_micro_batch(memory, share, num_ranks, limit_gb * 1e9)
    most_samples = memory.step(share).most_samples
    if found is None:
        conditions = [f"{limit_gb:.0f} of {memory_gb:.0f} GB"]
        if most_samples < share:
            conditions.append(f"{most_samples} samples, beyond which 32-bit indices do not reach")
        if training.reuse_fakes:
            conditions.append("reuse_fakes, which takes all of them at once")
        raise UserError(
            f"stages.{number}.training.micro_batch is auto, and of {share} samples per process no "
            f"part suits {', and '.join(conditions)}; engine/plan.py shows what would"
        )
    scaling = Scaling(training.zero_stage, num_ranks, accumulates=found < share)
    peak_gb = memory.bound(found, scaling) / 1e9
    return with_training(config, number, micro_batch=found), (
        f"micro_batch: auto is {found}, of {share} samples per process; planned peak "
        f"{peak_gb:.2g} of {memory_gb:.0f} GB"
        + (f"; 32-bit indices allow {most_samples}" if most_samples < share else "")
    )


def largest_micro_batch(
    memory: StageMemory, share: int, num_ranks: int, limit_bytes: float
) -> int | None:
    """The largest that fits and that the stage's settings allow, or None."""
    training = memory.config.stages[memory.number].training
    if training.acceleration == "cuda_graphs":
        limit_bytes /= 2  # recordings keep what a pass holds, once more at the most
    scaling = Scaling(training.zero_stage, num_ranks, accumulates=False)
    return memory.largest(share, scaling, limit_bytes, _allowed(memory, training, share, num_ranks))


def device_memory_gb(device: torch.device) -> float:
    """Of a GPU all its memory; of a CPU half of the machine's, for all of the job's processes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return pages / 2 / local_processes() / 1e9


def _allowed(memory: StageMemory, training: Training, share: int, num_ranks: int) -> Iterable[int]:
    """Divisors of the share: all of it where fakes are reused, whole batches of a bank's videos,
    samples to compare where the discriminators do."""
    compares = memory.config.stages[memory.number].discriminators.minibatch_stddev
    for micro_batch in divisors(share):
        if training.reuse_fakes and micro_batch < share:
            return
        if compares and micro_batch == 1 < share:
            return
        bank = training.sample_bank
        if bank is None or bank.num_videos % (num_ranks * micro_batch) == 0:
            yield micro_batch
