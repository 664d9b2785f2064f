"""The networks that features come of: I3D, or a TorchScript file of the user's.

All take uint8 clips of one size and give named layers of features, so that everything behind them
knows neither. Metrics ask for two layers: "logits" of a classifier and "pooled". A network that has
only one of them is asked for that one in the other's stead, but for the inception score's.

A TorchScript file is called with one tensor [B, 3, T, H, W], either

- "float": float32 in [-1, 1], resized to 224x224 as the protocol says (the default), or
- "uint8": uint8, as the clips are,

and returns features [B, F], which are called "pooled", or a dict with "logits", "pooled" or both.
A file whose forward takes `rescale`, `resize` and `return_features`, as the I3D that circulates
with StyleGAN-V does, is called with False, False and True, and returns "logits". TorchScript is a
program: load only files that you trust.

Shapes: B clips, T frames, H x W pixels, C = 3 (RGB), F features.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from engine.durable_files import reading
from engine.errors import UserError
from engine.evaluation.i3d import I3D, LEAST_FRAMES, PIXELS, Placing, bilinear
from engine.evaluation.i3d_weights import MEMBER_SHA256, load_i3d

Layers = Mapping[str, Tensor]
"""Layers by name, each float32 [B, F]."""
LAYERS = ("logits", "pooled")
NetworkInput = Literal["float", "uint8"]
_STYLEGAN_V_ARGUMENTS = {"rescale", "resize", "return_features"}
_STYLEGAN_V_FORM = {"rescale": False, "resize": False, "return_features": True}


class FeatureNetwork(Protocol):
    """Clips to features, on one device, without gradients."""

    name: str
    sha256: str
    """Of the weights."""
    least_frames: int

    def __call__(self, clips_BTHWC: Tensor, resize: Placing) -> Layers:
        """Features of uint8 clips, which may lie on any device; on the CPU."""
        ...


class I3DNetwork:
    """The I3D network; see `engine.evaluation.i3d`."""

    name = "i3d-kinetics-400"
    sha256 = MEMBER_SHA256
    least_frames = LEAST_FRAMES

    def __init__(self, network: I3D, device: torch.device) -> None:
        self._network, self._device = network.to(device), device

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "I3DNetwork":
        """With the weights in `path`. Raises UserError where they are not the known ones."""
        return cls(load_i3d(path), device)

    @torch.inference_mode()
    def __call__(self, clips_BTHWC: Tensor, resize: Placing) -> Layers:
        """See `FeatureNetwork`."""
        with torch.backends.cudnn.flags(allow_tf32=False):  # fp32 means fp32
            found = self._network(network_input(clips_BTHWC.to(self._device), resize))
        return {"logits": found.logits_BK.float().cpu(), "pooled": found.pooled_BD.float().cpu()}


class TorchScriptNetwork:
    """A user's file; see the module's docstring."""

    least_frames = 1
    """Whatever it needs, it will say itself."""

    def __init__(self, path: Path, device: torch.device, takes: NetworkInput = "float") -> None:
        """Raises UserError where the file cannot be read or holds no TorchScript."""
        with reading(path), path.open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        try:
            self._module = torch.jit.load(path, map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{path} is no TorchScript file: {reason}") from None
        self.name, self._path, self._device, self._takes = path.name, path, device, takes
        arguments = {argument.name for argument in self._module.forward.schema.arguments}
        self._options = _STYLEGAN_V_FORM if arguments >= _STYLEGAN_V_ARGUMENTS else {}

    @torch.inference_mode()
    def __call__(self, clips_BTHWC: Tensor, resize: Placing) -> Layers:
        """See `FeatureNetwork`. Raises UserError where the file does not do what it should."""
        clips_BTHWC = clips_BTHWC.to(self._device)
        if self._takes == "uint8":
            given = clips_BTHWC.permute(0, 4, 1, 2, 3)
        else:
            given = network_input(clips_BTHWC, resize)
        try:
            returned = self._module(given, **self._options)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"{self._path} fails on {self._takes} clips {list(given.shape)}: {reason}"
            ) from None
        if isinstance(returned, dict):
            layers = {name: returned[name] for name in LAYERS if name in returned}
        else:
            layers = {"logits" if self._options else "pooled": returned}
        for name, tensor in layers.items():
            if not isinstance(tensor, Tensor) or tensor.ndim != 2 or len(tensor) != len(given):
                shown = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise UserError(f"{self._path} returns {shown} as {name}, not [{len(given)}, F]")
        if not layers:
            raise UserError(f"{self._path} returns a dict without logits and pooled")
        return {name: tensor.float().cpu() for name, tensor in layers.items()}


def network_input(clips_BTHWC: Tensor, resize: Placing) -> Tensor:
    """uint8 clips as I3D takes them: float32 [B, C, T, 224, 224], 2 * level / 255 - 1.

    Resized before they are scaled, and not rounded again, as the original FVD does.
    """
    num_clips = len(clips_BTHWC)
    frames_NCHW = clips_BTHWC.flatten(0, 1).permute(0, 3, 1, 2).float()
    frames_NCHW = bilinear(frames_NCHW, PIXELS, resize)
    return frames_NCHW.mul(2 / 255).sub(1).unflatten(0, (num_clips, -1)).transpose(1, 2)


def check_finite(layers: Layers, names: list[str]) -> None:
    """Raises UserError that names the clip whose features are not finite."""
    for layer, features_BF in layers.items():
        wrong = (~features_BF.isfinite().all(dim=1)).nonzero()
        if len(wrong):
            raise UserError(f"the network's {layer} of {names[int(wrong[0])]} are not finite")
