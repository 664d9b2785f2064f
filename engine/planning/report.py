"""A plan as text and as JSON. GB are 10^9 bytes."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from engine.planning.assumptions import GOAL_HFU
from engine.planning.comparison import ComparedModel
from engine.planning.step_time import LINK_FRACTION, Work
from engine.planning.training_plan import PlanRow, TrainingPlan

GB = 1e9
GPUS_OF_A_NODE = 8


def as_text(plan: TrainingPlan, compared: Sequence[ComparedModel]) -> str:
    """For people."""
    parts = [_heading(plan), _rows(plan), _assumed(plan)]
    if compared:
        parts.append(_comparison(compared))
    return "\n\n".join(parts)


def as_json(plan: TrainingPlan, compared: Sequence[ComparedModel]) -> dict[str, Any]:
    """For programs: bytes, seconds, FLOPs."""
    stage = plan.config.stages[plan.number]
    assumed = plan.assumptions
    return {
        "name": plan.config.name,
        "stage": plan.number,
        "resolution": stage.resolution,
        "num_frames": stage.num_frames,
        "iterations": stage.training.iterations,
        "global_batch": stage.training.global_batch,
        "num_gpus": assumed.num_gpus,
        "samples_per_gpu": plan.share,
        "most_samples_per_pass": plan.most_samples,
        "micro_batch": stage.training.samples_per_pass,
        "precision": stage.training.precision,
        "device": asdict(assumed.device),
        "reserve_gb": assumed.reserve_gb,
        "hfu": assumed.hfu,
        "parameters": {"G": plan.generator_parameters, "D": plan.discriminator_parameters},
        "work_per_sample": {mode: asdict(work) for mode, work in plan.work.items()},
        "rows": [_row_as_json(row) for row in plan.rows],
        "comparison": [asdict(each) for each in compared],
    }


def _row_as_json(row: PlanRow) -> dict[str, Any]:
    found = asdict(row)
    found["peak"]["total"] = row.peak.total
    if row.largest is not None:
        found["largest"]["seconds"]["total"] = row.largest.seconds.total
    return found


def _heading(plan: TrainingPlan) -> str:
    stage, assumed = plan.config.stages[plan.number], plan.assumptions
    training = stage.training
    flops = ", ".join(f"{mode} {work.flops / 1e12:.3g}" for mode, work in plan.work.items())
    used: Work = plan.work[training.checkpointing]
    frozen = f"; the frozen stages {used.frozen_flops / 1e12:.3g} more" if used.frozen_flops else ""
    gpus = "1 GPU" if assumed.num_gpus == 1 else f"{assumed.num_gpus} GPUs"
    return "\n".join(
        (
            f"stage {plan.number} of {plan.config.name}: {stage.resolution}x{stage.resolution}, "
            f"{stage.num_frames} frames, {training.precision}; "
            f"{assumed.num_gpus} x {assumed.device.title} of {assumed.device.memory_gb:g} GB",
            f"batch {training.global_batch} = {gpus} x {plan.share} samples; "
            f"configured: micro-batch {training.samples_per_pass}"
            f"{plan.chosen_by}, ZeRO-{training.zero_stage}, "
            f"checkpointing {training.checkpointing}",
            f"parameters: G {plan.generator_parameters / 1e6:.1f} M, "
            f"D {plan.discriminator_parameters / 1e6:.1f} M",
            f"TFLOP per sample and iteration: {flops}{frozen}; per GPU and iteration "
            f"{plan.share * (used.flops + used.frozen_flops) / 1e12:.4g}",
            f"bytes moved by operators per sample and iteration: {used.moved_bytes / GB:.3g} GB",
        )
    )


def _rows(plan: TrainingPlan) -> str:
    micro_batch = plan.config.stages[plan.number].training.samples_per_pass
    headers = [
        *("ZeRO", "checkpointing", "parameters", "optimizer", "gradients", "activations"),
        *("peak", "in", "|", "largest", "accumulated", "peak", "s/iteration", "days"),
    ]
    lines = []
    for row in plan.rows:
        peak = row.peak
        parts = (peak.parameters, peak.optimizer, peak.gradients, peak.activations)
        line = [str(row.zero_stage), row.checkpointing, *(f"{part / GB:.3g}" for part in parts)]
        line += [f"{peak.total / GB:.3g}" + ("" if row.fits else " !")]
        line += [f"{peak.update} {peak.phase}", "|"]
        found = row.largest
        line += (
            ["none fits", "", "", "", ""]
            if found is None
            else [
                str(found.micro_batch),
                f"x {found.accumulation}",
                f"{found.peak_bytes / GB:.3g}",
                f"{found.seconds.total:.3g}",
                f"{found.days:.3g}",
            ]
        )
        lines.append(line)
    title = (
        f"GB per GPU at its peak, micro-batch {micro_batch} (! does not fit)  |  the largest "
        f"micro-batch within {plan.assumptions.limit_bytes / GB:.1f} GB"
    )
    return f"{title}\n{_table(headers, lines)}"


def _host(plan: TrainingPlan) -> list[str]:
    """Main memory, where the optimizer is offloaded."""
    most = max(row.peak.host for row in plan.rows)
    if not most:
        return []
    return [
        f"Offloaded to main memory: up to {most / GB:.3g} GB per GPU; its time is not predicted."
    ]


def _left_out(plan: TrainingPlan) -> list[str]:
    """The parts of this run that the plan leaves out."""
    lines = []
    if plan.most_samples < plan.share:
        lines.append(
            f"No micro-batch beyond {plan.most_samples} is recommended: a tensor would have more "
            "values than a 32-bit index counts, which no GPU has run yet."
        )
    if plan.config.stages[plan.number].training.acceleration != "none":
        lines.append(
            "training.acceleration is left out: its time, and what CUDA graphs hold of memory."
        )
    if plan.assumptions.num_gpus > GPUS_OF_A_NODE:
        lines.append(
            "The link's rate is that within a node unless --link gave the one between nodes."
        )
    return lines


def _assumed(plan: TrainingPlan) -> str:
    assumed, device = plan.assumptions, plan.assumptions.device
    goal = ", the project's goal, which is not measured" if assumed.hfu == GOAL_HFU else ""
    rate = device.tflops(plan.config.stages[plan.number].training.precision)
    return "\n".join(
        (
            *_host(plan),
            *_left_out(plan),
            "Memory is counted on the meta device and from what DeepSpeed allocates. "
            f"{assumed.reserve_gb:g} of {device.memory_gb:g} GB are left",
            "to CUDA, cuDNN, NCCL, prefetched clips and fragmentation (--reserve). ZeRO-3 is an "
            "upper bound.",
            f"Times are predictions: {assumed.hfu:.0%} of {rate:g} TFLOP/s (--hfu{goal}) or, if "
            f"longer, operators' bytes at {device.bandwidth_gb_per_second:g} GB/s;",
            f"then communication at {LINK_FRACTION:.0%} of {device.link_gb_per_second:g} GB/s, not "
            f"overlapped. Rates: {device.source}.",
        )
    )


def _comparison(compared: Sequence[ComparedModel]) -> str:
    headers = [
        *("model", "samples/GPU", "MB", "s/iteration", "s/sample", "|"),
        *("paper: samples/GPU", "MB", "s/iteration", "s/sample"),
    ]
    lines = []
    for each in compared:
        line = [
            f"{each.name} {each.stage}: {each.resolution}x{each.resolution}/{each.num_frames}",
            str(each.samples_per_gpu),
            f"{each.memory_mb:.0f}",
            f"{each.seconds_per_iteration:.3g}",
            f"{each.seconds_per_sample:.3g}",
            "|",
        ]
        paper = each.paper
        line += (
            ["", "", "", ""]
            if paper is None
            else [
                str(paper.samples_per_gpu),
                str(paper.memory_mb),
                f"{paper.seconds_per_iteration:g}",
                f"{paper.seconds_per_iteration / paper.samples_per_gpu:.3g}",
            ]
        )
        lines.append(line)
    title = (
        "Beside DVD-GAN, predicted here at the paper's samples per GPU, and measured in its Table 3"
        " (fp32, 32 GB):"
    )
    return f"{title}\n{_table(headers, lines)}"


def _table(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(headers, *lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (headers, *lines)
    )
