"""Export a trained cascade: one folder to pass on, with weights, statistics and a model card."""

import argparse
from pathlib import Path

from engine.command_line import ArgumentParser, run
from engine.dummy_passes import choose_passes, clip_length, load_trained
from engine.durable_files import make_writable_folder
from engine.exported import CARD, CONFIG, WEIGHTS, find_trained, fix_norms, write_exported
from engine.models.construction import forbid_tf32
from engine.transfers import device_named

EPILOG = """\
examples:
  python engine/export.py --checkpoint runs/sample --out released
  python engine/export.py --checkpoint runs/kinetics600/stage2 --sigma 0.5 --out for-pictures

Writes config.json, model.safetensors and README.md, the model card, into --out. sample.py and
Python (`from engine import Cascade`) take the folder where they take a checkpoint. It samples with
the norm statistics that are collected here, whatever the length of its videos.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line's options."""
    parser = ArgumentParser(__doc__ or "", EPILOG)
    parser.add_generation()
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    parser.add_argument(
        "--statistics-frames",
        type=int,
        metavar="T",
        help="length of the videos that the norms' statistics are taken of (default: the training "
        "clip's, unrolled)",
    )
    options = parser.parse_args(arguments)
    parser.check_generation(options, statistics_frames=1)
    return options


def main(arguments: list[str]) -> None:
    """Load, collect the norms' statistics, write."""
    options = parse(arguments)
    trained = find_trained(options.checkpoint)
    print(f"checkpoint: {trained.path} (stage {trained.stage_number}, step {trained.step})")
    make_writable_folder(options.out)
    passes = choose_passes(
        trained,
        num_frames=clip_length(trained),
        sigma=options.sigma,
        seed=options.seed,
        num_passes=options.passes,
        batch_size=options.batch,
        statistics_frames=options.statistics_frames,
    )
    device = device_named(options.device)
    forbid_tf32()
    cascade = load_trained(trained, device)
    fix_norms(cascade, trained, passes)
    write_exported(options.out, cascade, trained, passes)
    for name in (CONFIG, WEIGHTS, CARD):
        print(f"wrote: {options.out / name} ({(options.out / name).stat().st_size:,} bytes)")


if __name__ == "__main__":
    run(main)
