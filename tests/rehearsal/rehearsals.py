"""Rehearsals in a process of their own: `python rehearsals.py NUM_RANKS ARGUMENTS.json`.

ARGUMENTS.json holds a list of train.py's argument lists. Prints one line of JSON: for each, what
was found. DeepSpeed's start-up takes longer than small rehearsals do.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from engine.rehearsal.rehearse import rehearse
from engine.rehearsal.stand_ins import fake_job
from engine.train import parse, settle_for_rehearsal

if __name__ == "__main__":
    num_ranks, file = sys.argv[1:]
    results = []
    with fake_job(int(num_ranks)) as ranks:
        for arguments in json.loads(Path(file).read_text()):
            options = parse([*arguments, "--rehearse", num_ranks])
            config = settle_for_rehearsal(options, say=lambda line: None)
            asked = options.data is not None
            found = rehearse(config, options.stage, ranks, data_asked=asked, say=lambda line: None)
            results.append(
                {
                    "by_rank": [
                        {name: asdict(file) for name, file in files.items()}
                        for files in found.layout.by_rank
                    ],
                    "meta_bytes": found.layout.meta_bytes,
                    "previous": found.layout.previous and asdict(found.layout.previous),
                    "num_accumulated": found.num_accumulated,
                    "num_files": found.layout.num_files,
                    "partitions": [asdict(partition) for partition in found.partitions],
                    "shares": asdict(found.shares),
                    "collectives": found.collectives,
                }
            )
    print(json.dumps(results))
