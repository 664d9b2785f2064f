"""train.py on several ranks, of which one alone, FAILING_RANK, cannot read its clips.

`FAILING_RANK=1 deepspeed one_rank_fails.py --stage 1 ...`
"""

import os

from engine.command_line import run
from engine.errors import UserError
from engine.train import main
from engine.trainer.reals import RealBatch, Reals


def spoiled(self: Reals) -> RealBatch:
    raise UserError("a clip is spoiled;\nreplace it")


if __name__ == "__main__":
    if os.environ["RANK"] == os.environ["FAILING_RANK"]:
        Reals.next = spoiled  # type: ignore[method-assign]
    run(main)
