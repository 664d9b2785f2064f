"""The files that a sampling run writes: clips to look at or to measure, and a list of them.

- `clip-000-NAME.mp4` for mp4, to look at: small clips are enlarged.
- `clip-000-NAME.webp` and `.gif`, animated, likewise.
- `frames/clip-000-NAME/000000.png` and so on for png.
- `samples.npz` for npz: `videos`, uint8 [N, T, H, W, 3]; `labels`, int64 [N], where there are
  classes; and `fps`, a float64.
- `stages/` with --stages, as `stage_files.py` describes it.
- `grid.mp4`, `contact-sheet.png`: the NUM_SHOWN first clips.
- `samples.json`: what was asked for, the formats, and each clip's files and hash.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine.durable_files import make_writable_folder, reading, writing
from engine.errors import UserError
from engine.sampling import STATISTICS, SamplePlan
from engine.stage_files import StageFiles
from engine.video.lossless import clip_archive, write_pngs
from engine.video.writing import (
    NUM_COLUMNS,
    animation_file,
    contact_sheet,
    evenly_spaced,
    grid,
    mp4_file,
)

FORMATS = ("mp4", "webp", "gif", "png", "npz")
"""Those that clips can be written in. The last two keep every bit, at the generated size."""
_ANIMATIONS = ("webp", "gif")
SAMPLES = "samples.json"
GRID = "grid.mp4"
SHEET = "contact-sheet.png"
FRAMES = "frames"
"""Only frames are below it: tools for metrics take every picture that they find."""
STAGES = "stages"
"""`stage_files.StageFiles`'s."""
FOLDERS = {FRAMES: {".png"}, STAGES: {".png", ".mp4"}}
"""Folders of nothing but our files, and what those end in."""
ARCHIVE = "samples.npz"
_ENDINGS = (".mp4", ".webp", ".gif")
_FILES = ("file", *_ANIMATIONS)
"""Keys of a clip's own files in samples.json."""
_ASIDE = ".writing-"
NUM_SHOWN = 64
"""Clips in the grid and the contact sheet, which are looked at."""
_GRID_FRAMES = 16  # of all of them in memory at once


def make_writable(
    out: Path, plan: SamplePlan, formats: Collection[str] = ("mp4",), *, stages: bool = False
) -> None:
    """Make the folder; UserError when it cannot be written to. Due before the long passes."""
    make_writable_folder(out)
    for left in out.glob(f"{_ASIDE}*"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    files = [STATISTICS, GRID, SHEET, SAMPLES]
    endings = [ending for ending in ("mp4", *_ANIMATIONS) if ending in formats]
    files += [f"{name}.{ending}" for name in _clip_names(plan) for ending in endings]
    files += [ARCHIVE] if "npz" in formats else []
    for file in files:
        if (out / file).is_dir():
            raise UserError(f"cannot write {out / file}: it is a folder")
    if "npz" in formats and (out / ARCHIVE).exists() and ARCHIVE not in _earlier_files(out):
        raise UserError(f"{out / ARCHIVE} is not sample.py's: move it, or use another --out")
    written = {FRAMES: "png" in formats, STAGES: stages}
    for folder, is_written in written.items():
        if is_written or folder in _earlier_files(out):
            for path in _foreign(out / folder):
                raise UserError(f"{path} is not sample.py's: move it, or use another --out")


def write(
    out: Path,
    videos: Iterable[Iterable[Tensor]],
    plan: SamplePlan,
    formats: Collection[str] = ("mp4",),
    *,
    columns: Sequence[int] | None = None,
    stages: StageFiles | None = None,
) -> None:
    """Each clip in each of the formats; the NUM_SHOWN first ones in one video and in a sheet.

    A clip comes in chunks, uint8 [t, 3, H, W], and each is let go when it is written. `columns` are
    the frames that the sheet shows. `stages` is given the earlier stages' frames meanwhile.
    Written aside and moved when all are there: until then an earlier run's files stay as they are.
    Those of its clips that this one does not write are removed. Raises UserError when something
    cannot be written.
    """
    earlier = _earlier_files(out)
    with writing(out), TemporaryDirectory(prefix=_ASIDE, dir=out) as aside:
        files = _write_files(Path(aside), videos, plan, formats, columns, stages)
        for file in files:
            if file in FOLDERS:  # nothing can be renamed to a folder that is not empty
                _give_up(out / file, Path(aside))
            (Path(aside) / file).replace(out / file)
        for file in earlier.difference(files):
            if file in FOLDERS:
                _give_up(out / file, Path(aside))
            else:
                (out / file).unlink(missing_ok=True)


def _write_files(
    folder: Path,
    videos: Iterable[Iterable[Tensor]],
    plan: SamplePlan,
    formats: Collection[str],
    columns: Sequence[int] | None,
    stages: StageFiles | None,
) -> list[str]:
    """Everything that `write` writes, into `folder`; the names there, samples.json's last."""
    names, fps, scale = _clip_names(plan), plan.checkpoint.frames_per_second, _scale_of(plan)
    clips: list[dict[str, str]] = []
    with ExitStack() as stack:
        num_shown = min(len(names), NUM_SHOWN)
        shown = stack.enter_context(_ShownClips(folder, num_shown, plan.num_frames))
        always: list[Callable[[Tensor], object]] = []
        if "npz" in formats:
            arrays = {"fps": np.array(fps, "<f8")}
            if None not in plan.labels:
                arrays["labels"] = np.array(plan.labels, "<i8")
            archive = clip_archive(folder / ARCHIVE, len(names), plan.num_frames, **arrays)
            always.append(stack.enter_context(archive))
        with_names = zip(videos, names, strict=True)
        for chunks, name in tqdm(with_names, "generating", total=len(names), unit="clip"):
            takers = [*always, *([shown.add] if len(clips) < num_shown else [])]
            clips.append(_write_clip(folder, chunks, name, plan, formats, takers, stages))
        side = max(1, round(num_shown**0.5))
        with mp4_file(folder / GRID, fps, scale=scale) as add_to_grid:
            for begin in range(0, plan.num_frames, _GRID_FRAMES):
                end = min(begin + _GRID_FRAMES, plan.num_frames)
                add_to_grid(grid(shown.frames(range(begin, end)), side))
        columns = columns or evenly_spaced(plan.num_frames, NUM_COLUMNS)
        labels = _class_names(plan)[:num_shown]
        contact_sheet(shown.frames(columns), folder / SHEET, len(columns), labels=labels)
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
        "stages": stages is not None,
        "clips": clips,
    }
    (folder / SAMPLES).write_text(json.dumps(asked, indent=1) + "\n")
    files = [clip[key] for clip in clips for key in _FILES if key in clip]
    files += [FRAMES] if "png" in formats else []
    files += [ARCHIVE] if "npz" in formats else []
    files += [STAGES] if stages is not None else []
    return [*files, GRID, SHEET, SAMPLES]


def _write_clip(
    folder: Path,
    chunks: Iterable[Tensor],
    name: str,
    plan: SamplePlan,
    formats: Collection[str],
    takers: Sequence[Callable[[Tensor], object]],
    stages: StageFiles | None,
) -> dict[str, str]:
    """One clip's files, and what samples.json says of it. Its frames are given to `takers`, too."""
    clip, digest, num_written = dict[str, str](), hashlib.sha256(), 0
    last, scale = plan.checkpoint.stage_number, _scale_of(plan)
    rate = plan.checkpoint.frames_per_second
    with ExitStack() as stack:
        takers = list(takers)
        if "mp4" in formats:
            clip["file"] = f"{name}.mp4"
            takers.append(stack.enter_context(mp4_file(folder / clip["file"], rate, scale=scale)))
        for ending in [ending for ending in _ANIMATIONS if ending in formats]:
            clip[ending] = f"{name}.{ending}"
            file = animation_file(folder / clip[ending], rate, scale=scale)
            takers.append(stack.enter_context(file))
        if "png" in formats:
            clip["folder"] = f"{FRAMES}/{name}"
        if stages is not None:
            stack.enter_context(stages.clip(folder / STAGES, name, scale))
            takers.append(partial(stages.add, last))
        for video_TCHW in chunks:
            for take in takers:
                take(video_TCHW)
            if "png" in formats:
                write_pngs(folder / clip["folder"], video_TCHW, first=num_written)
            digest.update(video_TCHW.contiguous().numpy().data)
            num_written += len(video_TCHW)
    return clip | {"sha256": digest.hexdigest()}


def _scale_of(plan: SamplePlan) -> int:
    """How many times as large small clips are shown."""
    stage = plan.checkpoint.config().stages[plan.checkpoint.stage_number]
    return max(1, 128 // stage.resolution)


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
        files = {clip[key] for clip in listed["clips"] for key in _FILES if key in clip}
        formats = listed.get("formats", ())
        others = {FRAMES} if "png" in formats else set()
        others |= {ARCHIVE} if "npz" in formats else set()
        others |= {STAGES} if listed.get("stages") else set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    # Never beyond what `write` could have made.
    ours = {str(file) for file in files if "/" not in file}
    return others | {file for file in ours if file.startswith("clip-") and file.endswith(_ENDINGS)}


def _foreign(folder: Path) -> Iterator[Path]:
    """What `write` cannot have made, of one of FOLDERS and all in it."""
    endings = FOLDERS[folder.name]
    with reading(folder):
        if not os.path.lexists(folder):
            return
        if folder.is_symlink() or not folder.is_dir():
            yield folder
            return
        for clip in folder.iterdir():
            is_clip = not clip.is_symlink() and clip.name.startswith("clip-")
            if folder.name == STAGES:
                if not (is_clip and clip.is_file() and clip.suffix in endings):
                    yield clip
                continue
            if not (is_clip and clip.is_dir()):
                yield clip
                continue
            for file in clip.iterdir():
                if not (file.suffix in endings and file.stem.isdecimal()):
                    yield file


def _give_up(folder: Path, aside: Path) -> None:
    """Move a folder, if it is there, to where it is removed with all that was left aside."""
    if folder.exists():
        folder.replace(aside / "given-up")
