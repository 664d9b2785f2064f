"""Several runs of train.py in one job: `deepspeed several_runs.py RUNS.json`.

DeepSpeed's start-up takes longer than all of these runs together. RUNS.json holds a list of
train.py's argument lists; each is `engine.train.main`, and all of them must succeed.
"""

import json
import sys
from pathlib import Path

from engine.train import main
from engine.trainer.ranks import Ranks

if __name__ == "__main__":
    disconnect = Ranks.disconnect
    Ranks.disconnect = lambda self: None  # type: ignore[method-assign]  # kept for the next run
    # The launcher puts --local_rank first.
    for arguments in json.loads(Path(sys.argv[-1]).read_text()):
        main(arguments)
    disconnect(Ranks.from_environment())
