"""Whether all nodes of a job write to one folder."""

import secrets
from pathlib import Path

from engine.durable_files import writing
from engine.errors import UserError
from engine.trainer.ranks import Ranks


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Every rank must see what rank 0 writes to `folder`. Collective.

    Raises UserError, on every rank, where one does not: it would keep its part of a checkpoint, or
    look for one, elsewhere.
    """
    if ranks.world_size == 1:
        return
    # A name that nobody has looked for yet: network file systems remember what was not there.
    token = folder / f".shared-{ranks.broadcast(secrets.randbits(62)):x}"
    if ranks.is_main:
        with writing(token):
            token.touch()
    ranks.barrier()
    unseen = ranks.any(not token.exists())
    if ranks.is_main:
        token.unlink()
    if unseen:
        raise UserError(
            f"{folder} is not one folder on all nodes; give --out a path on a file system that "
            "they share"
        )
