"""How often the host would wait for a GPU in one iteration, as JSON; run on the pretended GPU.

The tiny configuration in bf16, trained by the engine's own trainer on its own loader: video files,
decoded by PyAV. Of both stages, for several numbers of accumulated micro-batches.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero import stage_1_and_2
from small_runs import write_tiny

from benchmarks.pretended_gpu.run import watched_waits
from benchmarks.trainers import one_rank, stage_builder
from engine.configuration import Config
from engine.trainer.acceleration import accelerate
from engine.trainer.ranks import Ranks
from engine.trainer.step import Trainer
from engine.video.dataset import open_dataset
from engine.video.index import VideoIndex

SETTINGS = {
    "ZeRO-1": (),
    "ZeRO-0": ("training.zero_stage=0",),
    "CUDA graphs": ("training.zero_stage=0", "training.acceleration=cuda_graphs"),
}
STAGES = (1, 2)
MICRO_BATCHES = (1, 3)
# DeepSpeed's timers start after two updates, and CUDA graphs are recorded in the first.
NUM_BEFORE = 3


def main() -> None:
    tiny = write_tiny(Path(sys.argv[1]))
    index = open_dataset(tiny.config().data, make=True, say=lambda line: None)
    # Norms and measures are what lay in memory: they are read, and what they say is not heeded.
    asked = stage_1_and_2.is_invalid_grad_norm
    stage_1_and_2.is_invalid_grad_norm = lambda norm: asked(norm) and False
    Trainer._check_finite = lambda self, means: None  # type: ignore[method-assign]
    with one_rank(torch.device("cuda", 0)) as ranks:
        found = [
            {"settings": name, "stage": stage, "micro_batches": count}
            | waits_of(iteration_config(tiny.config, settings, count), stage, ranks, index)
            for name, settings in SETTINGS.items()
            for stage in STAGES
            for count in MICRO_BATCHES
        ]
    print("waits:", json.dumps(found))


def iteration_config(load: Any, settings: tuple[str, ...], num_micro_batches: int) -> Config:
    """Two samples per micro-batch."""
    batch = "training.micro_batch=2", f"training.global_batch={2 * num_micro_batches}"
    fixed = "training.precision=bf16", "data.decoder=pyav"
    config: Config = load(*fixed, *batch, *settings)
    return config


def waits_of(config: Config, number: int, ranks: Ranks, index: VideoIndex) -> dict[str, Any]:
    """Of an iteration after some others: all of them together, and where the host would wait."""
    builder = stage_builder(config, number, ranks)
    loader = builder.loader(index)
    try:
        trainer = builder.trainer(loader)
        accelerate(config.stages[number], ranks, trainer, builder.previous)
        for _ in range(NUM_BEFORE):
            trainer.train_step()
        with watched_waits() as where:
            trainer.train_step()
    finally:
        loader.close()
    return {"waits": sum(where.values()), "where": where}


if __name__ == "__main__":
    main()
