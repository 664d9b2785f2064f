"""Did every stage of a run learn? The untrained and the trained generator against the data."""

import contextlib
from pathlib import Path

import torch

from engine.models.construction import build_generator
from engine.trainer.checkpoints import GENERATOR, PREVIOUS, find_checkpoint
from engine.trainer.learning_check import Distances, learning_distances
from engine.trainer.networks import SAMPLES, WEIGHTS, StageBuilder
from engine.trainer.previous import load_previous
from engine.trainer.ranks import Ranks
from engine.video.dataset import describe, open_dataset

_NUM_BATCHES = 8


def learning_report(run: Path, num_stages: int) -> str:
    """A table: per stage, how far its videos' statistics are from real ones, before and after."""
    lines = [
        "Distance of generated from real videos (see engine/trainer/learning_check.py):",
        f"{'':9}{'per-pixel mean':>20}{'variance':>20}{'motion':>20}",
    ]
    for number in range(1, num_stages + 1):
        before, after = stage_distances(run, number)
        cells = (f"{was:.3f} -> {now:.3f}" for was, now in zip(before, after, strict=True))
        lines.append(f"  stage {number} {''.join(f'{cell:>20}' for cell in cells)}")
    return "\n".join(lines)


@torch.no_grad()
def stage_distances(run: Path, number: int) -> tuple[Distances, Distances]:
    """Distances of one stage's untrained and trained generator, both with batch statistics."""
    checkpoint = find_checkpoint(run, stage_number=number)
    config = checkpoint.config()
    index = open_dataset(config.data, make=False, say=print)
    facts = describe(index, config.data, config.stages[number].num_source_frames)
    builder = StageBuilder(config, number, Ranks.from_environment(), facts)
    if number > 1:
        builder.previous = load_previous(
            run / f"stage{number}" / PREVIOUS, config, builder.ranks.device
        )
    torch.manual_seed(builder.seed(WEIGHTS))
    untrained = build_generator(config, number).to(builder.ranks.device)
    trained = build_generator(config, number).to(builder.ranks.device)
    trained.load_state_dict(checkpoint.read(GENERATOR)["generators"][number])
    fakes = builder.fakes(builder.latents(builder.seed(SAMPLES)), None)
    batch_size = config.stages[number].training.micro_batch
    real, before, after = [], [], []
    with contextlib.closing(builder.loader(index)) as loader:
        for _ in range(_NUM_BATCHES):
            real.append(next(loader).video_BTCHW)
            inputs = fakes.draw(batch_size)
            before.append(fakes.run(untrained, inputs).video_BTCHW)
            after.append(fakes.run(trained, inputs).video_BTCHW)
    real_BTCHW = torch.cat(real)
    return (
        learning_distances(real_BTCHW, torch.cat(before)),
        learning_distances(real_BTCHW, torch.cat(after)),
    )
