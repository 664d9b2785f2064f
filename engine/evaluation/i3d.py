"""The Kinetics-400 I3D network of TF-Hub (deepmind/i3d-kinetics-400/1); FVD is of its logits.

Carreira and Zisserman, "Quo Vadis, Action Recognition?" (arXiv 1705.07750), RGB stream: Inception
with 3D convolutions. FVD (Unterthiner et al., arXiv 1812.01717) takes the 400 logits of this very
network; the weights in DeepMind's kinetics-i3d repository are others. `i3d_weights.py` gets them.

What TensorFlow does differently from PyTorch's defaults, and what is reproduced here: "SAME"
padding, which puts the odd pixel at the end and depends on the input's size; batch norm without a
gain and with eps 1e-3; and, in `bilinear`, TF1's placing of pixels.

Shapes: B clips, T frames, H x W pixels, C = 3 (RGB), K = 400 classes, D = 1024 pooled features.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PIXELS = 224
"""The network's input is a square of so many pixels."""
LEAST_FRAMES = 9
"""Eight frames leave one time step behind three strides of two; the last pool needs two."""
NUM_CLASSES, NUM_POOLED = 400, 1024
BATCH_NORM_EPS = 1e-3
_POOL = (2, 7, 7)

Placing = Literal["tf1", "half-pixel"]
"""Where `bilinear` puts the pixels of its output."""


class I3DFeatures(NamedTuple):
    """What the network says of clips."""

    logits_BK: Tensor
    """Means over time, as TF-Hub's module returns them."""
    pooled_BD: Tensor
    """What the logits are linear in: the average pool's output, its mean over time and space."""


class I3D(nn.Module):
    """The network: clips to logits and pooled features. See the module's docstring."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = _Unit(3, 64, 7, stride=2)
        self.Conv3d_2b_1x1 = _Unit(64, 64, 1)
        self.Conv3d_2c_3x3 = _Unit(64, 192, 3)
        self.Mixed_3b = _Inception(192, (64, 96, 128, 16, 32, 32))
        self.Mixed_3c = _Inception(256, (128, 128, 192, 32, 96, 64))
        self.Mixed_4b = _Inception(480, (192, 96, 208, 16, 48, 64))
        self.Mixed_4c = _Inception(512, (160, 112, 224, 24, 64, 64))
        self.Mixed_4d = _Inception(512, (128, 128, 256, 24, 64, 64))
        self.Mixed_4e = _Inception(512, (112, 144, 288, 32, 64, 64))
        self.Mixed_4f = _Inception(528, (256, 160, 320, 32, 128, 128))
        self.Mixed_5b = _Inception(832, (256, 160, 320, 32, 128, 128))
        self.Mixed_5c = _Inception(832, (384, 192, 384, 48, 128, 128))
        self.logits = nn.Conv3d(NUM_POOLED, NUM_CLASSES, 1)

    def forward(self, video_BCTHW: Tensor) -> I3DFeatures:
        """Features of clips with values in [-1, 1], T >= 9, H = W = 224.

        Raises ValueError for other sizes.
        """
        frames, *size = video_BCTHW.shape[2:]
        if frames < LEAST_FRAMES or size != [PIXELS, PIXELS]:
            raise ValueError(
                f"I3D takes clips of {LEAST_FRAMES} frames or more, of {PIXELS}x{PIXELS} pixels; "
                f"these have {frames} frames of {size[1]}x{size[0]}"
            )
        x = self.Conv3d_1a_7x7(video_BCTHW)
        x = _max_pool(x, (1, 3, 3), (1, 2, 2))
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
        x = _max_pool(x, (1, 3, 3), (1, 2, 2))
        x = self.Mixed_3c(self.Mixed_3b(x))
        x = _max_pool(x, (3, 3, 3), (2, 2, 2))
        for block in (self.Mixed_4b, self.Mixed_4c, self.Mixed_4d, self.Mixed_4e, self.Mixed_4f):
            x = block(x)
        x = _max_pool(x, (2, 2, 2), (2, 2, 2))
        x = self.Mixed_5c(self.Mixed_5b(x))
        pooled_BDt11 = F.avg_pool3d(x, _POOL, stride=1)
        logits_BKt11 = self.logits(pooled_BDt11)
        return I3DFeatures(logits_BKt11.mean(dim=(2, 3, 4)), pooled_BDt11.mean(dim=(2, 3, 4)))


def bilinear(frames_NCHW: Tensor, pixels: int, placing: Placing) -> Tensor:
    """Resize frames to `pixels` x `pixels`, whatever their aspect; float in, float out.

    "tf1" is `tf.image.resize_bilinear` of TensorFlow 1 with its default align_corners=False, which
    the original FVD calls: output pixel i lies at i * in / out, so that pictures shift by up to
    half a pixel. "half-pixel" is PyTorch's align_corners=False, which PyTorch versions of FVD call
    (StyleGAN-V). Neither filters when it makes pictures smaller. Both return frames of the right
    size as they are.
    """
    height, width = frames_NCHW.shape[-2:]
    if (height, width) == (pixels, pixels):
        return frames_NCHW
    if placing == "half-pixel":
        return F.interpolate(frames_NCHW, (pixels, pixels), mode="bilinear", align_corners=False)
    frames_NCHW = _lerp(frames_NCHW, pixels, dim=-2)
    return _lerp(frames_NCHW, pixels, dim=-1)


def _lerp(frames: Tensor, size: int, dim: int) -> Tensor:
    """TF1's interpolation along one axis."""
    old = frames.shape[dim]
    # float64: the places are exact fractions, and TF's own float32 differs by rounding only.
    places = torch.arange(size, dtype=torch.float64, device=frames.device) * (old / size)
    below = places.floor().long()
    above = (below + 1).clamp_max(old - 1)
    shape = [1] * frames.ndim
    shape[dim] = size
    weight = (places - below).to(frames.dtype).view(shape)
    return torch.lerp(frames.index_select(dim, below), frames.index_select(dim, above), weight)


def _same(x: Tensor, kernel: Sequence[int], stride: Sequence[int], value: float = 0.0) -> Tensor:
    """TensorFlow's "SAME" padding: ceil(size / stride) outputs, the odd place at the end."""
    padding: list[int] = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max(k - (s if size % s == 0 else size % s), 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding, value=value) if any(padding) else x


def _max_pool(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    # What is padded never wins in TensorFlow. Here everything is behind a ReLU, so 0 would do too.
    return F.max_pool3d(_same(x, kernel, stride, value=float("-inf")), kernel, stride)


class _Unit(nn.Module):
    """Convolution with "SAME" padding, batch norm with fixed statistics, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride = (kernel,) * 3, (stride,) * 3
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, bias=False)
        # affine, because PyTorch has no norm with a bias and no gain: the gain stays 1.
        self.norm = nn.BatchNorm3d(out_channels, eps=BATCH_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(_same(x, self.kernel, self.stride))), inplace=True)


class _Inception(nn.Module):
    """Four branches beside each other; `channels` as in the paper's Figure 3, left to right."""

    def __init__(self, in_channels: int, channels: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        c = channels
        self.Branch_0 = nn.ModuleDict({"Conv3d_0a_1x1": _Unit(in_channels, c[0], 1)})
        self.Branch_1 = nn.ModuleDict(
            {"Conv3d_0a_1x1": _Unit(in_channels, c[1], 1), "Conv3d_0b_3x3": _Unit(c[1], c[2], 3)}
        )
        self.Branch_2 = nn.ModuleDict(
            {"Conv3d_0a_1x1": _Unit(in_channels, c[3], 1), "Conv3d_0b_3x3": _Unit(c[3], c[4], 3)}
        )
        self.Branch_3 = nn.ModuleDict({"Conv3d_0b_1x1": _Unit(in_channels, c[5], 1)})

    def forward(self, x: Tensor) -> Tensor:
        branches = []
        for number, branch in enumerate(
            (self.Branch_0, self.Branch_1, self.Branch_2, self.Branch_3)
        ):
            y = _max_pool(x, (3, 3, 3), (1, 1, 1)) if number == 3 else x
            for unit in branch.values():
                y = unit(y)
            branches.append(y)
        return torch.cat(branches, dim=1)
