"""From frames as coded to a square clip: stretch and resize, turn upright, crop, mirror.

Shapes: T frames, H x W pixels, C = 3 (RGB), uint8.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from engine.video.index import VideoEntry
from engine.video.sampler import ClipRequest


def resized_size(entry: VideoEntry, resolution: int) -> tuple[int, int]:
    """Height and width, not yet turned, at which the shorter side shown is `resolution` pixels."""
    width, height = entry.width, entry.height
    if entry.rotation in (90, 270):
        width, height = height, width
    shorter = min(width, height)
    return tuple((2 * side * resolution + shorter) // (2 * shorter) for side in (height, width))  # type: ignore[return-value]


def upright(frames_THWC: NDArray[np.uint8], entry: VideoEntry, resolution: int) -> Tensor:
    """The whole frames as displayed, their shorter side `resolution` pixels: uint8 [T, C, H, W].

    Antialiased bilinear, as Pillow does it.
    """
    frames_TCHW = torch.from_numpy(frames_THWC).permute(0, 3, 1, 2)
    size = resized_size(entry, resolution)
    if frames_TCHW.shape[2:] != size:
        frames_TCHW = interpolate(frames_TCHW, size=size, mode="bilinear", antialias=True)
    return frames_TCHW.rot90(entry.rotation // 90, (2, 3))


def square_clip(
    frames_THWC: NDArray[np.uint8], entry: VideoEntry, request: ClipRequest, resolution: int
) -> Tensor:
    """uint8 [T, resolution, resolution, C]: a square of the `upright` frames, perhaps mirrored."""
    turned_TCHW = upright(frames_THWC, entry, resolution)
    top, left = (
        int((side - resolution) * place + 0.5)
        for side, place in zip(turned_TCHW.shape[2:], (request.crop_y, request.crop_x), strict=True)
    )
    clip_TCHW = turned_TCHW[:, :, top : top + resolution, left : left + resolution]
    if request.flip:
        clip_TCHW = clip_TCHW.flip(3)
    return clip_TCHW.permute(0, 2, 3, 1).contiguous()
