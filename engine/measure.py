"""Measure what a checkpoint generates: motion, judder, variety, classes, beside real clips'."""

import argparse
from pathlib import Path

from engine.command_line import ArgumentParser, run
from engine.durable_files import make_writable_folder, write_json
from engine.errors import UserError
from engine.exported import find_trained

EPILOG = """\
examples:
  python engine/measure.py --checkpoint runs/sample --out runs/sample/figures.json
  python engine/measure.py --checkpoint runs/kinetics600/stage1 --held-out indexes/validation.jsonl

Makes clips as engine/sample.py does and compares them with real clips that were not trained on. The
other rows say what the figures are worth: real clips pass, each kind of spoilt clip fails.
engine/clip_figures.py defines every figure.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line's options."""
    parser = ArgumentParser(__doc__ or "", EPILOG)
    add = parser.add_argument
    parser.add_generation()
    add(
        "--held-out",
        metavar="PATH",
        help="an index or folder of videos that were not trained on (default: another seed of the "
        "sample data set, made beside it; for other data the training videos)",
    )
    add(
        "--data",
        metavar="PATH",
        help="the training videos, to train the classifiers on (default: the checkpoint's)",
    )
    add("--out", type=Path, metavar="FILE", help="write all figures there, as JSON")
    add(
        "--picture",
        type=Path,
        metavar="FILE.webp",
        help="show generated clips there, real ones above them, as an animated WebP",
    )
    add("--num", type=int, metavar="N", help="clips per class (default: 8; 64 without classes)")
    options = parser.parse_args(arguments)
    parser.check_generation(options, num=2)
    for name in ("data", "held_out"):
        if getattr(options, name) == "":  # a shell variable that is not set
            parser.error(f"--{name.replace('_', '-')} names nothing")
    if options.picture is not None and options.picture.suffix != ".webp":
        parser.error(f"--picture {options.picture}: the name must end in .webp")
    return options


def make_writable(file: Path) -> None:
    """Make the file's folder; UserError where it cannot be written. Due before the long passes."""
    make_writable_folder(file.parent)
    if file.is_dir():
        raise UserError(f"cannot write {file}: it is a folder")


def main(arguments: list[str]) -> None:
    """Find, measure, print, write."""
    options = parse(arguments)
    checkpoint = find_trained(options.checkpoint)
    # Imported late: it brings DALI, and mistakes should be told at once.
    from engine.evaluation.report import ReportOptions, report
    from engine.transfers import device_named
    from engine.video.writing import animation, to_uint8

    device = device_named(options.device)
    print(
        f"checkpoint: {checkpoint.path} (stage {checkpoint.stage_number}, step {checkpoint.step})"
    )
    for file in (options.out, options.picture):
        if file is not None:
            make_writable(file)
    made_of = ReportOptions(
        data=options.data,
        held_out=options.held_out,
        num=options.num,
        seed=options.seed,
        sigma=options.sigma,
        passes=options.passes,
        batch=options.batch,
    )
    measured = report(checkpoint, made_of, device)
    print(f"\n{measured.table()}")
    if options.out is not None:
        write_json(options.out, measured.to_tree())
        print(f"wrote: {options.out}")
    if options.picture is not None:
        rows = [(name, to_uint8(video_BTCHW)) for name, video_BTCHW in measured.examples]
        fps = checkpoint.frames_per_second
        animation(rows, options.picture, fps, scale=max(1, 64 // rows[0][1].shape[-1]))
        print(f"wrote: {options.picture}")


if __name__ == "__main__":
    run(main)
