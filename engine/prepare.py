"""Index a folder of videos for training: decode every file, list what is usable and what is not."""

import os
from collections import Counter
from pathlib import Path

from engine.command_line import ArgumentParser, run
from engine.video.index import Reject, VideoIndex, rejects_path
from engine.video.indexing import build_index

EPILOG = """\
layouts:
  class folders      DIR/archery/a.mp4, DIR/bowling/b.mp4   (Kinetics-600, UCF101)
  flat               DIR/a.mp4, DIR/b.mp4                   (BDD100K: no classes)
  with --annotations clips <youtube_id>_<start>_<end>.mp4 or <youtube_id>.mp4 anywhere below DIR

Interrupt it at any time: the same command goes on where it stopped. Run again, it decodes only
files that are new or changed; delete INDEX to judge everything afresh.

example:
  python engine/prepare.py videos/kinetics600/train --out indexes/kinetics600.jsonl --workers 16
"""


def main(arguments: list[str]) -> None:
    """Parse, index, summarise."""
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
        metavar="CSV",
        type=Path,
        help="Kinetics CSV: label, youtube_id, time_start, time_end",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=int,
        default=os.cpu_count() or 1,
        help="processes that decode (default: one per core, here %(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers {options.workers}: must be at least 1")
    index, rejects = build_index(
        options.folder, options.out, annotations=options.annotations, num_workers=options.workers
    )
    print(summary(index, rejects, options.out))


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
    # Numbers differ from file to file ("damaged after 18 frames"): count reasons without them.
    reasons = Counter("".join("N" if c.isdigit() else c for c in r.reason) for r in rejects)
    examples = {"".join("N" if c.isdigit() else c for c in r.reason): r for r in reversed(rejects)}
    for kind, count in reasons.most_common(5):
        example = examples[kind]
        lines.append(f"  {count:6d}  {example.reason}  (e.g. {example.path})")
    unused = set(range(len(index.classes))) - {entry.label for entry in index.entries}
    if unused:
        names = ", ".join(index.classes[label] for label in sorted(unused)[:3])
        lines.append(f"warning   {len(unused)} classes have no usable video, e.g. {names}")
    return "\n".join([*lines, f"index     {out}"])


if __name__ == "__main__":
    run(main)
