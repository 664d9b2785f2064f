"""Norm statistics for inference: dummy passes at the length to be generated, which then fix them.

The paper runs 200 of them before it evaluates. Stages are done in order. Each one runs on the
output of the earlier ones, already fixed, as it will in inference. Decided, where the paper is
silent: frozen stages run on such statistics while the next one trains, too.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.models.cascade import GeneratorCascade
from engine.models.norms import collect_statistics
from engine.trainer.fakes import LatentSource


@torch.no_grad()
def fix_standing_statistics(
    cascade: GeneratorCascade,
    *,
    latents: LatentSource,
    batch_size: int,
    num_passes: int,
    run_stage: Callable[[int, list[Tensor], Tensor | None], object],
    on_pass: Callable[[], object] = lambda: None,
) -> None:
    """Fix the statistics of all of the cascade's generators.

    `run_stage(n, zs, labels)` runs the n-th of them once, on what the n - 1 before it, already
    fixed, generate. `on_pass` is called after each pass, for a progress bar.
    """
    for number, generator in enumerate(cascade.generators, start=1):

        def run_pass(_: int, number: int = number) -> None:
            zs = latents.latents(batch_size, number)
            run_stage(number, zs, latents.labels(batch_size))
            on_pass()

        collect_statistics(generator, run_pass, num_passes)
