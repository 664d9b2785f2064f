"""What ZeRO leaves on each rank, read off DeepSpeed's own optimizers."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Partition:
    """One network under one ZeRO stage; numbers of fp32 values."""

    zero_stage: int
    network: str
    num_parameters: int
    num_whole: int
    """Parameters that every rank holds whole while it trains; at ZeRO-3 the small ones only."""
    num_partitioned: int
    """A rank's part of the weights that the optimizer updates; Adam has two moments of each."""
    num_padding: int
    """By which all ranks' parts together exceed the parameters."""


def partition_of(engine: Any, network: str, zero_stage: int, world_size: int) -> Partition:
    """What the engine's optimizer has allocated for this rank, which is every rank's."""
    parameters = list(engine.module.parameters())
    if zero_stage == 3:
        num_parameters = sum(p.ds_numel for p in parameters)
        num_whole = sum(p.ds_numel for p in parameters if p.ds_persist)
        parts = engine.optimizer.fp32_partitioned_groups_flat
    else:
        num_parameters = num_whole = sum(p.numel() for p in parameters)
        # Without ZeRO the optimizer updates the parameters themselves, all of them.
        parts = parameters if zero_stage == 0 else engine.optimizer.single_partition_of_fp32_groups
    num_partitioned = sum(part.numel() for part in parts)
    num_ranks = 1 if zero_stage == 0 else world_size
    return Partition(
        zero_stage=zero_stage,
        network=network,
        num_parameters=num_parameters,
        num_whole=num_whole,
        num_partitioned=num_partitioned,
        num_padding=num_partitioned * num_ranks - num_parameters,
    )
