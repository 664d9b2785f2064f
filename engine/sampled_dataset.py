"""Generated clips as a data set, for evaluators of other projects: a file or folder per clip.

    DIR/
      clips/CLASS/000000.mp4          or, lossless, clips/CLASS/000000/000000.png and so on
      labels.csv                      each clip's path, class number and class name
      dataset.json                    what was asked for

Classes come as often as the training data has them; without classes clips lie in clips/ itself. A
run that was stopped goes on where it ended, and another run can add clips: each is written aside
and renamed when it is whole, and the n-th clip is the same in every run.
"""

import csv
import io
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from engine.dummy_passes import TrainedCascade, load_trained
from engine.durable_files import PARTIAL, make_writable_folder, reading, write_json, writing
from engine.errors import UserError
from engine.models.construction import forbid_tf32
from engine.sampling import SamplePlan, fix_statistics, stream
from engine.trainer.ranks import Ranks, derived_seed
from engine.video.lossless import write_pngs
from engine.video.writing import mp4_file

CLIPS, LABELS, ABOUT = "clips", "labels.csv", "dataset.json"
FORMATS = ("mp4", "png")
_CLASSES = "sampled classes"  # a stream of random numbers


def draw_labels(trained: TrainedCascade, num: int, seed: int) -> list[int | None]:
    """A class per clip, with the training data's frequencies; None without classes.

    The first ones are the same for every `num`.
    """
    counts = trained.class_counts
    if not counts:
        return [None] * num
    random_state = random.Random(derived_seed(_CLASSES, seed))
    return list(random_state.choices(range(len(counts)), counts, k=num))


def complete_dataset(folder: Path, plan: SamplePlan, form: str, ranks: Ranks) -> int:
    """Write the clips that are not in the folder yet, in one of FORMATS; returns their number.

    Each rank writes a share of them, all into the same folder. Collective. Raises UserError where
    the folder holds something else, or cannot be written.
    """
    for is_turn in (ranks.is_main, not ranks.is_main):  # rank 0 makes what the others find
        if is_turn:
            dataset = SampledDataset(folder, plan, form)
            numbers = dataset.missing()
        ranks.barrier()
    if numbers:
        forbid_tf32()
        cascade = load_trained(plan.checkpoint, ranks.device)
        for is_turn in (ranks.is_main, not ranks.is_main):
            if is_turn:
                fix_statistics(cascade, plan, folder)
            ranks.barrier()
        mine = numbers[ranks.rank :: ranks.world_size]
        dataset.write(stream(cascade, plan, numbers=frozenset(mine)), mine)
        ranks.barrier()
    return len(numbers)


class SampledDataset:
    """The folder."""

    def __init__(self, folder: Path, plan: SamplePlan, form: str) -> None:
        """Raises UserError where the folder holds something else, or cannot be written."""
        self._folder, self._plan, self._form = folder, plan, form
        make_writable_folder(folder)
        about = {
            "weights": plan.checkpoint.digest,
            "checkpoint": str(plan.checkpoint.path),
            "frames": plan.num_frames,
            "sigma": plan.sigma,
            "seed": plan.seed,
            "statistics": asdict(plan.passes),
            "format": form,
            "frames_per_second": plan.checkpoint.frames_per_second,
        }
        path = folder / ABOUT
        if path.exists():
            self._check_same(path, about)
        elif (folder / CLIPS).exists():
            raise UserError(f"{folder / CLIPS} is not sample.py's: move it, or use another --out")
        else:
            write_json(path, about)

    def missing(self) -> list[int]:
        """Numbers of the clips that are not there yet."""
        return [n for n in range(len(self._plan.labels)) if not self._path(n).exists()]

    def write(self, clips: Iterator[Iterator[Tensor]], numbers: list[int]) -> None:
        """Write the clips of these numbers, each in chunks, uint8 [t, 3, H, W], and the list.

        Raises UserError when something cannot be written.
        """
        fps = self._plan.checkpoint.frames_per_second
        total = len(self._plan.labels)
        bar = tqdm(numbers, "generating", initial=total - len(numbers), total=total, unit="clip")
        for number, chunks in zip(bar, clips, strict=True):
            path = self._path(number)
            if self._form == "mp4":
                with mp4_file(path, fps) as add:
                    for video_TCHW in chunks:
                        add(video_TCHW)
                continue
            partial, first = path.with_name(path.name + PARTIAL), 0
            with writing(path):
                shutil.rmtree(partial, ignore_errors=True)
                for video_TCHW in chunks:
                    write_pngs(partial, video_TCHW, first)
                    first += len(video_TCHW)
                partial.replace(path)
        with writing(self._folder / LABELS):
            (self._folder / LABELS).write_text(self._list())

    def _path(self, number: int) -> Path:
        label = self._plan.labels[number]
        folder = self._folder / CLIPS
        if label is not None:
            # A name of dots would lead elsewhere; names may come from a stranger's export.
            name = self._class_name(label).replace("/", "-").strip(".")
            folder = folder / (name or f"class {label}")
        return folder / (f"{number:06d}.mp4" if self._form == "mp4" else f"{number:06d}")

    def _class_name(self, label: int) -> str:
        classes = self._plan.checkpoint.classes
        return classes[label] if label < len(classes) else f"class {label}"

    def _list(self) -> str:
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(("path", "label", "class"))
        for number, label in enumerate(self._plan.labels):
            name = ("", "") if label is None else (label, self._class_name(label))
            rows.writerow((self._path(number).relative_to(self._folder), *name))
        return text.getvalue()

    def _check_same(self, path: Path, about: dict[str, object]) -> None:
        try:
            with reading(path):
                kept = json.loads(path.read_text())
            kept["checkpoint"] = about["checkpoint"]  # the same weights may lie elsewhere
        except (ValueError, TypeError):
            raise UserError(f"{path} is damaged: move it, or use another --out") from None
        for key, value in about.items():
            if kept.get(key) != value:
                raise UserError(
                    f"{path} is of clips with another {key} ({kept.get(key)}, now {value}): "
                    "use another --out"
                )
