"""Sampling from a checkpoint in Python: the steps of engine/sample.py, without its files.

Shows how clips become an array for code of your own, such as a metric. They are the bytes that
`sample.py --num 4 --format npz` writes:

    python docs/examples/sample_a_checkpoint.py runs/demo clips.npy
"""

import sys
from pathlib import Path

import numpy as np
import torch

from engine.models.construction import forbid_tf32
from engine.sampling import SamplePlan, choose_labels, generate, run_passes
from engine.trainer.checkpoints import find_checkpoint, read_generators
from engine.trainer.previous import load_cascade

if __name__ == "__main__":
    folder, out = sys.argv[1:]
    checkpoint = find_checkpoint(Path(folder))  # the newest of the last stage
    config, stage = checkpoint.config(), checkpoint.stage_number
    plan = SamplePlan(
        checkpoint,
        labels=choose_labels(None, 4, checkpoint),  # the trained classes in turn
        num_frames=config.stages[1].num_frames * config.unrolling(stage),
        sigma=1.0,
        seed=0,
        num_passes=config.stages[stage].training.norm_statistics_passes,
        batch_size=8,
    )
    forbid_tf32()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cascade = load_cascade(config, read_generators(checkpoint), device).freeze()
    run_passes(cascade, plan)  # fixes the norms' statistics at this length
    clips_NTCHW = torch.stack(list(generate(cascade, plan)))  # uint8
    np.save(out, clips_NTCHW.permute(0, 1, 3, 4, 2).numpy())
    print(f"{out}: {len(clips_NTCHW)} clips of {plan.num_frames} frames, labels {plan.labels}")
