"""How a job's state is divided among its ranks: ZeRO's partitions, and the files of a checkpoint.

Partitions are read off DeepSpeed's own optimizers. Rank 0's files are what its saving code would
write, and the other ranks' follow from how ZeRO lays out parameters.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.models.construction import build_generator
from engine.trainer.checkpoint_meta import meta_text, rank_file, shard_file
from engine.trainer.engine_state import KEYS
from engine.trainer.networks import StageBuilder
from engine.trainer.previous import previous_contents
from engine.trainer.run_state import run_contents, run_facts
from engine.trainer.step import Trainer


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
    """The partition that the optimizer has allocated for this rank; every rank's is as large."""
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


UNKNOWN_HASH = "0" * 64


@dataclass(frozen=True)
class File:
    """A file of tensors."""

    tensors: dict[str, int]
    """Path inside the file -> number of values."""
    num_bytes: int
    """Of the tensors' storages; the rest, names and shapes, is some 0.3 KB a tensor."""


@dataclass(frozen=True)
class CheckpointLayout:
    """A checkpoint of all ranks, and what stands beside it."""

    by_rank: tuple[dict[str, File], ...]
    """What each rank writes, by path below the checkpoint."""
    meta_bytes: int
    previous: File | None
    """previous.pt, written once per stage; None where no frozen stage is needed."""

    @property
    def num_files(self) -> int:
        """The number of files, with meta.json."""
        return 1 + sum(len(files) for files in self.by_rank)

    @property
    def num_bytes(self) -> int:
        """The size of one checkpoint on disk."""
        files = (file for files in self.by_rank for file in files.values())
        return self.meta_bytes + sum(file.num_bytes for file in files)


def checkpoint_layout(trainer: Trainer, builder: StageBuilder) -> CheckpointLayout:
    """The checkpoint of a trainer that has trained, so that the optimizers have their moments."""
    mine = {name: _file(content()) for name, content in run_contents(trainer, builder).items()}
    world_size = builder.ranks.world_size
    by_rank = tuple(_files_of(rank, mine, trainer, builder) for rank in range(world_size))
    sizes = {
        name: (file.num_bytes, UNKNOWN_HASH) for files in by_rank for name, file in files.items()
    }
    meta = meta_text(trainer.step, run_facts(builder), dict(sorted(sizes.items())))
    return CheckpointLayout(by_rank, len(meta), _previous(builder))


def _previous(builder: StageBuilder) -> File | None:
    if builder.previous is None:
        return None
    cascade = builder.previous.cascade
    with torch.device("meta"):  # as they were trained: the frozen ones have dropped their weights
        generators = {
            n: build_generator(builder.config, n).state_dict() for n in range(1, builder.number)
        }
    return _file(previous_contents(generators, cascade))


def _file(value: Any) -> File:
    tensors = dict(_tensors_in(value))
    # As torch.save: a storage once, and whole, however many tensors look at parts of it.
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors.values()}
    return File({path: t.numel() for path, t in tensors.items()}, sum(storages.values()))


def _tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _tensors_in(item, f"{path}/{key}")


def _files_of(
    rank: int, of_rank_0: dict[str, File], trainer: Trainer, builder: StageBuilder
) -> dict[str, File]:
    """Another rank's files: its shards of both networks, and its random states."""
    if rank == 0:
        return of_rank_0
    files = {rank_file(rank): of_rank_0[rank_file(0)]}
    for name, engine in (("generator", trainer.g_engine), ("discriminators", trainer.d_engine)):
        lengths = _piece_lengths(engine, builder, rank)
        tensors = {f"/values/{key}/{name}": n for key in KEYS for name, n in lengths.items()}
        files[shard_file(name, rank)] = File(tensors, 4 * sum(tensors.values()))
    return files


def _piece_lengths(engine: Any, builder: StageBuilder, rank: int) -> dict[str, int]:
    """How many values of which parameters a rank updates, as ZeRO lays them out."""
    zero_stage = builder.config.stages[builder.number].training.zero_stage
    if zero_stage == 0:
        return {}
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    lengths = {}
    if zero_stage == 3:
        for parameter, name in names.items():
            size = parameter.ds_tensor.numel()
            lengths[name] = min(size, parameter.ds_numel - rank * size)
    else:
        ((row,), (parameters,)) = (
            engine.optimizer.single_partition_of_fp32_groups,
            engine.optimizer.bit16_groups,
        )
        first, stop, start = rank * row.numel(), (rank + 1) * row.numel(), 0
        for parameter in parameters:
            end = start + parameter.numel()
            lengths[names[parameter]] = min(end, stop) - max(start, first)
            start = end
    return {name: length for name, length in lengths.items() if length > 0}
