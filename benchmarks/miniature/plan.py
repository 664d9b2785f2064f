"""What a run of the miniature does, settled before it starts, and the file that keeps it.

`OUT/plan.json` is written once. A later call with the same settings goes on from what is there; one
with others is refused, because its models would not be comparable.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.miniature.budget import STAGE_1, Budget, budget_for, count, iterations_of
from benchmarks.miniature.models import FULL, MODELS, Model, configuration
from engine.configuration import Config
from engine.durable_files import reading, write_json
from engine.errors import UserError

PLAN = "plan.json"
_FORMAT = 1
_TRAINING = {"log_every": 10, "sample_every": 1_000_000, "checkpoint_every": 100}
_QUICK_BUDGET = Budget(4e10, 6e10)  # one to five iterations


@dataclass(frozen=True)
class Settings:
    """How large it is."""

    minutes: float
    quick: bool
    clips_per_class: int
    """That are measured."""
    passes: int
    """That fix the norms' statistics before clips are made."""

    @staticmethod
    def of(minutes: float, quick: bool) -> "Settings":
        """For a result, or quickly."""
        if quick:
            return Settings(minutes, quick, clips_per_class=2, passes=2)
        return Settings(minutes, quick, clips_per_class=16, passes=50)

    @property
    def evaluated_per_class(self) -> int:
        """Clips whose features a network computes, about one a second."""
        return 1 if self.quick else 8

    def training(self, seed: int) -> dict[str, Any]:
        """Keys of every stage's training."""
        passes = {"norm_statistics_passes": 2} if self.quick else {}
        return {**_TRAINING, **passes, "seed": seed}

    def data(self, out: Path) -> dict[str, Any]:
        """Keys of the data: the sample set's own, or for a quick run a smaller one in `out`."""
        if not self.quick:
            return {}
        made = {"num_clips": 32, "num_frames": 32, "resolution": 32, "codec": "mjpeg", "seed": 0}
        return {"path": str(out / "data"), "procedural": made}


@dataclass(frozen=True)
class MiniaturePlan:
    """Settings, and what was counted and chosen by them."""

    out: Path
    settings: Settings
    flops: dict[str, float]
    """Of an iteration, by model, and of the shared stage 1."""
    iterations: dict[str, int]
    budget: Budget

    def config(self, model: Model, seed: int) -> Config:
        """The configuration that a model is trained with."""
        return configuration(
            model,
            iterations={
                1: self.iterations[STAGE_1],
                model.stage_number: self.iterations[model.name],
            },
            training=self.settings.training(seed),
            data=self.settings.data(self.out),
        )

    @property
    def data_config(self) -> Config:
        """A configuration whose data and resolution are those of all models."""
        return self.config(FULL, seed=0)


def settle(out: Path, settings: Settings, say: Callable[[str], None] = print) -> MiniaturePlan:
    """The plan in `out`, which is made where there is none.

    Raises UserError when the one that is there was made with other settings.
    """
    path = out / PLAN
    if path.exists():
        plan = read_plan(out)
        if plan.settings != settings:
            raise _other_settings(path)
        return plan
    say("counting the FLOPs of an iteration of every model")
    flops = count()
    budget = _QUICK_BUDGET if settings.quick else budget_for(settings.minutes)
    plan = MiniaturePlan(out, settings, flops, iterations_of(flops, budget), budget)
    tree = {
        "format": _FORMAT,
        "settings": asdict(settings),
        "flops_per_iteration": flops,
        "iterations": plan.iterations,
        "budget": asdict(budget),
        "models": _models(),
    }
    write_json(path, tree)
    return plan


def read_plan(out: Path) -> MiniaturePlan:
    """What `settle` has written. Raises UserError when the models are others by now."""
    path = out / PLAN
    with reading(path):
        text = path.read_text()
    try:
        tree = json.loads(text)
        same = tree["format"] == _FORMAT and tree["models"] == _models()
        settings, budget = Settings(**tree["settings"]), Budget(**tree["budget"])
        plan = MiniaturePlan(out, settings, tree["flops_per_iteration"], tree["iterations"], budget)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: remove {out}, or use another --out") from None
    if not same:
        raise _other_settings(path)
    return plan


def _models() -> dict[str, Any]:
    """Every model's configuration as it stands now, as JSON gives it back."""
    models = {model.name: configuration(model).to_tree() for model in MODELS}
    as_read: dict[str, Any] = json.loads(json.dumps(models))
    return as_read


def _other_settings(path: Path) -> UserError:
    return UserError(
        f"{path} was made with other settings, or another configs/sample.yaml: remove "
        f"{path.parent}, or use another --out"
    )
