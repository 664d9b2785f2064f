"""What a plan takes for granted, and what can be refused before anything is counted."""

from dataclasses import dataclass

from engine.configuration import Config, accumulation_steps, share_among
from engine.errors import UserError
from engine.planning.devices import Device
from engine.trainer.sample_bank import batches_per_rank

GOAL_HFU = 0.55
"""Of executed FLOPs (`HFU`), the project's goal on an H100. Not measured on any device yet."""
MOST_SAMPLES = 100_000
"""Of a GPU per update. A step of them all is counted, for which latents and labels are drawn, and
all their divisors are tried; what trains so many is mistyped."""


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes for granted; each can be given on the command line."""

    device: Device
    num_gpus: int
    reserve_gb: float
    """Of the device's memory that no tensor gets: CUDA's context, cuDNN's and NCCL's buffers,
    prefetched clips, and what lies broken in the allocator. Decided, not measured."""
    hfu: float

    @property
    def limit_bytes(self) -> float:
        """What tensors get."""
        return (self.device.memory_gb - self.reserve_gb) * 1e9


def reserve_gb(memory_gb: float) -> float:
    """Of a device's memory, what is left to all but tensors where nobody says otherwise."""
    return 2 + memory_gb / 20


def checked(config: Config, number: int, assumptions: Assumptions) -> Config:
    """With a micro-batch no larger than a GPU's share, as train.py trains; "auto" is left.

    Raises UserError.
    """
    if number not in config.stages:
        raise UserError(f"--stage {number}: {config.name} has stages 1 to {len(config.stages)}")
    batch, num_gpus = config.stages[number].training.global_batch, assumptions.num_gpus
    if batch > MOST_SAMPLES * num_gpus:
        raise UserError(
            f"--gpus {num_gpus} cannot share training.global_batch {batch}: more than "
            f"{MOST_SAMPLES} samples for each; use more GPUs, or a smaller "
            f"--set stages.{number}.training.global_batch"
        )
    share_of(config, number, num_gpus)
    training = config.stages[number].training
    if training.micro_batch == "auto":
        smallest = training.model_copy(update={"micro_batch": 1})
    else:
        config = share_among(config, number, num_gpus)
        training = smallest = config.stages[number].training
        accumulation_steps(training, num_gpus)
    if training.sample_bank is not None:
        batches_per_rank(training.sample_bank, smallest, num_gpus)
    assumptions.device.tflops(training.precision)
    if assumptions.limit_bytes <= 0:
        raise UserError(
            f"--reserve {assumptions.reserve_gb:g} leaves nothing of --gpu-memory "
            f"{assumptions.device.memory_gb:g}"
        )
    return config


def share_of(config: Config, number: int, num_ranks: int) -> int:
    """Samples of a rank per update. Raises UserError where the ranks cannot share them evenly."""
    batch = config.stages[number].training.global_batch
    share, remainder = divmod(batch, num_ranks)
    if share == 0 or remainder:
        fewer = next(ranks for ranks in range(min(num_ranks, batch), 0, -1) if batch % ranks == 0)
        more = (batch // num_ranks + 1) * num_ranks
        raise UserError(
            f"--gpus {num_ranks} cannot share training.global_batch {batch} evenly; use --gpus "
            f"{fewer}, or --set stages.{number}.training.global_batch={more}"
        )
    return share
