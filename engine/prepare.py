"""Index a folder of videos for training: decode every file, list what is usable and what is not.

With --transcode also copy them at the size that is trained on, and index the copies.
"""

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import Any

from engine.command_line import ArgumentParser, run
from engine.video.encoding import DEFAULT_CODEC, ENCODINGS
from engine.video.index import Reject, VideoIndex, rejects_path
from engine.video.indexing import build_index
from engine.video.reasons import by_kind

EPILOG = """\
layouts:
  class folders      DIR/archery/a.mp4, DIR/bowling/b.mp4   (Kinetics-600, UCF101's UCF-101)
  flat               DIR/a.mp4, DIR/b.mp4                   (BDD100K's videos/train: no classes)
  with --annotations clips anywhere below DIR: <youtube_id>_<start>_<end>.mp4 or <youtube_id>.mp4 of
                     a Kinetics CSV, Archery/v_Archery_g01_c01.avi of UCF101's trainlist01.txt

A label is a class's position among all classes: those of --classes FILE or of the classInd.txt
beside a UCF101 list, in their order; else those of the CSV or the folders, sorted by name. Where
only some classes are there yet, --classes keeps the labels that the whole data set will have.

Of several files with a clip's name, the one that can be decoded is taken; where two can and differ,
neither is. Captions and thumbnails beside the clips do no harm.

Interrupt it at any time: the same command goes on where it stopped. Run again, it decodes only
files that are new or changed; delete INDEX to judge everything afresh.

example:
  python engine/prepare.py videos/kinetics600/train --out indexes/kinetics600.jsonl --workers 16

UCF101 as unpacked, its first training split:
  python engine/prepare.py UCF-101 --annotations ucfTrainTestlist/trainlist01.txt --out ucf101.jsonl

small copies, which a core can decode for a GPU, for a cascade that ends at 128x128; train with
--data small/index.jsonl:
  python engine/prepare.py videos/kinetics600/train --transcode small --size 128 \\
      --out small/index.jsonl --workers 16

A copy has its source's frames under their numbers, its label and its aspect ratio. The shorter side
is --size, or the source's where that is smaller. mjpeg decodes fastest; vp9 takes a third of its
space. Each copy is decoded in full and compared with its source; one that differs is rejected.
Run again with the same options, it copies only what is new or changed.
"""


def main(arguments: list[str]) -> None:
    """Parse, index, summarise."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _check(parser, options)
    judging: dict[str, Any] = {
        "annotations": options.annotations,
        "classes": options.classes,
        "follow_symlinks": options.follow_symlinks,
        "num_workers": options.workers,
        "say": lambda line: print(f"note: {line}"),
    }
    if options.transcode is None:
        print(summary(*build_index(options.folder, options.out, **judging), options.out))
        return
    from engine.video.transcoding import build_copies  # late: it brings torch, which is slow

    codec = options.codec or DEFAULT_CODEC
    made = build_copies(
        options.folder, options.out, options.transcode, size=options.size, codec=codec, **judging
    )
    entries = made.index.entries
    megabytes = sum(entry.size_bytes for entry in entries) / 1e6
    print(f"copied    {made.num_made} videos, {len(entries) - made.num_made} were there already")
    print(summary(made.index, made.rejects, options.out))
    print(f"copies    {options.transcode}, {megabytes:.1f} MB")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__ or "", EPILOG)
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of videos")
    parser.add_argument(
        "--out",
        metavar="INDEX",
        type=Path,
        required=True,
        help="index file to write (.jsonl); rejects are listed beside it",
    )
    parser.add_argument(
        "--annotations",
        metavar="FILE",
        type=Path,
        help="Kinetics CSV (label, youtube_id, time_start, time_end) or UCF101 trainlist, testlist",
    )
    parser.add_argument(
        "--classes",
        metavar="FILE",
        type=Path,
        help="all classes in the order of their labels: a name per line, or as in UCF101's "
        "classInd.txt; videos of others are rejected",
    )
    parser.add_argument(
        "--follow-symlinks",
        action="store_true",
        help="also read symbolic links that lead out of DIR; they are rejected otherwise",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=int,
        default=os.cpu_count() or 1,
        help="processes that decode (default: one per core, here %(default)s)",
    )
    parser.add_argument(
        "--transcode",
        metavar="FOLDER",
        type=Path,
        help="copy every usable video, made small, below FOLDER; INDEX is of the copies",
    )
    parser.add_argument(
        "--size",
        metavar="PIXELS",
        type=int,
        help="the copies' shorter side: the last stage's resolution; needed with --transcode",
    )
    parser.add_argument(
        "--codec", choices=tuple(ENCODINGS), help=f"of the copies (default: {DEFAULT_CODEC})"
    )
    return parser


def _check(parser: ArgumentParser, options: argparse.Namespace) -> None:
    """UserError for options that do not go together, or values that cannot be."""
    if options.workers < 1:
        parser.error(f"--workers {options.workers}: must be at least 1")
    if options.transcode is None:
        for name in ("size", "codec"):
            if getattr(options, name) is not None:
                parser.error(f"--{name} is the copies': it needs --transcode FOLDER")
    elif options.size is None:
        parser.error("--transcode needs --size, the resolution of the last stage that is trained")
    elif options.size < 1:
        parser.error(f"--size {options.size}: must be at least 1")


def summary(index: VideoIndex, rejects: list[Reject], out: Path) -> str:
    """What a person wants to know about a new index, in a few lines."""
    codecs = Counter(entry.codec for entry in index.entries)
    seconds = sum(entry.num_frames / entry.fps for entry in index.entries)
    frames = sorted(entry.num_frames for entry in index.entries)
    lines = [
        f"accepted  {len(index.entries)} videos, {seconds / 3600:.2f} hours, "
        f"{frames[0]} to {frames[-1]} frames",
        f"classes   {len(index.classes) or 'none'}",
        f"codecs    {', '.join(f'{name} {count}' for name, count in codecs.most_common())}",
        f"rejected  {len(rejects)}" + (f", listed in {rejects_path(out)}" if rejects else ""),
    ]
    for count, example in by_kind(rejects)[:5]:
        lines.append(f"  {count:6d}  {example.reason}  (e.g. {example.path})")
    unused = set(range(len(index.classes))) - {entry.label for entry in index.entries}
    if unused:
        names = ", ".join(index.classes[label] for label in sorted(unused)[:3])
        lines.append(f"warning   {len(unused)} classes have no usable video, e.g. {names}")
    return "\n".join([*lines, f"index     {out}"])


if __name__ == "__main__":
    run(main)
