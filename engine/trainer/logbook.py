"""The records of a run: JSON lines and TensorBoard scalars per logged step, and sample videos."""

import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from engine.durable_files import writing
from engine.trainer.gpu_monitor import GpuMonitor
from engine.trainer.logged_steps import LOG, cut_back, put_aside
from engine.trainer.recorded_passes import recorded_bytes

FAILED_VIDEOS = "failed-videos.jsonl"


class Logbook:
    """The log of one stage's run, written by rank 0, with what rank 0's GPU says, if it has one.

    `log.jsonl` has an object per logged step; those of steps with samples also hold the figures of
    `snapshots.WindowFigures`. A run that resumes at step N takes out the lines after N, which an
    interrupted run left behind, so each step stands there once. `failed-videos.jsonl` has a line
    per video that fails, and is written when the first one does.
    Every method raises UserError when something cannot be written. TensorBoard writes in a thread,
    so its failure shows at the next call.
    """

    def __init__(self, folder: Path, *, resumed_at: int, device: torch.device) -> None:
        self.path = folder / LOG
        self.failed_path = folder / FAILED_VIDEOS
        self._board_folder = folder / "tensorboard"
        with writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            for path in (self.path, self.failed_path):
                if path.exists() and resumed_at:
                    cut_back(path, resumed_at)
            self.aside = None if resumed_at else put_aside(self.path)
            """Where the log of an earlier run is, if this one starts anew."""
            if not resumed_at:
                put_aside(self.failed_path)
            self._file = self.path.open("a", encoding="utf-8")
        with writing(self._board_folder):
            self._board = SummaryWriter(str(self._board_folder), purge_step=resumed_at + 1)
        self._gpu = GpuMonitor(device)

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Log one step."""
        values = values | self._gpu.read()
        with writing(self.path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        with writing(self._board_folder):
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def failed_videos(self, step: int, problems: dict[str, str]) -> None:
        """Log videos that failed in a step, by path, and why."""
        with writing(self.failed_path), self.failed_path.open("a", encoding="utf-8") as file:
            for path, problem in problems.items():
                line = {"step": step, "video": path, "problem": problem}
                file.write(json.dumps(line) + "\n")

    def videos(self, step: int, name: str, videos_BTCHW: Tensor, frames_per_second: float) -> None:
        """Log uint8 videos, and their first frames as images."""
        animation = _gif(videos_BTCHW, frames_per_second)
        with writing(self._board_folder):
            self._board.add_images(f"{name}/first_frame", videos_BTCHW[:, 0], step)
            self._board._get_file_writer().add_summary(
                Summary(value=[Summary.Value(tag=f"{name}/video", image=animation)]), step
            )
            self._board.flush()

    def close(self) -> None:
        """Flush and close."""
        self._gpu.close()
        with writing(self.path):
            self._file.close()
        with writing(self._board_folder):
            self._board.close()


def _gif(videos_BTCHW: Tensor, frames_per_second: float) -> Summary.Image:
    """A video as TensorBoard stores it, clips side by side. (`add_video` would need moviepy.)"""
    frames = torch.cat(list(videos_BTCHW), dim=-1).permute(0, 2, 3, 1).cpu().numpy()
    images = [Image.fromarray(frame) for frame in frames]
    data = io.BytesIO()
    images[0].save(
        data,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=round(1000 / frames_per_second),
        loop=0,
    )
    height, width = frames.shape[1:3]
    return Summary.Image(
        height=height, width=width, colorspace=3, encoded_image_string=data.getvalue()
    )


def memory_megabytes(device: torch.device) -> float:
    """Peak memory so far: allocated on the GPU or held by recordings, or resident on the CPU."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated(device) + recorded_bytes(device)) / 1e6
    import resource  # POSIX only, as is DeepSpeed

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
