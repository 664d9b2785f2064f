"""train.py on two ranks, of which rank 1 gets SIGTERM before its n-th micro-batch is drawn.

`stopped_ranks.py N --stage 2 ...`
"""

import os
import signal
import sys

from engine.command_line import run
from engine.train import main
from engine.trainer.fakes import Inputs, WindowFakes

num_drawn = 0
draw = WindowFakes.draw


def draw_and_signal(self: WindowFakes, batch_size: int) -> Inputs:
    global num_drawn
    num_drawn += 1
    if num_drawn == number:
        os.kill(os.getpid(), signal.SIGTERM)
    return draw(self, batch_size)


if __name__ == "__main__":
    number = int(sys.argv.pop(1))
    if os.environ["RANK"] == "1":
        WindowFakes.draw = draw_and_signal  # type: ignore[method-assign]
    run(main)
