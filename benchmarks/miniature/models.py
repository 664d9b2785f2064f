"""Which models are compared: configs/sample.yaml's first two stages, with one change each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.command_line import REPOSITORY
from engine.configuration import Config, config_from_tree, load_config
from engine.yaml_tree import Tree, set_key

SAMPLE = REPOSITORY / "configs/sample.yaml"
PAPERS_LOW_FRAMES = True
"""Whether x_l's frames are repeated in all models, as in the paper, or as in configs/sample.yaml.
Either way x_l is continued at a video's ends as there: else the padding's zeros, which move the
last frames, would decide what is said of motion beyond the window."""

COMMON: dict[str, Any] = {
    # Windows of 6 frames of x_l, the longer ones of Table 1.
    "stages.2.num_frames": 12,
}
if PAPERS_LOW_FRAMES:
    COMMON["stages.2.generator.low_frames"] = "repeat"
WINDOWS = (6, 12)
"""Lengths that models are trained on, in frames of the output: half a clip or less, and more."""
NUM_FRAMES = 16
"""Of the clips that are measured: stage 1's 8 frames, unrolled."""
PERIOD = 2
"""Frames made of one frame of stage 1; the single-stage model is measured with the same."""
_PAPERS_LATENT_SIZE, _PAPERS_RATES = 128, (1e-4, 5e-4)


@dataclass(frozen=True)
class Model:
    """A model and what sets it apart."""

    name: str
    """Of its folder."""
    title: str
    place: str
    """Where the paper compares it."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Keys of the configuration and their values."""
    single_stage: bool = False
    """Stage 2's networks generate from noise, without a stage 1."""
    shares_stage_1: bool = True
    """Trains stage 2 only, on the stage 1 that these models share; else all of it, together."""

    @property
    def stage_number(self) -> int:
        """The stage that is trained last, and measured."""
        return 1 if self.single_stage else 2


MODELS = (
    Model("full", "SSW-GAN, windows of 6", "the model"),
    Model(
        "no_matching", "no matching discriminator", "Table 2",
        {"stages.2.discriminators.matching": False},
    ),
    Model("window3", "windows of 3", "Table 1", {"stages.2.num_frames": 6}),
    Model(
        "conv_gru", "ConvGRU in stage 2", "Appendix C",
        {"stages.2.generator.temporal": "conv_gru"},
    ),
    Model(
        "joint", "stages 1 and 2 trained together", "Appendix H",
        {
            "stages.2.joint": True,
            "stages.2.discriminators.matching": False,
            "stages.2.training.sample_bank": None,
        },
        shares_stage_1=False,
    ),
    Model(
        "dvdgan", "DVD-GAN, one stage", "Figure 3",
        {"stages.1.num_frames": 6, "stages.1.generator.temporal": "conv_gru"},
        single_stage=True, shares_stage_1=False,
    ),
)  # fmt: skip
FULL = MODELS[0]


def configuration(
    model: Model,
    *,
    iterations: Mapping[int, int] | None = None,
    training: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> Config:
    """The model's, with `iterations` by stage, and keys of every stage's training and of the data.

    Decided: what is trained from noise alone gets stage 1's `minibatch_stddev`, whichever stage's
    discriminators judge it; the single-stage model is trained with stage 1's settings too.
    """
    tree = load_config(SAMPLE).to_tree()
    stages = tree["stages"] = {number: tree["stages"][number] for number in (1, 2)}
    _set(tree, COMMON)
    if not model.shares_stage_1:
        shared = stages[1]["discriminators"]["minibatch_stddev"]
        stages[2]["discriminators"]["minibatch_stddev"] = shared
    if model.single_stage:
        tree["stages"] = stages = {1: stages[2] | {"training": stages[1]["training"]}}
    _set(tree, model.changes)
    for number, stage in stages.items():
        stage["training"] |= training or {}
        if iterations is not None:
            stage["training"]["iterations"] = iterations[number]
    tree["data"] |= data or {}
    tree["name"] = f"miniature-{model.name}"
    return config_from_tree(tree, f"benchmarks/miniature: {model.name}")


def own_options(config: Config) -> list[str]:
    """What is on in a configuration, or set otherwise than in the paper, by stage."""
    found = []
    for number, stage in config.stages.items():
        training, generator = stage.training, stage.generator
        options = [(f"z of {generator.latent_size}", generator.latent_size != _PAPERS_LATENT_SIZE)]
        if number > 1:
            edge = generator.edge_frames
            options += [
                ("x_l interpolated in time", generator.low_frames == "interpolate"),
                (f"x_l continued by {edge} at each end", edge > 0),
            ]
        # A jointly trained stage 1 has no discriminators and no training of its own.
        if number == len(config.stages) or not config.stages[number + 1].joint:
            clipped = training.max_gradient_norm is not None
            other_steps = training.discriminator_steps != 2
            rates = training.generator_lr, training.discriminator_lr
            options += [
                ("D sees minibatch stddev", stage.discriminators.minibatch_stddev),
                (f"gradients clipped at {training.max_gradient_norm}", clipped),
                ("weights averaged", training.ema_decay is not None),
                (f"D updates per G update {training.discriminator_steps}", other_steps),
                (f"learning rates {rates[0]:g} and {rates[1]:g}", rates != _PAPERS_RATES),
                ("fakes used twice", training.reuse_fakes),
                ("a bank of samples", training.sample_bank is not None),
            ]
        names = [name for name, is_on in options if is_on]
        if names:
            found.append(f"stage {number}: {', '.join(names)}")
    return found


def folder_of(out: Path, seed: int, name: str) -> Path:
    """Where a model of one seed is trained and measured."""
    return out / f"seed-{seed}" / name


def _set(tree: Tree, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        set_key(tree, key, value)
