"""Generate videos with a trained cascade, unrolled to any length."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.command_line import ArgumentParser, run
from engine.dummy_passes import TrainedCascade, choose_passes, clip_length, load_trained
from engine.errors import UserError
from engine.exported import find_trained
from engine.models.construction import forbid_tf32
from engine.sample_files import ARCHIVE, FORMATS, FRAMES, GRID, SHEET, STAGES, make_writable, write
from engine.sampled_dataset import CLIPS, complete_dataset, draw_labels
from engine.sampling import SamplePlan, beyond_training, choose_labels, fix_statistics, stream
from engine.stage_files import StageFiles
from engine.trainer.ranks import Ranks
from engine.transfers import device_named
from engine.video.writing import NUM_COLUMNS, evenly_spaced

DATASET_FORMATS = ("mp4",), ("png",)
EPILOG = """\
examples:
  python engine/sample.py --checkpoint runs/sample --frames 50 --out samples
  python engine/sample.py --checkpoint runs/kinetics600/stage2 --frames 50 --classes 3,7 --sigma 0.5
  python engine/sample.py --checkpoint runs/ucf101 --num 2048 --format npz --out samples
  python engine/sample.py --checkpoint released --frames 1000 --out samples

Writes the clips, grid.mp4 and contact-sheet.png with the first 64 of them, samples.json (what was
asked for) and norm-statistics.pt. The same checkpoint, options and seed give the same videos; more
clips or other classes leave the clips that both have unchanged.

--format says what the clips are written as:
  mp4  clip-000-NAME.mp4, H.264, to look at. It blurs colours and changes fine detail, and clips
       below 128x128 are enlarged: do not compute metrics from it.
  webp, gif  clip-000-NAME.webp or .gif, animated, for pages that show no videos. A clip's frames
       are all in memory meanwhile; gif has 256 colours.
  png  frames/clip-000-NAME/000000.png and so on, exact: a folder per clip, for tools that read
       frames. Nothing but frames is below frames/.
  npz  samples.npz, exact: "videos", uint8 [N, T, H, W, 3], "labels", [N], where there are classes,
       and "fps". N * T * H * W * 3 bytes, which np.load(...)["videos"] reads into memory.
"""


def _formats(text: str) -> tuple[str, ...]:
    named = [part.strip() for part in text.split(",")]
    for name in named:
        if name not in FORMATS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(FORMATS)}")
        if named.count(name) > 1:
            raise argparse.ArgumentTypeError(f"{name} is named twice")
    return tuple(name for name in FORMATS if name in named)


def _columns(text: str) -> tuple[int, ...]:
    numbers = [part.strip() for part in text.removeprefix("t=").split(",")]
    for number in numbers:
        if not number.isdecimal():
            raise argparse.ArgumentTypeError(f"{number!r} is no frame's number")
    return tuple(map(int, numbers))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line's options."""
    parser = ArgumentParser(__doc__ or "", EPILOG)
    add = parser.add_argument
    parser.add_generation()
    add("--out", type=Path, required=True, metavar="DIR", help="where to write")
    add("--frames", type=int, metavar="T", help="length (default: stage 1's clip, unrolled)")
    add(
        "--classes",
        metavar="A,B",
        help="numbers or names (default: all trained on, in turn); as in CSV, a name with a comma "
        """stands in double quotes: --classes '3,"lifting, then dropping"'""",
    )
    add(
        "--statistics-frames",
        type=int,
        metavar="T",
        help="length of the videos that the norms' statistics are taken of (default: --frames, at "
        "most four times the training clip; longer videos repeat the statistics in the middle)",
    )
    add(
        "--columns",
        type=_columns,
        metavar="A,B",
        help="numbers of the frames that contact-sheet.png and strips show (default: 8, evenly)",
    )
    add(
        "--random-window",
        action="store_true",
        help="upsample one random window of the clip before, as in training, instead of all of it: "
        "what the paper's scores of 6 and 12 frames are of (its footnote 1)",
    )
    add(
        "--stages",
        action="store_true",
        help="write what every stage makes of each clip, and a strip of them, into stages/",
    )
    add("--num", type=int, metavar="N", help="clips (default: one per class, at most 16)")
    add(
        "--interpolate",
        type=int,
        metavar="N",
        help="for each of the clips, N that lead from one latent to another of the same class",
    )
    add(
        "--as-dataset",
        type=int,
        metavar="N",
        help="write N clips for other evaluators, with the data's classes: clips/CLASS/000000.mp4, "
        "or folders of frames with --format png; a run that was stopped goes on",
    )
    add(
        "--format",
        type=_formats,
        default="mp4",
        metavar="A,B",
        help="mp4, webp or gif to look at; png or npz, which lose nothing, for metrics (default: "
        "%(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.random_window:
        for name in ("frames", "statistics_frames", "stages"):
            if getattr(options, name):
                parser.error(f"--random-window and --{name.replace('_', '-')} exclude each other")
    if options.as_dataset is not None:
        for name in ("classes", "num", "stages", "columns", "interpolate"):
            if getattr(options, name):
                parser.error(f"--as-dataset and --{name} exclude each other")
        if options.format not in DATASET_FORMATS:
            parser.error("--as-dataset: --format must be mp4 or png")
    parser.check_generation(
        options, frames=1, num=1, statistics_frames=1, as_dataset=1, interpolate=2
    )
    return options


def plan_of(options: argparse.Namespace, trained: TrainedCascade) -> SamplePlan:
    """What the options ask for. Raises UserError for what there is not."""
    config, stage_number = trained.config(), trained.stage_number
    num_frames = options.frames or clip_length(trained)
    if options.random_window:
        if stage_number == 1:
            raise UserError("--random-window: a single stage upsamples no windows")
        num_frames = config.stages[stage_number].num_frames
    if options.as_dataset is None:
        num = options.num or (1 if options.interpolate and options.classes is None else None)
        labels = choose_labels(options.classes, num, trained)
        labels = [label for label in labels for _ in range(options.interpolate or 1)]
    else:
        labels = draw_labels(trained, options.as_dataset, options.seed)
    return SamplePlan(
        checkpoint=trained,
        labels=labels,
        num_frames=num_frames,
        sigma=options.sigma,
        seed=options.seed,
        passes=choose_passes(
            trained,
            num_frames=num_frames,
            sigma=options.sigma,
            seed=options.seed,
            num_passes=options.passes,
            batch_size=options.batch,
            statistics_frames=options.statistics_frames,
            windows=options.random_window,
        ),
        interpolated=options.interpolate,
    )


def columns_of(options: argparse.Namespace, num_frames: int) -> Sequence[int]:
    """Numbers of the frames that are shown. Raises UserError for what there is not."""
    last = num_frames - 1
    if options.columns is not None and max(options.columns) > last:
        raise UserError(f"--columns: there is no frame {max(options.columns)}; the last is {last}")
    return options.columns or evenly_spaced(num_frames, NUM_COLUMNS)


def main(arguments: list[str]) -> None:
    """Load, fix the norms' statistics, generate, write."""
    options = parse(arguments)
    trained = find_trained(options.checkpoint)
    plan = plan_of(options, trained)
    columns = columns_of(options, plan.num_frames)
    print(f"checkpoint: {trained.path} (stage {trained.stage_number}, step {trained.step})")
    for note in notes_on(plan):
        print(f"note: {note}")
    device = device_named(options.device)
    if options.as_dataset is not None:
        write_dataset(plan, options, device)
    else:
        write_samples(plan, options, columns, device)


def write_samples(
    plan: SamplePlan, options: argparse.Namespace, columns: Sequence[int], device: torch.device
) -> None:
    """Clips to look at or to measure; all at once, in place of an earlier run's."""
    make_writable(options.out, plan, options.format, stages=options.stages)
    forbid_tf32()
    cascade = load_trained(plan.checkpoint, device)
    fix_statistics(cascade, plan, options.out)
    stages = StageFiles(plan.checkpoint, columns) if options.stages else None
    videos = stream(cascade, plan) if stages is None else stream(cascade, plan, stages.add)
    write(options.out, videos, plan, options.format, columns=columns, stages=stages)
    print(f"wrote: {len(plan.labels)} clips of {plan.num_frames} frames")
    folders = {"png": FRAMES, "npz": ARCHIVE}
    written = [GRID, SHEET, *([STAGES] if options.stages else [])]
    for name in [*written, *(folders[name] for name in options.format if name in folders)]:
        print(f"  {options.out / name}")


def write_dataset(plan: SamplePlan, options: argparse.Namespace, device: torch.device) -> None:
    """A folder of clips for other projects' evaluators; what is there already stays."""
    (form,) = options.format
    made, total = complete_dataset(options.out, plan, form, Ranks.alone(device)), len(plan.labels)
    kept = f", {total - made} were there" if made < total else ""
    print(f"wrote: {made} clips of {plan.num_frames} frames into {options.out / CLIPS}{kept}")


def notes_on(plan: SamplePlan) -> list[str]:
    """What a user must know of the plan."""
    trained, num_frames = plan.checkpoint, plan.num_frames
    notes = []
    if not plan.passes.windows:
        notes = beyond_training(trained.config(), trained.stage_number, num_frames)
    if num_frames != plan.passes.num_frames:
        notes.append(f"norm statistics of {plan.passes.num_frames} frames serve {num_frames}")
    return notes


if __name__ == "__main__":
    run(main)
