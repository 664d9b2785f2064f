"""meta.json of a checkpoint: what it is of, which files belong to it, and a hash of all that.

It is written last and read strictly: what was changed, cut off or written by hand is refused.
"""

import hashlib
import json
import platform
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.configuration_errors import explain
from engine.errors import UserError

FORMAT = 3  # 1 and 2 had DeepSpeed's files, which fit only the ranks that wrote them
GENERATOR = "generator.pt"
NETWORKS = ("generator", "discriminators")

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Evaluated(BaseModel):
    """What an evaluation during training found."""

    model_config = _STRICT

    measured: dict[str, float]
    """Values by metric."""
    of_real: dict[str, float]
    """The same of real clips, compared with as many others."""
    metric: str
    """By which the best checkpoint is chosen."""
    badness: float
    """Of that metric: lower is better."""
    protocol: str
    """A fingerprint: values of different ones do not compare."""

    def to_log(self) -> dict[str, float]:
        """`evaluation/fvd`, `evaluation/fvd/real` and so on."""
        measured = {f"evaluation/{name}": value for name, value in self.measured.items()}
        return measured | {f"evaluation/{name}/real": v for name, v in self.of_real.items()}

    def line(self, step: int, *, is_best: bool) -> str:
        """For the console."""
        shown = ", ".join(f"{name} {value:.4g}" for name, value in self.measured.items())
        found = f", the best {self.metric} so far" if is_best else ""
        return f"evaluation at step {step}: {shown}{found}"

    def compares_with(self, other: "Evaluated") -> bool:
        """Whether the other's badness is of the same metric and protocol."""
        return (self.metric, self.protocol) == (other.metric, other.protocol)


class RunFacts(BaseModel):
    """What a checkpoint is of, besides its step and files."""

    model_config = _STRICT

    stage: Annotated[int, Field(ge=1)]
    world_size: Annotated[int, Field(ge=1)]
    """Ranks that wrote it."""
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    previous: Sha256 | None
    """Hash of the previous.pt that it was trained with."""
    config: dict[str, Any]
    """The whole configuration, as `Config.to_tree` gives it."""
    classes: list[str]
    class_counts: list[Annotated[int, Field(ge=0)]]
    frames_per_second: Annotated[float, Field(gt=0)]
    evaluation: Evaluated | None
    """Where this very step was evaluated."""


class CheckpointMeta(RunFacts):
    """The whole file."""

    format: int
    step: Annotated[int, Field(ge=0)]
    versions: dict[str, str]
    files: dict[str, tuple[Annotated[int, Field(ge=0)], Sha256]]
    """Size and SHA-256 by name."""


def shard_file(network: str, rank: int) -> str:
    """A rank's part of one of NETWORKS, with Adam's moments."""
    return f"{network}-{rank:05d}.pt"


def rank_file(rank: int) -> str:
    """A rank's own file of a checkpoint."""
    return f"rank-{rank:05d}.pt"


def file_names(world_size: int) -> set[str]:
    """All files of a checkpoint but meta.json."""
    ranks = range(world_size)
    shards = {shard_file(network, rank) for network in NETWORKS for rank in ranks}
    return {GENERATOR, *shards, *(rank_file(rank) for rank in ranks)}


def meta_text(step: int, facts: RunFacts, files: dict[str, tuple[int, str]]) -> str:
    """The text of meta.json."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    told = {"format": FORMAT, "step": step, **facts.model_dump(), "versions": versions}
    tree = json.loads(json.dumps({**told, "files": files}))  # as it will be read
    return json.dumps({**tree, "sha256": _digest(tree)}, indent=1)


def read_meta(text: str, source: str) -> CheckpointMeta:
    """The reverse. Raises UserError that begins with `source`, a checkpoint's folder."""
    try:
        tree = json.loads(text)
        found = tree["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{source} is not a checkpoint: no readable meta.json") from None
    if found != FORMAT:
        raise UserError(f"{source} has checkpoint format {found}; this version reads {FORMAT}")
    if tree.pop("sha256", None) != _digest(tree):
        raise UserError(f"checkpoint {source} is damaged: meta.json has changed")
    try:
        meta = CheckpointMeta.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        reason = explain(error.errors()[0], list(CheckpointMeta.model_fields))
        raise UserError(f"checkpoint {source} is damaged: meta.json: {reason}") from None
    odd = meta.files.keys() ^ file_names(meta.world_size)
    if odd:
        raise UserError(f"checkpoint {source} is damaged: meta.json: {min(odd)} is odd or missing")
    return meta


def _digest(tree: dict[str, Any]) -> str:
    """Of everything else in the file, however it is laid out."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
