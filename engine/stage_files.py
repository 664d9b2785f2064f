"""What every stage of a cascade makes of a clip: a video per stage, and a strip to compare them.

The strip is that of the paper's Figures 4, 10 and 13: a row per stage, and in each column frames of
one moment. Files are in a folder of their own:

    stages/clip-000-NAME.png            the strip
    stages/clip-000-NAME-stage-1.mp4    each earlier stage's video, at its own rate
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from engine.dummy_passes import TrainedCascade
from engine.video.writing import FrameTaker, contact_sheet, mp4_file


class StageFiles:
    """Takes the frames of all stages while clips are generated, one clip after the other."""

    def __init__(self, trained: TrainedCascade, columns: Sequence[int]) -> None:
        """`columns` are the frames that strips show, by number in the last stage's video."""
        self._columns = columns
        self._config, self._last = trained.config(), trained.stage_number
        self._rate = trained.frames_per_second
        self._files: dict[int, FrameTaker] = {}
        self._num_taken: dict[int, int] = {}
        self._shown: dict[tuple[int, int], Tensor] = {}

    @contextmanager
    def clip(self, folder: Path, name: str, scale: int) -> Iterator[None]:
        """Within this context frames are of this clip, whose files are written into `folder`.

        Pixels of the last stage become squares of `scale`, those of others as large a picture.
        """
        self._num_taken = dict.fromkeys(range(1, self._last + 1), 0)
        self._shown.clear()
        with ExitStack() as stack:
            for number in range(1, self._last):
                path = folder / f"{name}-stage-{number}.mp4"
                rate = self._rate / self._repeats(number)
                file = mp4_file(path, rate, scale=self._enlargement(number) * scale)
                self._files[number] = stack.enter_context(file)
            yield
        rows = [
            torch.stack([self._shown[number, column] for column in self._columns])
            for number in range(1, self._last + 1)
        ]
        labels = [self._label(number) for number in range(1, self._last + 1)]
        shown_BTCHW = torch.stack(rows)
        path = folder / f"{name}.png"
        contact_sheet(shown_BTCHW, path, len(self._columns), labels=labels)

    def add(self, number: int, video_TCHW: Tensor) -> None:
        """A stage's next frames, uint8 [t, 3, H, W]."""
        if number in self._files:
            self._files[number](video_TCHW)
        begin = self._num_taken[number]
        self._num_taken[number] += len(video_TCHW)
        enlargement = self._enlargement(number)
        for column in self._columns:
            place = column // self._repeats(number) - begin
            if 0 <= place < len(video_TCHW):
                frame_CHW = video_TCHW[place]
                for dim in (1, 2):
                    frame_CHW = frame_CHW.repeat_interleave(enlargement, dim)
                self._shown[number, column] = frame_CHW

    def _repeats(self, number: int) -> int:
        """Frames of the last stage for one of this."""
        return self._config.unrolling(self._last) // self._config.unrolling(number)

    def _enlargement(self, number: int) -> int:
        stages = self._config.stages
        return stages[self._last].resolution // stages[number].resolution

    def _label(self, number: int) -> str:
        resolution = self._config.stages[number].resolution
        return f"stage {number}, {resolution}x{resolution}"
