"""A network's weights and Adam's moments by parameter, whichever rank holds which part of them.

ZeRO lays parameters one behind the other and gives each rank a part, cut anywhere. Here a rank's
part is seen as pieces of parameters: ranges of their values, with weights and moments. A checkpoint
holds every rank's pieces as they are, and a rank that goes on reads those that overlap its own. So
it fits every ZeRO stage and number of ranks, and is the same bit for bit where neither changes.

DeepSpeed's own checkpoints fit only the ranks that wrote them, hold pickled classes, and keep
weights twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.trainer.host_copies import Copy, new_copy

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
KEYS = (WEIGHT, *MOMENTS)
Shard = dict[str, Any]
"""What a rank writes: Adam's `step`, where pieces start (`starts`, by parameter), their `values`
(by key of `KEYS` and parameter, one row each), and on rank 0 the network's `buffers`."""


@dataclass(frozen=True)
class Piece:
    """A range of a parameter's values, seen as one row, that this rank updates."""

    start: int
    tensors: Mapping[str, Tensor]
    """By `KEYS`: float32, the optimizer's own memory."""


def shard_of(
    engine: deepspeed.DeepSpeedEngine, *, zero_stage: int, rank: int, copy: Copy = new_copy
) -> Shard:
    """Copies, on the CPU, of what this rank is to write. No rank waits for another.

    Without ZeRO every rank updates all weights, and rank 0 writes them.
    """
    pieces = {} if zero_stage == 0 and rank > 0 else own_pieces(engine, zero_stage=zero_stage)
    buffers = buffers_of(engine.module) if rank == 0 else {}
    return {
        "step": _adam_step(engine),
        "starts": {name: piece.start for name, piece in pieces.items()},
        "values": {
            key: {name: copy(f"{key} {name}", piece.tensors[key]) for name, piece in pieces.items()}
            for key in KEYS
        },
        "buffers": {name: copy(f"buffer {name}", buffer) for name, buffer in buffers.items()},
    }


def load_shards(
    engine: deepspeed.DeepSpeedEngine, shards: Sequence[Shard], *, zero_stage: int
) -> None:
    """Restore what `shard_of` gave on all ranks of a run, however many those were. Collective.

    Call `check_shards` first: nothing is checked here.
    """
    module: nn.Module = engine.module
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            with deepspeed.zero.GatheredParameters(
                [parameter], modifier_rank=0, enabled=zero_stage == 3
            ):
                whole = _range(shards, WEIGHT, name, 0, parameter.numel())
                parameter.copy_(whole.view(parameter.shape))
        for name, piece in own_pieces(engine, zero_stage=zero_stage).items():
            for key, tensor in piece.tensors.items():
                tensor.copy_(_range(shards, key, name, piece.start, tensor.numel()))
        for name, buffer in buffers_of(module).items():
            buffer.copy_(shards[0]["buffers"][name])
    _set_adam_step(engine, shards[0]["step"])


def check_shards(network: nn.Module, shards: Sequence[Shard], source: str) -> None:
    """UserError, which begins with `source`, where they are not what ranks wrote of this network.

    All of every parameter must be there once, and nothing else.
    """
    problem = _problem(network, shards)
    if problem is not None:
        raise UserError(f"{source} {problem}")


def _problem(network: nn.Module, shards: Sequence[Shard]) -> str | None:
    sizes = {name: numel(parameter) for name, parameter in network.named_parameters()}
    for number, shard in enumerate(shards):
        if not _is_shard(shard):
            return f"holds no shard of a network (rank {number})"
    for name, size in sizes.items():
        for key in KEYS:
            ends = [0]
            pieces = sorted(
                (shard["starts"][name], shard["values"][key][name].numel())
                for shard in shards
                if name in shard["starts"]
            )
            for start, length in pieces:
                ends += [start, start + length]
            ends.append(size)
            if any(stop != start for stop, start in list(pairwise(ends))[::2]):
                return f"does not hold all of {name}, once ({key}; {size} values)"
    unknown = {name for shard in shards for name in shard["starts"]} - sizes.keys()
    if unknown:
        return f"holds {min(unknown)}, which the network lacks"
    found, expected = shards[0]["buffers"], buffers_of(network)
    for name in found.keys() ^ expected.keys():
        return f"{'lacks' if name in expected else 'holds'} the buffer {name}"
    for name, buffer in expected.items():
        if (found[name].shape, found[name].dtype) != (buffer.shape, buffer.dtype):
            return f"holds the buffer {name} as {found[name].dtype} {list(found[name].shape)}"
    if len({shard["step"] for shard in shards}) != 1:
        return "is of several steps"
    return None


def _is_shard(shard: Any) -> bool:
    """Whether its parts are of the right kinds, and its pieces the same ones everywhere."""
    if not isinstance(shard, dict) or shard.keys() != {"step", "starts", "values", "buffers"}:
        return False
    starts, values, buffers = shard["starts"], shard["values"], shard["buffers"]
    if not all(isinstance(part, dict) for part in (starts, values, buffers)):
        return False
    if not isinstance(shard["step"], int) or values.keys() != set(KEYS):
        return False
    rows = [row for key in KEYS for row in values[key].values()]
    return (
        all(isinstance(start, int) for start in starts.values())
        and all(values[key].keys() == starts.keys() for key in KEYS)
        and all(isinstance(row, Tensor) and row.ndim == 1 for row in rows)
        and all(row.dtype == torch.float32 for row in rows)
        and all(isinstance(buffer, Tensor) for buffer in buffers.values())
    )


def own_pieces(engine: deepspeed.DeepSpeedEngine, *, zero_stage: int) -> dict[str, Piece]:
    """By parameter, what this rank updates. Changing the tensors changes the optimizer's.

    They are not the network's weights at ZeRO 1 and beyond, but those that these are copied from.
    """
    _make_moments(engine)
    state = engine.basic_optimizer.state
    found = {}
    for name, parameter in engine.module.named_parameters():
        start, row, place = 0, parameter, slice(None)
        if zero_stage in (1, 2):
            mapping = parameter._hp_mapping
            if mapping is None:  # another rank's
                continue
            row = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            start, at = mapping.lp_fragment_address.start, mapping.hp_fragment_address
            place = slice(at.start, at.start + at.numel)
        elif zero_stage == 3:
            optimizer = engine.optimizer
            group, at, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            row = optimizer.fp32_partitioned_groups_flat[group]
            start = size * optimizer._get_param_partition_rank(parameter)
            # Behind its end the last ranks have nothing but padding.
            place = slice(at, at + max(0, min(size, parameter.ds_numel - start)))
        tensors = {WEIGHT: row.detach(), **{key: state[row][key] for key in MOMENTS}}
        piece = Piece(start, {key: tensor.view(-1)[place] for key, tensor in tensors.items()})
        if piece.tensors[WEIGHT].numel():
            found[name] = piece
    return found


def buffers_of(network: nn.Module) -> dict[str, Tensor]:
    """Those that belong to its state; every rank has the same ones."""
    parameters = {name for name, _ in network.named_parameters()}
    return {name: v for name, v in network.state_dict().items() if name not in parameters}


def _make_moments(engine: deepspeed.DeepSpeedEngine) -> None:
    """Adam makes its moments in its first step, so let it do one whose gradient is zero.

    Such a step changes no weight.
    """
    optimizer = engine.basic_optimizer
    if optimizer.state:
        return
    rows = _updated_rows(engine)
    groups = optimizer.param_groups
    kept = [group["params"] for group in groups], [row.grad for row in rows]
    for group in groups:
        group["params"] = []
    groups[0]["params"] = rows
    for row in rows:
        row.grad = torch.zeros_like(row)
    optimizer.step()
    for group, parameters in zip(groups, kept[0], strict=True):
        group["params"] = parameters
    for row, gradient in zip(rows, kept[1], strict=True):
        row.grad = gradient
    _set_adam_step(engine, 0)


def _updated_rows(engine: deepspeed.DeepSpeedEngine) -> list[Any]:
    """The tensors that Adam itself is given."""
    optimizer = engine.optimizer
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):  # ZeRO 1-2, 3
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return list(engine.module.parameters())


def _adam_step(engine: deepspeed.DeepSpeedEngine) -> int:
    """How often Adam has updated; each implementation keeps it in its own place."""
    optimizer = engine.basic_optimizer
    states = [*optimizer.state.values(), *optimizer.param_groups]
    return next((int(state["step"]) for state in states if "step" in state), 0)


def _set_adam_step(engine: deepspeed.DeepSpeedEngine, step: int) -> None:
    optimizer = engine.basic_optimizer
    for state in (*optimizer.state.values(), *optimizer.param_groups):
        if isinstance(state.get("step"), Tensor):
            state["step"].fill_(step)
        elif "step" in state:
            state["step"] = step


def _range(shards: Sequence[Shard], key: str, name: str, start: int, length: int) -> Tensor:
    """So many values of a parameter, from the pieces that hold them."""
    row = torch.empty(length)
    for shard in shards:
        if name in shard["starts"]:
            first, values = shard["starts"][name], shard["values"][key][name]
            low, high = max(start, first), min(start + length, first + values.numel())
            if low < high:
                row[low - start : high - start] = values[low - first : high - first]
    return row


def numel(parameter: nn.Parameter) -> int:
    """Also of a parameter that ZeRO-3 has partitioned."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
