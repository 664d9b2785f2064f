"""The report on a rehearsal, in words and tables."""

from collections.abc import Iterator

import deepspeed

from engine.rehearsal.layout import File
from engine.rehearsal.rehearse import Rehearsal

NOT_EXERCISED = (
    "not exercised: NCCL and the network, GPU kernels and memory, decoding, values (every number "
    "the host reads is 1), the steps of ranks 1 and up"
)


def report_lines(found: Rehearsal) -> Iterator[str]:
    """All that was found, for a person."""
    yield from _batch(found)
    yield from _data(found)
    yield from _partitions(found)
    yield from _layout(found)
    yield from _step(found)
    if found.left_out:
        yield f"rehearsed without: {', '.join(f'training.{name}' for name in found.left_out)}"
    yield NOT_EXERCISED


def _batch(found: Rehearsal) -> Iterator[str]:
    training, stage = found.training, found.config.stages[found.number]
    yield (
        f"rehearsal of {_ranks(found.world_size)}: stage {found.number} of {found.config.name}, "
        f"{stage.resolution}x{stage.resolution}, {stage.num_frames} frames; {training.precision}, "
        f"ZeRO-{training.zero_stage}"
    )
    yield (
        f"batch: {training.global_batch} = {_ranks(found.world_size)} x "
        f"{training.samples_per_pass} samples x {found.num_accumulated} accumulated"
    )
    sharing = found.world_size if training.synchronized_norms else 1
    yield f"norm statistics: over {training.samples_per_pass * sharing} samples"


def _data(found: Rehearsal) -> Iterator[str]:
    shares = found.shares
    fewest, most = min(shares.clips_of_rank), max(shares.clips_of_rank)
    per_rank = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    yield f"data: {found.data}"
    yield (
        f"  an epoch is {shares.epoch} clips, one of each usable video, in {shares.num_batches} "
        f"batches of {_ranks(found.world_size)}; {per_rank} clips a rank"
    )
    yield "  checked for every rank: each clip goes to exactly one, and none is left out"
    shown = ", ".join(map(str, shares.first_batch[:8]))
    more = ", ..." if len(shares.first_batch) > 8 else ""
    yield f"  rank 0 begins with the index's videos {shown}{more}"


def _partitions(found: Rehearsal) -> Iterator[str]:
    yield (
        f"ZeRO partitions, as DeepSpeed {deepspeed.__version__} itself made them for "
        f"{_ranks(found.world_size)} (fp32 values)"
    )
    heads = ("", "parameters", "whole on a rank", "updated by a rank", "all ranks' padding")
    yield "  " + heads[0].ljust(24) + "".join(head.rjust(20) for head in heads[1:])
    for part in found.partitions:
        label = f"{part.zero_stage} {part.network}"
        if part.zero_stage == found.training.zero_stage:
            label += " *"
        values = (part.num_parameters, part.num_whole, part.num_partitioned, part.num_padding)
        yield "  " + label.ljust(24) + "".join(f"{value:,}".rjust(20) for value in values)
    yield "  * as configured. Adam keeps two moments of each value that a rank updates."


def _layout(found: Rehearsal) -> Iterator[str]:
    layout, last = found.layout, found.world_size - 1
    yield "checkpoint: files and the bytes of their tensors"
    yield "  rank 0 writes"
    yield from _files(layout.by_rank[0])
    yield f"    {'meta.json':<64}{_size(layout.meta_bytes):>12}"
    if last:
        yield (
            f"  each of ranks 1 to {last} writes, under its number"
            if last > 1
            else "  rank 1 writes"
        )
        yield from _files(layout.by_rank[1])
    keep = found.training.keep_checkpoints
    yield (
        f"  {layout.num_files} files, {_size(layout.num_bytes)}; {_size(keep * layout.num_bytes)} "
        f"for the {keep} that are kept"
    )
    if layout.previous is not None:
        yield f"  once, beside them: previous.pt, {_size(layout.previous.num_bytes)}"


def _files(files: dict[str, File]) -> Iterator[str]:
    for name, file in sorted(files.items()):
        yield f"    {name:<64}{_size(file.num_bytes):>12}"


def _step(found: Rehearsal) -> Iterator[str]:
    part = (
        f", 1 of the {found.num_accumulated} micro-batches of each"
        if found.num_accumulated > 1
        else ""
    )
    yield (
        f"step: {found.training.discriminator_steps} D updates and 1 G update went through rank "
        f"0's trainer{part}; {found.num_operators} operators"
    )
    for name, (count, num_bytes) in sorted(found.collectives.items()):
        yield f"  {count} {name}, {_size(num_bytes)}"


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _size(num_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"
