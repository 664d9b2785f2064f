"""One YAML file describes a data set and every stage trained on it; this module is its schema.

Read `load_config` first. Everything that is derived (a stage's input window, its spatial factor)
is computed here once, so that no two places can disagree about it.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.errors import UserError

BASE_RESOLUTION = 4  # the linear layer's output, in pixels (paper, section 3.2)

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Multipliers = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ProceduralClips(Section):
    """The sample data set: moving shapes, one motion per class, encoded into real video files."""

    num_clips: PositiveInt = 256
    num_frames: PositiveInt = 64
    resolution: PositiveInt = 64
    codec: Literal["mjpeg", "vp9"] = "mjpeg"
    seed: int = 0


class Data(Section):
    """Where videos come from and how a clip is cut from one."""

    path: str | None = None
    """A folder of videos or an index made by engine/prepare.py; `--data` overrides it."""
    procedural: ProceduralClips | None = None
    """Made under `path` on first use, when given."""
    num_classes: PositiveInt | None = None
    """None trains without classes (BDD100K)."""
    random_crop: bool = True
    horizontal_flip: bool = False
    decoder: Literal["auto", "dali-cpu", "dali-gpu", "pyav"] = "auto"
    num_threads: PositiveInt = 2
    """Decoding threads per rank."""


class Generator(Section):
    """A generator; `multipliers` are the units' output channels in units of `channels`."""

    temporal: Literal["conv_gru", "separable_conv"]
    """What mixes time in each unit (Appendix C compares both)."""
    channels: PositiveInt
    multipliers: Multipliers
    latent_size: PositiveInt = 128
    class_embedding_size: PositiveInt = 128


class Discriminators(Section):
    """Spatial, temporal and (stage 2 and later) matching discriminators of one stage."""

    channels: PositiveInt
    multipliers: Multipliers
    """From input to output."""
    spatial_frames: PositiveInt = 8
    """Frames per clip that the spatial discriminator judges."""
    matching: bool = True
    """False is the ablation of Table 2; stage 1 has none in any case."""


class Training(Section):
    """Optimisation, precision and cadence. Set for all stages at the top, overridden per stage."""

    iterations: PositiveInt
    """Generator updates."""
    global_batch: PositiveInt
    """Samples per update over all ranks."""
    micro_batch: PositiveInt
    """Samples per rank and forward pass; the rest of the global batch is accumulated."""
    discriminator_steps: PositiveInt = 2
    generator_lr: PositiveFloat = 1e-4
    discriminator_lr: PositiveFloat = 5e-4
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.0,
        0.999,
    )
    precision: Literal["fp32", "bf16"] = "fp32"
    """What activations are computed in; weights and optimiser state are always fp32."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Average of the generator's weights; the paper uses none."""
    condition_on: Literal["generated", "data"] = "generated"
    """What stage 2 and later upsample: windows of the frozen stages' samples, or of real clips."""
    norm_statistics_passes: PositiveInt = 200
    """Dummy passes that fix the per-frame statistics before a generator is used for inference."""
    seed: int = 0
    log_every: PositiveInt = 10
    sample_every: PositiveInt = 1000
    checkpoint_every: PositiveInt = 1000
    keep_checkpoints: PositiveInt = 3


class Stage(Section):
    """One stage: what it generates, with which networks, and how it is trained."""

    resolution: PositiveInt
    """Side of the generated frames, in pixels."""
    num_frames: PositiveInt
    """Frames generated in training: the whole clip for stage 1, a window for later stages."""
    frame_stride: PositiveInt
    """Source-video frames from one generated frame to the next."""
    generator: Generator
    discriminators: Discriminators
    joint: bool = False
    """Train this and all earlier stages together, discriminators on this one (Appendix H)."""
    training: Training

    @property
    def num_upsamplings(self) -> int:
        """2x upsamplings from the 4x4 base to `resolution`."""
        return (self.resolution // BASE_RESOLUTION).bit_length() - 1

    @model_validator(mode="after")
    def _sizes_are_possible(self) -> "Stage":
        if self.resolution != BASE_RESOLUTION * 2**self.num_upsamplings:
            raise ValueError(
                f"resolution {self.resolution} cannot be reached from the "
                f"{BASE_RESOLUTION}x{BASE_RESOLUTION} base by doubling; use 4, 8, 16, 32, ..."
            )
        num_units = len(self.generator.multipliers)
        if num_units < self.num_upsamplings:
            raise ValueError(
                f"generator.multipliers has {num_units} units, but {self.resolution}x"
                f"{self.resolution} needs at least {self.num_upsamplings} (one per doubling)"
            )
        return self


class Upsampling(Section):
    """What stage n > 1 receives from stage n-1 (derived, never written in a file)."""

    resolution: int
    num_frames: int
    frame_step: int
    """Output frames per input frame."""


class Config(Section):
    """A whole configuration file."""

    name: str
    data: Data
    stages: dict[int, Stage]

    @model_validator(mode="after")
    def _stages_fit_together(self) -> "Config":
        if sorted(self.stages) != list(range(1, len(self.stages) + 1)) or not self.stages:
            raise ValueError(f"stages must be numbered 1, 2, ...; found {sorted(self.stages)}")
        for number in range(2, len(self.stages) + 1):
            previous, stage = self.stages[number - 1], self.stages[number]
            if stage.resolution % previous.resolution or stage.resolution < previous.resolution:
                raise ValueError(
                    f"stage {number} ({stage.resolution} pixels) must be a whole multiple of "
                    f"stage {number - 1} ({previous.resolution} pixels)"
                )
            if previous.frame_stride % stage.frame_stride:
                raise ValueError(
                    f"stage {number}: frame_stride {stage.frame_stride} does not divide stage "
                    f"{number - 1}'s {previous.frame_stride}"
                )
            step = previous.frame_stride // stage.frame_stride
            if stage.num_frames % step:
                raise ValueError(
                    f"stage {number}: num_frames {stage.num_frames} is not a multiple of its "
                    f"temporal upsampling factor {step}"
                )
            if stage.num_frames // step > previous.num_frames:
                raise ValueError(
                    f"stage {number} upsamples windows of {stage.num_frames // step} frames, but "
                    f"stage {number - 1} generates only {previous.num_frames}"
                )
        for number, stage in self.stages.items():
            self._discriminators_fit(number, stage)
            if stage.joint and number == 1:
                raise ValueError("stage 1: joint training starts with stage 2")
        return self

    def _discriminators_fit(self, number: int, stage: Stage) -> None:
        # Every block but the last halves the resolution; the smallest discriminator input decides.
        inputs = {"temporal": stage.resolution // 2}
        if number > 1 and stage.discriminators.matching:
            inputs["matching"] = self.stages[number - 1].resolution
        num_pools = len(stage.discriminators.multipliers) - 1
        for which, resolution in inputs.items():
            if resolution < 2**num_pools:
                raise ValueError(
                    f"stage {number}: the {which} discriminator sees {resolution}x{resolution} "
                    f"pixels, too few for {num_pools + 1} blocks (discriminators.multipliers)"
                )

    @property
    def resolution(self) -> int:
        """The resolution at which clips are decoded: the last stage's."""
        return self.stages[len(self.stages)].resolution

    def upsampling(self, number: int) -> Upsampling:
        """The input of stage `number` > 1."""
        previous, stage = self.stages[number - 1], self.stages[number]
        step = previous.frame_stride // stage.frame_stride
        return Upsampling(
            resolution=previous.resolution, num_frames=stage.num_frames // step, frame_step=step
        )


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: PyYAML alone reads the 1e-4 that everybody writes as text."""


_Loader.yaml_implicit_resolvers = {
    key: list(resolvers) for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read and check a configuration file.

    `overrides` are `key.path=value` strings, values in YAML (`stages.2.training.micro_batch=8`).
    A file may hold `variants: {name: {key.path: value}}` and choose one by `variant: name`
    (or `--set variant=name`). `training` at the top holds every stage's defaults.

    Raises UserError with one line that names the file, the key and the remedy.
    """
    path = Path(path)
    try:
        tree = _yaml(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read configuration {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {_one_line(str(error))}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} does not hold a mapping of configuration keys")
    settings = [_parse_override(text) for text in overrides]
    variant = dict(settings).get("variant", tree.get("variant"))
    variants = tree.pop("variants", {})
    tree.pop("variant", None)
    if variant is not None:
        if variant not in variants:
            raise UserError(f"{path} has no variant {variant!r}; it has: {', '.join(variants)}")
        settings = [*variants[variant].items(), *settings]
    for key, value in settings:
        if key != "variant":
            _set(tree, key, value)
    return config_from_tree(tree, source=str(path))


def config_from_tree(tree: dict[str, Any], source: str) -> Config:
    """Check a configuration held in plain dicts (a file's or a checkpoint's)."""
    defaults = tree.pop("training", {})
    stages = tree.get("stages")
    if isinstance(stages, dict) and isinstance(defaults, dict):
        for stage in stages.values():
            if isinstance(stage, dict) and isinstance(stage.get("training", {}), dict):
                stage["training"] = {**defaults, **stage.get("training", {})}
    try:
        return Config.model_validate(_tuples(tree))
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error)}") from None


def variant_names(path: str | Path) -> list[str | None]:
    """The variants a configuration file offers; [None] when it has none."""
    tree = _yaml(Path(path).read_text())
    return list(tree.get("variants", {})) or [None]


def _parse_override(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UserError(f"--set {text}: expected key.path=value")
    try:
        return key.strip(), _yaml(value)
    except yaml.YAMLError:
        raise UserError(f"--set {text}: the value is not YAML") from None


def _set(tree: dict[Any, Any], dotted: str, value: Any) -> None:
    *parents, last = [int(part) if part.isdigit() else part for part in dotted.split(".")]
    node = tree
    for part in parents:
        if isinstance(node.get(part), dict):
            node = node[part]
        elif node.get(part) is None and not isinstance(part, int):
            node = node.setdefault(part, {}) if part not in node else _replace(node, part)
        else:
            raise UserError(f"--set {dotted}: there is no {part!r} to set a key of")
    node[last] = value


def _replace(node: dict[Any, Any], part: Any) -> dict[Any, Any]:
    node[part] = {}
    return node[part]


def _tuples(value: Any) -> Any:
    """YAML has lists where the frozen schema has tuples."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(first["loc"][-1]), _all_keys(), n=1)
        return f"unknown key {where}" + (f"; did you mean {close[0]}?" if close else "")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"missing key {where}"
    value = first.get("input")
    shown = f" (found {value!r})" if isinstance(value, str | int | float | bool) else ""
    return f"{where}: {message}{shown}" if where else message


def _all_keys() -> list[str]:
    sections = [Config, Data, ProceduralClips, Stage, Generator, Discriminators, Training]
    return sorted({key for section in sections for key in section.model_fields})


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def _one_line(text: str) -> str:
    return " ".join(text.split())
