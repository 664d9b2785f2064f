"""Sampling in Python, from a checkpoint or an exported folder.

Shows how clips become an array for code of your own, such as a metric. They are the bytes that
`sample.py --num 4 --format npz` writes:

    python docs/examples/sample_a_checkpoint.py runs/demo clips.npy
"""

import sys

import numpy as np

from engine import Cascade

if __name__ == "__main__":
    folder, out = sys.argv[1:]
    cascade = Cascade.from_pretrained(folder)  # of a run, the newest checkpoint of the last stage
    clips_NTCHW = cascade.generate(num=4, seed=0)  # uint8, of the trained classes in turn
    np.save(out, clips_NTCHW.permute(0, 1, 3, 4, 2).numpy())
    print(f"{out}: {len(clips_NTCHW)} clips of {clips_NTCHW.shape[1]} frames")
