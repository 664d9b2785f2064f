"""Memory layout: videos are [B, T, C, H, W] by shape and B, T, H, W, C in memory.

With frames folded into the batch this is PyTorch's channels_last, which both cuDNN's and oneDNN's
convolutions run on without a copy.
"""

from torch import Tensor


def fold_frames(x_BTCHW: Tensor) -> Tensor:
    """[B, T, C, H, W] → channels-last frames [B*T, C, H, W]; copies only what is laid out else."""
    return channels_last(x_BTCHW).flatten(0, 1)


def unfold_frames(x_NCHW: Tensor, num_frames: int) -> Tensor:
    """[B*T, C, H, W] → [B, T, C, H, W], a view."""
    return x_NCHW.unflatten(0, (-1, num_frames))


def channels_last(x_BTCHW: Tensor) -> Tensor:
    """The same video with C innermost in memory; `x_BTCHW` itself where it already is."""
    return x_BTCHW.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def conv2d_weight(weight_OhwI: Tensor) -> Tensor:
    """[O, kh, kw, I] → PyTorch's [O, I, kh, kw], a channels-last view."""
    return weight_OhwI.permute(0, 3, 1, 2)
