"""Files for a program to measure: frames in PNG, or all clips in one npz file, exact to the bit.

Shapes: N clips, T frames, C = 3 channels (RGB), H x W pixels, uint8.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from zipfile import ZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from engine.durable_files import writing
from engine.video.writing import as_THWC


def write_pngs(folder: str | Path, frames: Tensor | NDArray[np.uint8]) -> None:
    """Write uint8 frames, [T, C, H, W] or [T, H, W, C], as 000000.png, 000001.png, ... in `folder`.

    Some tools sort frames by their names and some by the numbers there; both find the right order.
    Raises ValueError for other shapes or types, UserError if they cannot be written.
    """
    folder, frames_THWC = Path(folder), as_THWC(frames)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for number, frame_HWC in enumerate(frames_THWC):
            Image.fromarray(frame_HWC).save(folder / f"{number:06d}.png", format="PNG")


@contextmanager
def clip_archive(
    path: str | Path, num_clips: int, **arrays: NDArray[np.generic]
) -> Iterator[Callable[[Tensor | NDArray[np.uint8]], None]]:
    """An npz file to which clips are added one by one, so that memory holds one of them.

    What is yielded takes a clip, [T, C, H, W] or [T, H, W, C]. `np.load(path)["videos"]` then is
    uint8 [N, T, H, W, C], N = `num_clips`, in the order of the calls; beside it are `arrays`.
    Nothing is compressed. The same clips give the same file. Raises ValueError where clips differ
    in shape or are not `num_clips`, OSError if the file cannot be written.
    """
    shape_THWC: tuple[int, ...] = ()
    num_added = 0
    with ZipFile(path, "w") as archive:  # stored, as np.savez does it
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
        # Beyond 4 GB a member must be known as such before it is written.
        with archive.open("videos.npy", "w", force_zip64=True) as file:

            def add(frames: Tensor | NDArray[np.uint8]) -> None:
                nonlocal shape_THWC, num_added
                frames_THWC = np.ascontiguousarray(as_THWC(frames))
                if num_added == 0:
                    shape_THWC = frames_THWC.shape
                    _write_header(file, (num_clips, *shape_THWC))
                elif frames_THWC.shape != shape_THWC:
                    raise ValueError(f"a clip of {frames_THWC.shape} after one of {shape_THWC}")
                file.write(frames_THWC.data)
                num_added += 1

            yield add
    if num_added != num_clips:
        raise ValueError(f"{num_added} clips were added instead of {num_clips}")


def _write_header(file: IO[bytes], shape: tuple[int, ...]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
