"""Plan the training of one stage: memory, micro-batch and time, before a GPU is paid for."""

import argparse
import contextlib
import json
import sys

from engine.command_line import ArgumentParser, find_config, run
from engine.configuration import Config, load_config
from engine.planning.assumptions import GOAL_HFU, Assumptions, checked, find_device, reserve_gb

EPILOG = """\
examples:
  python engine/plan.py --config configs/kinetics600.yaml --stage 2 --gpus 8 --gpu-memory 80
  python engine/plan.py --config configs/dvdgan.yaml --set variant=frames48 --stage 1 --gpus 64 \\
      --device a100-40 --json

No GPU is needed: the stage's own networks take a training step on tensors without values. What it
prints as predicted has not been measured.
"""
MOST_GPUS = 1_000_000  # how many could share a batch is found by trying them
DVDGAN_OF_TABLE_3 = "variant=frames48", "stages.1.num_frames=50"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line's options."""
    parser = ArgumentParser(__doc__ or "", EPILOG)
    parser.add_argument("--stage", type=int, required=True, metavar="N", help="which stage to plan")
    parser.add_configuration()
    parser.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="how many (default: %(default)s)"
    )
    parser.add_argument(
        "--device", default="h100", metavar="NAME", help="which GPU (default: %(default)s)"
    )
    for option, metavar, help_text in (
        ("--gpu-memory", "GB", "memory of a GPU, in 10^9 bytes (default: the device's)"),
        ("--reserve", "GB", "of it left to all but tensors (default: 2 and a twentieth of it)"),
        ("--tflops", "RATE", "peak of matrix products (default: the device's)"),
        ("--hfu", "FRACTION", "of that peak that executed FLOPs reach (default: the goal, 0.55)"),
        ("--bandwidth", "GB/S", "of a GPU's memory (default: the device's)"),
        ("--link", "GB/S", "between GPUs, in one direction (default: the device's)"),
    ):
        parser.add_argument(option, type=float, metavar=metavar, help=help_text)
    parser.add_argument(
        "--against",
        metavar="FILE",
        help="DVD-GAN's configuration to compare with, or none (default: configs/dvdgan.yaml for "
        "128x128, else none)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if options.gpus < 1:
        parser.error("--gpus must be at least 1")
    if options.gpus > MOST_GPUS:
        parser.error(f"--gpus must be at most {MOST_GPUS}")
    for name in ("gpu_memory", "tflops", "hfu", "bandwidth", "link"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be more than 0, not {value:g}")
    if options.reserve is not None and not 0 <= options.reserve < float("inf"):
        parser.error(f"--reserve must be 0 or more, not {options.reserve:g}")
    if options.hfu is not None and options.hfu > 1:
        parser.error(f"--hfu is a fraction of the peak, at most 1, not {options.hfu:g}")
    return options


def main(arguments: list[str]) -> None:
    """Parse, check, count, print."""
    options = parse(arguments)
    config = load_config(find_config(options.config), options.overrides)
    device = find_device(
        options.device,
        memory_gb=options.gpu_memory,
        tflops=options.tflops,
        bandwidth_gb_per_second=options.bandwidth,
        link_gb_per_second=options.link,
    )
    assumptions = Assumptions(
        device=device,
        num_gpus=options.gpus,
        reserve_gb=(reserve_gb(device.memory_gb) if options.reserve is None else options.reserve),
        hfu=options.hfu or GOAL_HFU,
    )
    checked(config, options.stage, assumptions)
    dvdgan = baseline(options.against, config)

    # Imported late: these pull in DeepSpeed, which talks while it is imported. What it says goes
    # where progress does.
    with contextlib.redirect_stdout(sys.stderr):
        from engine.planning.comparison import compare
        from engine.planning.report import as_json, as_text
        from engine.planning.training_plan import Planner

        planner = Planner(assumptions, say)
        plan = planner.plan(config, options.stage)
        precision = plan.config.stages[options.stage].training.precision
        compared = (
            [] if dvdgan is None else compare(planner, assumptions, config, dvdgan, precision)
        )
    print(json.dumps(as_json(plan, compared)) if options.json else as_text(plan, compared))


def baseline(against: str | None, config: Config) -> Config | None:
    """What to compare with: a file's model, or the paper's DVD-GAN for 128x128, or nothing."""
    if against is None:
        if config.resolution != 128:
            return None
        return load_config(find_config("configs/dvdgan.yaml"), DVDGAN_OF_TABLE_3)
    return None if against == "none" else load_config(find_config(against))


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
