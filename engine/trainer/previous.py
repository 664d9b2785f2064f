"""The frozen earlier stages that feed this one, and the file that keeps them.

`OUT/stageN/previous.pt` is written once, when stage N starts: the generators of stages 1 to N-1 and
the norm statistics they run with. From then on stage N does not depend on their folders.
"""

import shutil
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from engine.configuration import Config
from engine.durable_files import writing
from engine.errors import UserError
from engine.models.cascade import GeneratorCascade
from engine.models.construction import build_generator
from engine.models.norms import fix_norm_statistics, norm_statistics
from engine.trainer.checkpoints import (
    META,
    Checkpoint,
    read_tensors,
    save_tensors,
    sha256,
)
from engine.trainer.fakes import LatentSource
from engine.trainer.standing_statistics import fix_standing_statistics


class PreviousStages:
    """Stages 1 to N-1 as a cascade without gradients."""

    def __init__(self, cascade: GeneratorCascade, digest: str) -> None:
        self.cascade = cascade.freeze()
        self.digest = digest
        """The SHA-256 of the file that it was read from."""


def load_cascade(
    config: Config, generators: dict[int, dict[str, torch.Tensor]], device: torch.device
) -> GeneratorCascade:
    """A cascade of stages 1 to n with the given state dicts (numbered from 1)."""
    networks = []
    for number in sorted(generators):
        with torch.device("meta"):
            network = build_generator(config, number)
        network.to_empty(device=device)
        network.load_state_dict(generators[number])
        networks.append(network)
    return GeneratorCascade(networks, config)


def check_same_networks(
    config: Config, checkpoint: Checkpoint, config_name: str, *, resuming: bool = False
) -> None:
    """UserError when the configuration's stages are not what the checkpoint holds.

    Generators only; the last stage's discriminators too when it is to be trained on.
    """
    trained = checkpoint.config()
    if trained.data.num_classes != config.data.num_classes:
        raise UserError(
            f"{checkpoint.path} was trained with data.num_classes={trained.data.num_classes}; "
            f"{config_name} says {config.data.num_classes}"
        )
    for number in range(1, checkpoint.stage_number + 1):
        keys = ["resolution", "num_frames", "frame_stride", "generator"]
        if resuming and number == checkpoint.stage_number:
            keys += ["discriminators", "joint"]
        for key in keys:
            was, now = getattr(trained.stages[number], key), getattr(config.stages[number], key)
            if was != now:
                raise UserError(
                    f"{checkpoint.path} was trained with another stages.{number}.{key} than "
                    f"{config_name} describes"
                )


def check_same_classes(classes: Sequence[str], data: str, checkpoint: Checkpoint) -> None:
    """UserError when the labels of the data set at `data` mean other classes than the checkpoint's.

    Decided: a list that only goes on where the other ends differs too. An earlier stage knows
    nothing of a class that it was not trained on, and a resumed run goes on exactly.
    """
    trained = checkpoint.classes
    for number, (now, was) in enumerate(zip_longest(classes, trained)):
        if now != was:
            raise UserError(
                f"class {number} is {_named(now)} in {data}, {_named(was)} in {checkpoint.path}: "
                "labels must mean the same in all stages; index the videos with engine/prepare.py "
                f"--classes FILE, where FILE lists the classes as its {META} does"
            )


def _named(class_name: str | None) -> str:
    return "not there" if class_name is None else repr(class_name)


def freeze_previous(
    path: Path,
    config: Config,
    checkpoint: Checkpoint,
    latents: LatentSource,
    *,
    batch_size: int,
    num_passes: int,
) -> None:
    """Write `path`: the checkpoint's generators with their statistics at training's lengths."""
    generators = checkpoint.generators()
    cascade = load_cascade(config, generators, latents.device).freeze()
    fix_standing_statistics(
        cascade,
        latents=latents,
        batch_size=batch_size,
        num_passes=num_passes,
        run_stage=lambda number, zs, labels_B: cascade.sample_previous(
            number + 1, zs, labels_B, latents.random
        ),
    )
    with writing(path):
        save_tensors(path, previous_contents(generators, cascade))


def previous_contents(
    generators: dict[int, dict[str, torch.Tensor]], cascade: GeneratorCascade
) -> dict[str, Any]:
    """The contents of previous.pt: state dicts, and the statistics that the cascade is fixed to."""
    statistics = {n: norm_statistics(g) for n, g in enumerate(cascade.generators, start=1)}
    return {"generators": generators, "statistics": statistics}


def copy_previous(source: Path, path: Path) -> None:
    """Copy the file from the run that is resumed."""
    with writing(path):
        shutil.copyfile(source, path)


def load_previous(path: Path, config: Config, device: torch.device) -> PreviousStages:
    """Read what `freeze_previous` wrote."""
    kept = read_tensors(path)
    cascade = load_cascade(config, kept["generators"], device)
    for number, generator in enumerate(cascade.generators, start=1):
        fix_norm_statistics(
            generator, {k: v.to(device) for k, v in kept["statistics"][number].items()}
        )
    return PreviousStages(cascade, sha256(path))
