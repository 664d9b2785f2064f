"""One YAML file describes a data set and every stage trained on it; this module is its schema.

Read `load_config` first. Everything that is derived (a stage's input window, its spatial factor)
is computed here once, so that no two places can disagree about it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    field_validator,
    model_validator,
)

from engine.configuration_errors import explain, found, origin
from engine.errors import UserError
from engine.yaml_tree import Tree, parse_override, read_tree, set_key, unshared

BASE_RESOLUTION = 4  # the linear layer's output, in pixels (paper)

PositiveInt = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0)]  # numpy's generators take no other
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Multipliers = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _samples_or_auto(value: object) -> object:
    """One line where pydantic has one for each of the two types."""
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError(f"should be a whole number greater than 0, or auto {found(value)}")


class ProceduralClips(Section):
    """The sample data set: moving shapes, one motion per class, encoded into real video files."""

    num_clips: PositiveInt = 256
    num_frames: PositiveInt = 64
    resolution: PositiveInt = 64
    codec: Literal["mjpeg", "vp9"] = "mjpeg"
    seed: Seed = 0


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
    num_threads: PositiveInt | None = None
    """Decoding threads per rank; None: its share of the machine's cores."""
    max_rejected: Share = 0.5
    """The share of the videos that indexing may have rejected. Of whole data sets it rejects a few
    percent: where it is most of them, the folder is not what its user takes it for."""
    max_failed: Share = 0.05
    """The share of a stage's videos that may fail during training, their clips being replaced. With
    more of them gone, the run would no longer be on the data set that it is said to be on."""


class GeneratorSettings(Section):
    """A generator; `multipliers` are the units' output channels in units of `channels`."""

    temporal: Literal["conv_gru", "separable_conv"]
    """What mixes time in each unit (Appendix C compares both)."""
    channels: PositiveInt
    multipliers: Multipliers
    latent_size: PositiveInt = 128
    class_embedding_size: PositiveInt = 128
    low_frames: Literal["repeat", "interpolate"] = "repeat"
    """How x_l's frames become as many as the output's: repeated (paper), or interpolated linearly
    in time, which is ours, and makes motion even where training is short. Stage 1 has no x_l."""
    edge_frames: Annotated[int, Field(ge=0)] = 0
    """By how many repetitions of its first and last frame x_l is continued at both ends when a
    whole video is unrolled; what they become is cut off. Ours: the paper pads with zeros (0)."""


class DiscriminatorSettings(Section):
    """Spatial, temporal and (stage 2 and later) matching discriminators of one stage."""

    channels: PositiveInt
    multipliers: Multipliers
    """From input to output. Every block but the last halves the frames, down to 4x4 pixels."""
    spatial_frames: PositiveInt = 8
    """Frames per clip that the spatial discriminator judges."""
    matching: bool = True
    """False is the ablation of Table 2; stage 1 has none in any case."""
    pool_time: bool = False
    """True: the 3x3x3 blocks of the temporal and matching ones halve time as well as space."""
    minibatch_stddev: bool = False
    """True: they also see how far samples of one class differ within a rank's micro-batch. Ours,
    after Karras et al. 2018, against a generator that makes every clip of a class alike."""


class SampleBank(Section):
    """Samples of the frozen stages, drawn ahead, instead of a new one for every window.

    Each takes about 77 KB of main memory at 32x32/25, on the rank that drew it. May be changed
    when a run is resumed.
    """

    num_videos: PositiveInt
    """Over all ranks; a multiple of processes x micro_batch."""
    refresh_every: PositiveInt = 1000
    """Iterations in which every video is replaced once: a batch at a time, evenly, oldest first."""


class EvaluationSettings(Section):
    """What `evaluate_every` measures: whole clips with fixed norm statistics, as a user gets them.

    May be changed when a run is resumed; values are then of another protocol.
    """

    metrics: tuple[str, ...] = ("fvd", "kvd", "is-k400", "motion")
    """Names of engine/evaluation/metric_definitions.py."""
    best: str = "fvd"
    """The metric by which the best checkpoint is chosen."""
    num_videos: Annotated[int, Field(ge=2)] = 256
    """Generated ones, and as many real ones; half of the real ones where there are fewer than
    twice as many, because another half is the control."""
    num_frames: PositiveInt = 16
    """Of each clip; fewer where a training clip unrolls to fewer."""
    norm_statistics_passes: PositiveInt = 20
    """Dummy passes before the clips are made: fewer than before a last evaluation."""


class Training(Section):
    """Optimisation, precision and cadence. Set for all stages at the top, overridden per stage."""

    iterations: PositiveInt
    """Generator updates."""
    global_batch: PositiveInt
    """Samples per update over all ranks."""
    micro_batch: Annotated[int | Literal["auto"], PlainValidator(_samples_or_auto)]
    """Samples per rank and forward pass; the rest of the global batch is accumulated, with norm
    statistics of its own. auto is the largest that is planned to fit (engine/planning); a resumed
    run keeps its own."""
    discriminator_steps: PositiveInt = 2
    generator_lr: PositiveFloat = 1e-4
    discriminator_lr: PositiveFloat = 5e-4
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.0,
        0.999,
    )
    """Decided: BigGAN's and DVD-GAN's; the paper gives none."""
    adam: Literal["auto", "torch", "deepspeed", "apex"] = "auto"
    """Whose fused Adam (engine/trainer/adam.py); auto is PyTorch's, which is on every device."""
    max_gradient_norm: PositiveFloat | None = None
    """Scale larger gradients down to this norm; the paper does not."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What activations are computed in; weights and optimiser state are always fp32."""
    checkpointing: Literal["none", "norms", "blocks"] = "norms"
    """What is made again in the backward pass instead of being kept, the same bit for bit: nothing;
    norms with their ReLU, which costs little; or every residual block, a forward pass more."""
    acceleration: Literal["none", "compile", "cuda_graphs"] = "none"
    """torch.compile of every residual block, or CUDA graphs of passes without gradients. What
    cannot be accelerated, as networks that train at ZeRO 2 or 3, is named when the run starts."""
    cudnn_benchmark: bool = True
    """On a GPU, let cuDNN time its algorithms for every shape when it first comes: training has few
    shapes. Another run may then take another one: false where a run that stops and goes on shall
    repeat one that did not, bit for bit."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    offload_optimizer: bool = False
    """Keep Adam's moments and the weights it updates in the CPU's memory, and run it there."""
    synchronized_norms: bool = True
    """Per-frame norm statistics over all ranks' micro-batches; else over each rank's own. Decided:
    the paper does not say. Accumulated micro-batches never share them."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Average of the generator's weights; the paper uses none."""
    condition_on: Literal["generated", "data"] = "generated"
    """What stage 2 and later upsample: windows of the frozen stages' samples, or of real clips."""
    sample_bank: SampleBank | None = None
    """None lets the frozen stages generate every window anew."""
    reuse_fakes: bool = False
    """G's update judges again, by the updated D, what the last D update was shown, and generates
    nothing: a pass of G and of the frozen stages less per iteration. Not the paper's, which draws
    anew. G's activations are held during that D update, so nothing can be accumulated."""
    norm_statistics_passes: PositiveInt = 200
    """Dummy passes that fix the per-frame statistics before a generator is used for inference."""
    seed: Seed = 0
    log_every: PositiveInt = 10
    sample_every: PositiveInt = 1000
    evaluate_every: PositiveInt | None = None
    """Measure FVD and others after so many iterations and at the end, and keep the best checkpoint.
    None: never."""
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint_every: PositiveInt = 1000
    checkpoint_minutes: PositiveFloat | None = None
    """Also after so many minutes; an iteration is finished first."""
    asynchronous_checkpoints: bool = False
    """Write them beside the training, which goes on when copies are made: they take as much main
    memory as the checkpoint has bytes. The last one of a run is waited for."""
    keep_checkpoints: PositiveInt = 3
    """The newest ones; the best one is kept besides."""

    @property
    def samples_per_pass(self) -> int:
        """`micro_batch`, which must be settled."""
        assert self.micro_batch != "auto", "settled before anything is built"
        return self.micro_batch


class Stage(Section):
    """One stage: what it generates, with which networks, and how it is trained."""

    resolution: PositiveInt
    """Side of the generated frames, in pixels."""
    num_frames: PositiveInt
    """Frames generated in training: the whole clip for stage 1, a window for later stages."""
    frame_stride: PositiveInt
    """Source-video frames from one generated frame to the next."""
    generator: GeneratorSettings
    discriminators: DiscriminatorSettings
    joint: bool = False
    """Train this and all earlier stages together, discriminators on this one (Appendix H)."""
    training: Training

    @property
    def num_upsamplings(self) -> int:
        """2x upsamplings from the 4x4 base to `resolution`."""
        return (self.resolution // BASE_RESOLUTION).bit_length() - 1

    @property
    def num_source_frames(self) -> int:
        """Frames of a source video from a training clip's first frame to its last, both counted."""
        return (self.num_frames - 1) * self.frame_stride + 1

    @model_validator(mode="after")
    def _sizes_are_possible(self) -> "Stage":
        doublings = max(self.num_upsamplings, 0)  # negative below the base
        if self.resolution != BASE_RESOLUTION << doublings:
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
    """The input of stage n > 1 from stage n-1 (derived, never written in a file)."""

    resolution: int
    num_frames: int
    frame_step: int
    """Output frames per input frame."""


class Config(Section):
    """A whole configuration file."""

    name: Annotated[str, Field(pattern=r"^[^/\x00-\x1f]{1,100}$")]
    """Also of the folder below runs/."""
    data: Data
    stages: dict[int, Stage]

    @field_validator("name")
    @classmethod
    def _name_leads_nowhere(cls, name: str) -> str:
        if name in (".", "..") or name.startswith("~"):
            raise ValueError(f"names a folder below runs/ {found(name)}")
        return name

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
            if stage.joint and number == 1:
                raise ValueError("stage 1: joint training starts with stage 2")
            made = self.data.procedural
            if made is not None and made.num_frames < stage.num_source_frames:
                raise ValueError(
                    f"data.procedural.num_frames {made.num_frames} is too few: a clip of stage "
                    f"{number} spans {stage.num_source_frames} frames"
                )
            self._time_can_be_pooled(number)
            if stage.discriminators.minibatch_stddev and stage.training.micro_batch == 1:
                raise ValueError(
                    f"stage {number}: discriminators.minibatch_stddev needs samples to compare; "
                    f"set stages.{number}.training.micro_batch to 2 or more"
                )
            self._bank_has_a_source(number)
        if self.data.procedural is not None and self.data.path is None:
            raise ValueError("data.procedural needs data.path, the folder to make videos in")
        return self

    def _time_can_be_pooled(self, number: int) -> None:
        """Two blocks that halve time need four frames; a matching discriminator sees x_l's."""
        sizes, num_frames = self.stages[number].discriminators, self.stages[number].num_frames
        if number > 1 and sizes.matching:
            num_frames = self.upsampling(number).num_frames
        if sizes.pool_time and num_frames < 4:
            raise ValueError(
                f"stage {number}: discriminators.pool_time needs at least 4 frames, and there are "
                f"{num_frames}"
            )

    def _bank_has_a_source(self, number: int) -> None:
        """It holds samples of the frozen stages before this one."""
        stage = self.stages[number]
        if stage.training.sample_bank is None:
            return
        key = f"stages.{number}.training.sample_bank"
        if number == 1:
            raise ValueError(f"stage 1: no stage before it to bank samples of; set {key} to null")
        if stage.joint:
            raise ValueError(
                f"stage {number}: joint training freezes no stage to bank samples of; set {key} to "
                "null"
            )
        if stage.training.condition_on == "data":
            raise ValueError(
                f"stage {number}: condition_on=data needs no bank of generated samples; set {key} "
                "to null"
            )

    @property
    def resolution(self) -> int:
        """The resolution at which clips are decoded: the last stage's."""
        return self.stages[len(self.stages)].resolution

    def to_tree(self) -> Tree:
        """The whole configuration in dicts, lists and scalars, for YAML or JSON.

        `config_from_tree` accepts it back.
        """
        return unshared(self.model_dump())

    def unrolling(self, number: int) -> int:
        """Frames that stage `number` makes of one frame of stage 1."""
        return self.stages[1].frame_stride // self.stages[number].frame_stride

    def upsampling(self, number: int) -> Upsampling:
        """The input of stage `number` > 1."""
        previous, stage = self.stages[number - 1], self.stages[number]
        step = previous.frame_stride // stage.frame_stride
        return Upsampling(
            resolution=previous.resolution, num_frames=stage.num_frames // step, frame_step=step
        )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration file.

    `overrides` are `key.path=value` strings, values in YAML (`stages.2.training.micro_batch=8`).
    A file may hold `variants: {name: {key.path: value}}` and choose one by `variant: name`
    (or the override `variant=name`). `training` at the top holds every stage's defaults.
    Overrides win over the variant, the variant over the file.

    Raises UserError with one line that names the file, the key and the remedy.
    """
    tree = read_tree(path)
    given = [parse_override(text) for text in overrides]
    variants = _pop_variants(tree, path)
    chosen = dict(given).get("variant", tree.pop("variant", None))
    if chosen is not None and (not isinstance(chosen, str) or chosen not in variants):
        offered = f"it has: {', '.join(variants)}" if variants else "it has no variants"
        raise UserError(f"{path} has no variant {chosen!r}; {offered}")
    variant = variants[chosen] if chosen is not None else {}
    for key, value in [*variant.items(), *given]:
        if key != "variant":
            try:
                set_key(tree, key, value)
            except UserError as error:
                raise UserError(f"{path}: cannot set {error}") from None
    origins = {key: text for (key, _), text in zip(given, overrides, strict=True)}
    return _checked(tree, str(path), origins)


def config_from_tree(tree: Tree, source: str) -> Config:
    """Check a configuration held in plain dicts; `source` begins the message of a UserError.

    Accepts what `Config.to_tree` gives, also after a trip through JSON, whose keys are text.
    """
    return _checked(unshared(tree), source, overrides={})


def variant_names(path: str | Path) -> list[str | None]:
    """The variants that a configuration file offers, after None where it chooses none itself."""
    tree = read_tree(path)
    return [*([] if "variant" in tree else [None]), *_pop_variants(tree, path)]


def with_training(config: Config, number: int, **changes: object) -> Config:
    """The configuration with other keys in one stage's `training`."""
    stage = config.stages[number]
    training = stage.training.model_copy(update=changes)
    stages = config.stages | {number: stage.model_copy(update={"training": training})}
    return config.model_copy(update={"stages": stages})


def _pop_variants(tree: Tree, path: str | Path) -> dict[str, Tree]:
    variants = tree.pop("variants", {})
    if not isinstance(variants, dict) or not all(isinstance(name, str) for name in variants):
        raise UserError(f"{path}: variants must map names to settings {found(variants)}")
    for name, settings in variants.items():
        if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
            raise UserError(
                f"{path}: variants.{name} must map dotted keys to values, "
                f"such as stages.1.num_frames: 12 {found(settings)}"
            )
    return variants


def _checked(tree: Tree, source: str, overrides: dict[str, str]) -> Config:
    defaults = tree.pop("training", {})
    if not isinstance(defaults, dict):
        raise UserError(
            f"{source}: training must be a mapping of keys {found(defaults)}"
            + origin(("training",), overrides)
        )
    stages = tree.get("stages")
    if isinstance(stages, dict):
        tree["stages"] = stages = {
            int(key) if isinstance(key, str) and key.isdecimal() else key: stage
            for key, stage in stages.items()
        }
        for stage in stages.values():
            if isinstance(stage, dict) and isinstance(stage.get("training", {}), dict):
                stage["training"] = {**defaults, **stage.get("training", {})}
    try:
        return Config.model_validate(_tuples(tree))
    except ValidationError as error:
        first = error.errors()[0]
        location = first["loc"]
        line = explain(first, _keys_at(location[:-1])) + origin(location, overrides)
        raise UserError(f"{source}: {line}") from None


def _tuples(value: Any) -> Any:
    """YAML has lists where the frozen schema has tuples."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys allowed in the section at `location`."""
    sections: dict[str, type[Section]] = {
        "data": Data,
        "procedural": ProceduralClips,
        "generator": GeneratorSettings,
        "discriminators": DiscriminatorSettings,
        "training": Training,
        "sample_bank": SampleBank,
    }
    if not location:
        return [*Config.model_fields, "training", "variant", "variants"]
    return list(sections.get(str(location[-1]), Stage).model_fields)
