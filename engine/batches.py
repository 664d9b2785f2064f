"""How ranks share a global batch: micro-batches, and how many of them are accumulated."""

from itertools import islice

from engine.configuration import Config, Training, with_training
from engine.errors import UserError

# A message offers the nearest micro-batch that works. So many are tried on either side: that takes
# no time, whatever batch was typed, and one farther off is of no use.
_MICRO_BATCHES_TRIED = 1_000_000


def accumulation_steps(training: Training, world_size: int) -> int:
    """Forward passes per rank and update: global_batch / (world_size * micro_batch).

    Raises UserError when that is not a whole number, naming the nearest batches that work, and
    when `reuse_fakes` would have to hold several passes.
    """
    steps, remainder = divmod(training.global_batch, world_size * training.samples_per_pass)
    if remainder:
        processes = "1 process" if world_size == 1 else f"{world_size} processes"
        raise UserError(
            f"training.global_batch {training.global_batch} is no multiple of {processes} x "
            f"micro_batch {training.micro_batch}; nearest that work: "
            f"{_nearest_batches(training, world_size)}"
        )
    if training.reuse_fakes and steps > 1:
        raise UserError(
            f"training.reuse_fakes holds one pass of G, but {steps} are accumulated; "
            f"set micro_batch={steps * training.samples_per_pass}, or reuse_fakes=false"
        )
    return steps


def share_among(config: Config, stage_number: int, world_size: int) -> Config:
    """Lower a stage's micro_batch to a rank's share of the global batch, where that is less.

    So that a small configuration runs on many GPUs as it stands; nothing is ever raised.
    """
    stage = config.stages[stage_number]
    share, remainder = divmod(stage.training.global_batch, world_size)
    if remainder or not 0 < share < stage.training.samples_per_pass:
        return config
    return with_training(config, stage_number, micro_batch=share)


def num_generations(training: Training) -> int:
    """How often G generates a batch in an iteration: for every D update, and for its own."""
    return training.discriminator_steps + (0 if training.reuse_fakes else 1)


def _nearest_batches(training: Training, world_size: int) -> str:
    """The next smaller and larger micro-batch, where one works, and global batch."""
    share, remainder = divmod(training.global_batch, world_size)
    micro = training.samples_per_pass
    micros: list[int] = []
    if not remainder:
        smaller = range(micro - 1, max(micro - _MICRO_BATCHES_TRIED, 1) - 1, -1)
        larger = range(micro + 1, min(micro + _MICRO_BATCHES_TRIED, share) + 1)
        for sizes in smaller, larger:
            micros += islice((size for size in sizes if share % size == 0), 1)
    # Shares that work are those below the micro-batch, as share_among lowers it, and its multiples.
    below, above = (training.global_batch - 1) // world_size, share + 1
    below -= below % micro if below > micro else 0
    above += -above % micro if above > micro else 0
    globals_ = [world_size * share for share in (below, above) if share]
    found = {"micro_batch": micros, "global_batch": globals_}
    return ", or ".join(
        f"{key} {' or '.join(map(str, sizes))}" for key, sizes in found.items() if sizes
    )
