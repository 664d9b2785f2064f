"""Views: the paper's f, nearest-neighbour downsampling of a video in space and time.

Every real input of every stage is a view of one decoded clip, so that what stage 1 learns to
generate is exactly what stage 2 is conditioned on.

Shapes: B batch, T frames, C channels, H x W pixels; video tensors are [B, T, C, H, W].
"""

from torch import Tensor


def nearest_view(video_BTCHW: Tensor, *, resolution: int, frame_step: int = 1) -> Tensor:
    """f(x): keep every `frame_step`-th frame and, in space, every (H / resolution)-th pixel.

    Returns [B, ceil(T / frame_step), C, resolution, resolution], a view without a copy.
    Same pixels as `F.interpolate(mode="nearest")` for whole factors. Raises ValueError when
    the factor is not a whole number: there is then no one nearest neighbour to agree on.
    """
    height, width = video_BTCHW.shape[-2:]
    if height != width or height % resolution:
        raise ValueError(f"no nearest view of {height}x{width} at {resolution}x{resolution}")
    factor = height // resolution
    return video_BTCHW[:, ::frame_step, :, ::factor, ::factor]
