"""Files for a program to measure: frames in PNG, or all clips in one npz file, exact to the bit.

Shapes: N clips, T frames, C = 3 channels (RGB), H x W pixels, uint8.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from zipfile import ZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from engine.durable_files import writing
from engine.video.writing import FrameTaker, as_THWC


def write_pngs(folder: str | Path, frames: Tensor | NDArray[np.uint8], first: int = 0) -> None:
    """Write uint8 frames, [T, C, H, W] or [T, H, W, C], as 000000.png, 000001.png, ... in `folder`.

    With `first`, they go on from that number.
    Some tools sort frames by their names and some by the numbers there; both find the right order.
    Raises ValueError for other shapes or types, UserError if they cannot be written.
    """
    folder, frames_THWC = Path(folder), as_THWC(frames)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for number, frame_HWC in enumerate(frames_THWC, start=first):
            Image.fromarray(frame_HWC).save(folder / f"{number:06d}.png", format="PNG")


@contextmanager
def clip_archive(
    path: str | Path, num_clips: int, num_frames: int, **arrays: NDArray[np.generic]
) -> Iterator[FrameTaker]:
    """An npz file of clips whose frames are added bit by bit, so that memory holds few of them.

    What is yielded takes the next frames, [t, C, H, W] or [t, H, W, C]; `num_frames` of them are a
    clip. `np.load(path)["videos"]` then is uint8 [N, T, H, W, C], N = `num_clips`, in the order of
    the calls; beside it are `arrays`. Nothing is compressed. The same clips give the same file.
    Raises ValueError where frames differ in shape or are too few or too many, OSError if the file
    cannot be written.
    """
    shape_HWC: tuple[int, ...] = ()
    num_added = 0
    with ZipFile(path, "w") as archive:  # stored, as np.savez does it
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
        # Beyond 4 GB a member must be known as such before it is written.
        with archive.open("videos.npy", "w", force_zip64=True) as file:

            def add(frames: Tensor | NDArray[np.uint8]) -> None:
                nonlocal shape_HWC, num_added
                frames_THWC = np.ascontiguousarray(as_THWC(frames))
                if num_added == 0:
                    shape_HWC = frames_THWC.shape[1:]
                    _write_header(file, (num_clips, num_frames, *shape_HWC))
                elif frames_THWC.shape[1:] != shape_HWC:
                    raise ValueError(f"frames of {frames_THWC.shape[1:]} after ones of {shape_HWC}")
                file.write(frames_THWC.data)
                num_added += len(frames_THWC)

            yield add
    if num_added != num_clips * num_frames:
        raise ValueError(
            f"{num_added} frames were added instead of {num_clips} clips of {num_frames}"
        )


def _write_header(file: IO[bytes], shape: tuple[int, ...]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
