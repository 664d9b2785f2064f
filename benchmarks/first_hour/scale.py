"""How large what is measured is: the paper's sizes on a GPU, or small ones to see that it runs."""

from typing import NamedTuple

import torch

from benchmarks.calls import KINETICS
from benchmarks.setups import few_channels
from engine.configuration import Config, load_config


class Scale(NamedTuple):
    """Sizes and device."""

    device: torch.device
    small: bool

    @property
    def samples(self) -> tuple[int, ...]:
        """Of whole iterations, from the paper's samples per GPU up."""
        return (1, 2) if self.small else (4, 16, 32)

    def require_gpu(self) -> None:
        """Raises RuntimeError without one."""
        if self.device.type != "cuda":
            raise RuntimeError("there is no CUDA device")

    def overrides(self, num_stages: int) -> tuple[str, ...]:
        """Of a configuration's first stages, as with `--set`."""
        precision = "bf16" if self.device.type == "cuda" else "fp32"
        small = *few_channels(num_stages), f"training.precision={precision}"
        return small if self.small else ()

    def kinetics(self, micro_batch: int) -> Config:
        """configs/kinetics600.yaml for so many samples."""
        batch = f"training.micro_batch={micro_batch}", f"training.global_batch={micro_batch}"
        return load_config(KINETICS, (*self.overrides(2), *batch))


def scale_here(*, small: bool) -> Scale:
    """On the GPU; small ones on the CPU where there is none. Raises RuntimeError for others."""
    if torch.cuda.is_available():
        return Scale(torch.device("cuda", 0), small)
    if not small:
        raise RuntimeError("the paper's sizes need a CUDA device; --small runs on a CPU")
    return Scale(torch.device("cpu"), small)
