"""The files that a sampling run writes: clips to look at or to measure, and a list of them.

- `clip-000-NAME.mp4` for mp4, to look at: small clips are enlarged.
- `frames/clip-000-NAME/000000.png` and so on for png.
- `samples.npz` for npz: `videos`, uint8 [N, T, H, W, 3]; `labels`, int64 [N], where there are
  classes; and `fps`, a float64.
- `grid.mp4`, `contact-sheet.png`: the NUM_SHOWN first clips.
- `samples.json`: what was asked for, the formats, and each clip's files and hash.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine.durable_files import make_writable_folder, reading, writing
from engine.errors import UserError
from engine.sampling import STATISTICS, SamplePlan
from engine.video.lossless import clip_archive, write_pngs
from engine.video.writing import NUM_COLUMNS, contact_sheet, evenly_spaced, grid, mp4_file

FORMATS = ("mp4", "png", "npz")
"""Those that clips can be written in. All but mp4 keep every bit, at the size that is generated."""
SAMPLES = "samples.json"
GRID = "grid.mp4"
SHEET = "contact-sheet.png"
FRAMES = "frames"
"""Only frames are below it: tools for metrics take every picture that they find."""
ARCHIVE = "samples.npz"
_ASIDE = ".writing-"
NUM_SHOWN = 64
"""Clips in the grid and the contact sheet, which are looked at."""
_GRID_FRAMES = 16  # of all of them in memory at once


def make_writable(out: Path, plan: SamplePlan, formats: Collection[str] = ("mp4",)) -> None:
    """Make the folder; UserError when it cannot be written to. Due before the long passes."""
    make_writable_folder(out)
    for left in out.glob(f"{_ASIDE}*"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    files = [STATISTICS, GRID, SHEET, SAMPLES]
    files += [f"{name}.mp4" for name in _clip_names(plan) if "mp4" in formats]
    files += [ARCHIVE] if "npz" in formats else []
    for file in files:
        if (out / file).is_dir():
            raise UserError(f"cannot write {out / file}: it is a folder")
    if "npz" in formats and (out / ARCHIVE).exists() and ARCHIVE not in _earlier_files(out):
        raise UserError(f"{out / ARCHIVE} is not sample.py's: move it, or use another --out")
    if "png" in formats or FRAMES in _earlier_files(out):
        for path in _foreign(out / FRAMES):
            raise UserError(f"{path} is not sample.py's: move it, or use another --out")


def write(
    out: Path,
    videos: Iterable[Iterable[Tensor]],
    plan: SamplePlan,
    formats: Collection[str] = ("mp4",),
) -> None:
    """Each clip in each of the formats; the NUM_SHOWN first ones in one video and in a sheet.

    A clip comes in chunks, uint8 [t, 3, H, W], and each is let go when it is written.
    Written aside and moved when all are there: until then an earlier run's files stay as they are.
    Those of its clips that this one does not write are removed. Raises UserError when something
    cannot be written.
    """
    earlier = _earlier_files(out)
    with writing(out), TemporaryDirectory(prefix=_ASIDE, dir=out) as aside:
        files = _write_files(Path(aside), videos, plan, formats)
        for file in files:
            if file == FRAMES:  # nothing can be renamed to a folder that is not empty
                _give_up(out / FRAMES, Path(aside))
            (Path(aside) / file).replace(out / file)
        for file in earlier.difference(files):
            if file == FRAMES:
                _give_up(out / FRAMES, Path(aside))
            else:
                (out / file).unlink(missing_ok=True)


def _write_files(
    folder: Path, videos: Iterable[Iterable[Tensor]], plan: SamplePlan, formats: Collection[str]
) -> list[str]:
    """Everything that `write` writes, into `folder`; the names there, samples.json's last."""
    names = _clip_names(plan)
    fps = plan.checkpoint.frames_per_second
    stage = plan.checkpoint.config().stages[plan.checkpoint.stage_number]
    scale = max(1, 128 // stage.resolution)
    clips: list[dict[str, str]] = []
    with ExitStack() as stack:
        num_shown = min(len(names), NUM_SHOWN)
        shown = stack.enter_context(_ShownClips(folder, num_shown, plan.num_frames))
        if "npz" in formats:
            arrays = {"fps": np.array(fps, "<f8")}
            if None not in plan.labels:
                arrays["labels"] = np.array(plan.labels, "<i8")
            archive = clip_archive(folder / ARCHIVE, len(names), plan.num_frames, **arrays)
            add_to_archive = stack.enter_context(archive)
        with_names = zip(videos, names, strict=True)
        for number, (chunks, name) in enumerate(
            tqdm(with_names, "generating", total=len(names), unit="clip")
        ):
            clip, digest, num_written = {}, hashlib.sha256(), 0
            with ExitStack() as of_clip:
                if "mp4" in formats:
                    clip["file"] = f"{name}.mp4"
                    mp4 = mp4_file(folder / clip["file"], fps, scale=scale)
                    add_to_mp4 = of_clip.enter_context(mp4)
                if "png" in formats:
                    clip["folder"] = f"{FRAMES}/{name}"
                for video_TCHW in chunks:
                    if "mp4" in formats:
                        add_to_mp4(video_TCHW)
                    if "png" in formats:
                        write_pngs(folder / clip["folder"], video_TCHW, first=num_written)
                    if "npz" in formats:
                        add_to_archive(video_TCHW)
                    if number < NUM_SHOWN:
                        shown.add(video_TCHW)
                    digest.update(video_TCHW.contiguous().numpy().data)
                    num_written += len(video_TCHW)
            clip["sha256"] = digest.hexdigest()
            clips.append(clip)
        columns = max(1, round(shown.num_clips**0.5))
        with mp4_file(folder / GRID, fps, scale=scale) as add_to_grid:
            for begin in range(0, plan.num_frames, _GRID_FRAMES):
                end = min(begin + _GRID_FRAMES, plan.num_frames)
                add_to_grid(grid(shown.frames(range(begin, end)), columns))
        contact_sheet(
            shown.frames(evenly_spaced(plan.num_frames, NUM_COLUMNS)),
            folder / SHEET,
            labels=_class_names(plan)[: shown.num_clips],
        )
    asked = {
        "checkpoint": str(plan.checkpoint.path),
        "labels": plan.labels,
        "frames": plan.num_frames,
        "sigma": plan.sigma,
        "seed": plan.seed,
        "passes": plan.passes.num_passes,
        "batch": plan.passes.batch_size,
        "statistics_frames": plan.passes.num_frames,
        "frames_per_second": fps,
        "formats": [name for name in FORMATS if name in formats],
        "clips": clips,
    }
    (folder / SAMPLES).write_text(json.dumps(asked, indent=1) + "\n")
    files = [clip["file"] for clip in clips if "file" in clip]
    files += [FRAMES] if "png" in formats else []
    files += [ARCHIVE] if "npz" in formats else []
    return [*files, GRID, SHEET, SAMPLES]


class _ShownClips:
    """The first clips again, all at once: kept in a file, of which a few frames are read."""

    def __init__(self, folder: Path, num_clips: int, num_frames: int) -> None:
        self.num_clips, self._folder, self._num_frames = num_clips, folder, num_frames
        self._shape: tuple[int, ...] = ()

    def __enter__(self) -> "_ShownClips":
        self._file = TemporaryFile(dir=self._folder)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, frames_TCHW: Tensor) -> None:
        """The next frames of the next clip."""
        self._shape = tuple(frames_TCHW.shape[1:])
        self._file.write(frames_TCHW.contiguous().numpy().data)

    def frames(self, numbers: Sequence[int]) -> Tensor:
        """These frames of all clips, uint8 [B, T, 3, H, W]."""
        size = math.prod(self._shape)
        read_BTN = np.empty((self.num_clips, len(numbers), size), np.uint8)
        for clip, of_clip_TN in enumerate(read_BTN):
            for place, number in enumerate(numbers):
                self._file.seek((clip * self._num_frames + number) * size)
                self._file.readinto(of_clip_TN[place].data)
        return torch.from_numpy(read_BTN).unflatten(2, self._shape)


def _class_names(plan: SamplePlan) -> list[str]:
    """Each clip's class, by its number where the data set named none."""
    names = dict(enumerate(plan.checkpoint.classes))
    return [
        "video" if label is None else names.get(label, f"class {label}") for label in plan.labels
    ]


def _clip_names(plan: SamplePlan) -> list[str]:
    """Each clip's name in the file system, without a suffix."""
    safe = [name.replace(" ", "-").replace("/", "-") for name in _class_names(plan)]
    digits = max(3, len(str(len(safe) - 1)))  # sorted names are in the clips' order
    return [f"clip-{number:0{digits}d}-{name}" for number, name in enumerate(safe)]


def _earlier_files(out: Path) -> set[str]:
    """The clips' files that samples.json in `out` lists; nothing when it is missing or not ours."""
    try:
        listed = json.loads((out / SAMPLES).read_text())
        files = {clip["file"] for clip in listed["clips"] if "file" in clip}
        formats = listed.get("formats", ())
        others = {FRAMES} if "png" in formats else set()
        others |= {ARCHIVE} if "npz" in formats else set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    # Never beyond what `write` could have made.
    return others | {file for file in files if fnmatch(str(file), "clip-*.mp4") and "/" not in file}


def _foreign(frames: Path) -> Iterator[Path]:
    """What `write` cannot have made, of the folder of frames and all in it."""
    with reading(frames):
        if not os.path.lexists(frames):
            return
        if frames.is_symlink() or not frames.is_dir():
            yield frames
            return
        for clip in frames.iterdir():
            if clip.is_symlink() or not (clip.is_dir() and clip.name.startswith("clip-")):
                yield clip
                continue
            for file in clip.iterdir():
                if not (file.suffix == ".png" and file.stem.isdecimal()):
                    yield file


def _give_up(folder: Path, aside: Path) -> None:
    """Move a folder, if it is there, to where it is removed with all that was left aside."""
    if folder.exists():
        folder.replace(aside / "given-up")
