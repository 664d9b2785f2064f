"""The paper's measurements of memory and time (its Table 3)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MeasuredInPaper:
    """A row of Table 3; GPUs of 32 GB, batch 512 on as many as that takes."""

    samples_per_gpu: int
    memory_mb: int
    seconds_per_iteration: float


MODELS_OF_TABLE_3 = {"kinetics600", "dvdgan"}
"""Names of their configurations."""

# (resolution, frames) of what is trained.
TABLE_3 = {
    (32, 25): MeasuredInPaper(4, 27_897, 3.45),
    (128, 12): MeasuredInPaper(4, 29_073, 3.2),
    # It has 2.975 s for one sample, to be taken four times for as many samples.
    (128, 50): MeasuredInPaper(1, 32_203, 2.975),
}
