"""Does an upsampling stage keep to what it was given? How far f(x) is from x_l.

The matching discriminator exists to make a stage upsample its x_l rather than make a video of its
own (Table 2 of the paper leaves it out).

Shapes: B clips, T frames, t = T / frame_step frames of x_l, C channels, H x W and h x w pixels;
values in [-1, 1].
"""

from torch import Tensor

from engine.clip_figures import LEVEL
from engine.views import nearest_view


def grounding(video_BTCHW: Tensor, low_BtChw: Tensor, frame_step: int) -> float:
    """Mean of |f(x) - x_l| over clips, frames, channels and pixels, in 8-bit levels.

    `low_BtChw` is the x_l that `video_BTCHW` was made of. 0 where the output repeats x_l exactly.
    Compare with the same clips and the x_l of others: an output that ignores x_l is as far from
    its own. Cannot see what is between the pixels and frames that f keeps. Raises ValueError where
    f(x) and x_l differ in size or length.
    """
    viewed_BtChw = nearest_view(video_BTCHW, resolution=low_BtChw.shape[-1], frame_step=frame_step)
    if viewed_BtChw.shape != low_BtChw.shape:
        raise ValueError(f"f(x) is {tuple(viewed_BtChw.shape)}, x_l {tuple(low_BtChw.shape)}")
    return (viewed_BtChw.double() - low_BtChw.double()).abs().mean().item() / LEVEL
