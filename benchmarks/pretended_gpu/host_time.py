"""What a training iteration costs the host, beside plain PyTorch's: CPU time, and kernels.

Run by `run.py` with the names of setups. The networks have a thirty-second of their channels and
as many operators as ever; cuDNN's and cuBLAS's own time is missing on both sides.
"""

import sys
import time
from collections.abc import Callable

import torch

from benchmarks.pretended_gpu.run import launches
from benchmarks.setups import BUILDS, SETUPS, few_channels
from benchmarks.timing import paired_ratios, spread
from benchmarks.trainers import one_rank
from benchmarks.whole_step import Iterations

SAMPLES, ROUNDS = 4, 15


def main() -> None:
    """Print a line per setup."""
    with one_rank(torch.device("cuda", 0)) as ranks:
        for name in sys.argv[1:]:
            setup = SETUPS[name]
            seconds: dict[str, list[float]] = {}
            kernels: dict[str, list[int]] = {}
            runs: dict[str, Callable[[], None]] = {}
            for build in ("bf16", "ours", "graphs"):
                iterations = Iterations(setup, BUILDS[build], ranks, few_channels(setup.number))
                iterations.accelerate()
                run = runs[build] = iterations.at(SAMPLES)
                for _ in range(2):
                    run()
                before = launches()
                run()
                kernels[build] = [now - then for now, then in zip(launches(), before, strict=True)]
                seconds[build] = []
            for _ in range(ROUNDS):
                for build, run in runs.items():
                    start = time.process_time()
                    run()
                    seconds[build].append(time.process_time() - start)
            for build, taken in seconds.items():
                ours, triton = kernels[build]
                print(f"{name} {build}: {spread(taken).median * 1e3:.0f} ms of CPU time", end=", ")
                print(f"{ours} kernels of PyTorch's but convolutions, {triton} of Triton's")
            for build in ("ours", "graphs"):
                ratio = paired_ratios(seconds[build], seconds["bf16"])
                print(f"{name} {build} / bf16: {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
