"""Power spectra of single frames: have they as much coarse and fine detail as real ones?

The paper's Appendix E compares the power spectral density (PSD) of generated and of real frames at
several times of a clip; quality that is lost on the way to its end shows as another spectrum there.

The definition is that of pysteps' `rapsd` (radially averaged PSD), written from its description:
|FFT|² / (H W) of a square image, averaged over the frequencies whose distance from zero, in cycles
per image, rounds to each whole radius from 0 to half the side. The corners beyond are left out.
White noise of variance s² has s² at every radius but 0, so that images of all sizes compare. The
field's other convention ("floored", in studies of GANs' spectra) gives each frequency to the whole
radius below it.

A spectrum does not tell where anything is, nor which frame follows which: the right amount of
detail in the wrong place has the right spectrum.

Shapes: B clips, T frames, C channels (RGB), N x N pixels, R = N // 2 + 1 radii, K frames looked at;
videos are [B, T, C, N, N] with values in [-1, 1].
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from engine.clip_figures import LEVEL, LUMA

_LEAST_POWER = LEVEL**2 / 12
"""Of the noise that rounding to 8 bits adds: less than that is not told from none."""


def power(image_NN: Tensor) -> Tensor:
    """|FFT|² / (H W) of images [..., N, N], float64; frequencies in `torch.fft.fftfreq`'s order.

    Its sum is that of the pixels' squares (Parseval).
    """
    transformed_NN = torch.fft.fft2(image_NN.double(), norm="ortho")
    return transformed_NN.abs().square()


Radius = Literal["rounded", "floored"]
"""To which whole radius a frequency belongs: the nearest (pysteps), or the one below."""


def radial_mean(power_NN: Tensor, radius: Radius = "rounded") -> Tensor:
    """Mean of `power` at each whole radius: [..., N, N] → [..., R]. ValueError if not square."""
    side = power_NN.shape[-1]
    if power_NN.shape[-2] != side:
        raise ValueError(f"no radii in {power_NN.shape[-2]}x{side} pixels: the sides must be equal")
    cycles_N = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64)
    distance_NN = torch.hypot(cycles_N[:, None], cycles_N[None, :])
    whole_NN = distance_NN.round() if radius == "rounded" else distance_NN.floor()
    means = [power_NN[..., whole_NN == each].mean(dim=-1) for each in range(side // 2 + 1)]
    return torch.stack(means, dim=-1)


def frames_looked_at(num_frames: int, num: int = 4) -> list[int]:
    """The first frame, the last, and others evenly between them; numbers from 0, none twice."""
    last, parts = num_frames - 1, max(num - 1, 1)
    return sorted({(place * last + parts // 2) // parts for place in range(num)})


def spectra(video_BTCHW: Tensor, frames: Sequence[int], radius: Radius = "rounded") -> Tensor:
    """The mean PSD over clips of the luminance at each of `frames`: [K, R], float64."""
    luma_C11 = torch.tensor(LUMA, dtype=torch.float64).view(3, 1, 1)
    chosen_BKCHW = video_BTCHW[:, list(frames)].double().cpu()
    luminance_BKHW = (chosen_BKCHW * luma_C11).sum(dim=2)
    return radial_mean(power(luminance_BKHW), radius).mean(dim=0)


def spectral_distances(spectra_KR: Tensor, real_KR: Tensor) -> list[float]:
    """Root mean square over radii of the difference of log10 PSD, one number per frame.

    0 where the spectra agree; 1 where they are a factor of ten apart. Radius 0, the mean
    brightness, does not count. Power below that of rounding to 8 bits counts as that much.
    """
    logs_KR, real_logs_KR = (
        given.clamp_min(_LEAST_POWER).log10()[..., 1:] for given in (spectra_KR, real_KR)
    )
    distances_K = (logs_KR - real_logs_KR).square().mean(dim=-1).sqrt()
    return [float(distance) for distance in distances_K]
