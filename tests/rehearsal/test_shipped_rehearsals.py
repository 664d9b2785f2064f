"""Every shipped configuration is rehearsed at full size: each variant and stage by eight ranks.

A variant whose networks and clips are another's, and whose training alone differs, is left out.
"""

import json
from pathlib import Path

import pytest
import torch
from forks import Forks
from small_runs import REPOSITORY
from test_rehearsal import rehearsed

from engine.configuration import Config, load_config, variant_names
from engine.models.construction import build_discriminators, build_generator

NUM_RANKS = 8
Case = tuple[str, str | None, int]
"""Configuration file, variant, stage."""


def load(file: str, variant: str | None) -> Config:
    return load_config(REPOSITORY / "configs" / file, overrides(variant))


def overrides(variant: str | None) -> list[str]:
    return [f"variant={variant}"] if variant else []


def distinct_cases() -> dict[str, list[Case]]:
    """By file: the stages whose networks and clips no earlier case has."""
    seen: set[str] = set()
    by_file: dict[str, list[Case]] = {}
    for path in sorted((REPOSITORY / "configs").glob("*.yaml")):
        for variant in variant_names(path):
            config = load(path.name, variant)
            for number in config.stages:
                stages = [
                    config.stages[n].model_dump(exclude={"training"}) for n in range(1, number + 1)
                ]
                key = json.dumps([config.data.num_classes, stages])
                if key not in seen:
                    seen.add(key)
                    by_file.setdefault(path.name, []).append((path.name, variant, number))
    return by_file


CASES = distinct_cases()


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("file", CASES)
def test_configuration_rehearses(file: str, forks: Forks, tmp_path: Path) -> None:
    """Batch, clips, ZeRO's partitions and the checkpoint are those of the configured networks."""
    runs = [
        [
            *(
                "--config",
                f"configs/{name}",
                "--stage",
                str(number),
                "--out",
                str(tmp_path / "out"),
            ),
            *(part for override in overrides(variant) for part in ("--set", override)),
        ]
        for name, variant, number in CASES[file]
    ]
    results = rehearsed(forks, tmp_path, NUM_RANKS, runs)
    for (_, variant, number), found in zip(CASES[file], results, strict=True):
        config, case = load(file, variant), f"{variant}, stage {number}"
        stage = config.stages[number]
        trained = range(1, number + 1) if stage.joint else (number,)
        with torch.device("meta"):
            generators = {n: build_generator(config, n) for n in range(1, number + 1)}
            discriminators = build_discriminators(config, number)
        num_parameters = {
            "generator": sum(p.numel() for n in trained for p in generators[n].parameters()),
            "discriminators": sum(p.numel() for p in discriminators.parameters()),
        }

        samples = len(found["shares"]["first_batch"])
        assert samples * NUM_RANKS * found["num_accumulated"] == stage.training.global_batch, case
        assert sum(found["shares"]["clips_of_rank"]) == found["shares"]["epoch"] > 0, case
        assert len(found["partitions"]) == 8, case  # two networks under four ZeRO stages
        for part in found["partitions"]:
            assert part["num_parameters"] == num_parameters[part["network"]], case
            ranks = 1 if part["zero_stage"] == 0 else NUM_RANKS
            held = part["num_partitioned"] * ranks - part["num_padding"]
            assert held == part["num_parameters"], case
        tensors = found["by_rank"][0]["generator.pt"]["tensors"]
        for n in trained:
            names = {f"/generators/{n}/{name}" for name in generators[n].state_dict()}
            assert names <= tensors.keys(), case
        # Frozen stages are kept once beside the checkpoints; joint training freezes none.
        frozen = (found["previous"] or {"tensors": {}})["tensors"]
        sizes = [
            sum(p.numel() for p in generators[n].parameters())
            for n in generators
            if n not in trained
        ]
        assert bool(frozen) == bool(sizes), case
        assert sum(frozen.values()) >= sum(sizes), case
