"""train.py on two ranks: rank 1 gets SIGTERM in its first step, rank 0 closes its log slowly.

`deepspeed --num_gpus 2 closes_late.py --stage 1 ...`
"""

import os
import signal
import time
from collections.abc import Callable

from engine.command_line import run
from engine.train import main
from engine.trainer.logbook import Logbook
from engine.trainer.step import Trainer

train_step = Trainer.train_step


def step_and_signal(self: Trainer, goes_on: Callable[[], bool] = lambda: True) -> dict[str, float]:
    os.kill(os.getpid(), signal.SIGTERM)
    return train_step(self, goes_on)


def close_late(self: Logbook) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # were it sent, nothing below would be said
    time.sleep(4)  # the launcher looks every second
    print("closed late", flush=True)


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        Trainer.train_step = step_and_signal  # type: ignore[method-assign]
    else:
        Logbook.close = close_late  # type: ignore[method-assign]
    run(main)
