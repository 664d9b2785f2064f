"""A trained cascade to pass on: one folder with weights, norm statistics and what they are of.

    DIR/
      config.json          what it is, how it was trained, and the weights' SHA-256
      model.safetensors    generators of all stages, and the norm statistics that they sample with
      README.md            the model card

It holds everything that sampling needs, and nothing of training: no discriminators, no optimizer.
Reading it executes nothing; what it holds is checked before a network takes it.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.configuration import Config, config_from_tree
from engine.configuration_errors import explain
from engine.dummy_passes import DummyPasses, TrainedCascade, run_passes
from engine.durable_files import PARTIAL, put_in_place, reading, write_json, writing
from engine.errors import UserError
from engine.models.cascade import GeneratorCascade
from engine.models.construction import build_generator
from engine.models.norms import fix_norm_statistics, norm_statistics
from engine.trainer.checkpoints import find_checkpoint, sha256

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT = 1


class _Statistics(BaseModel):
    """`DummyPasses`, in the file."""

    model_config = ConfigDict(extra="forbid", strict=True)
    num_frames: int = Field(ge=1)
    num_passes: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    sigma: float = Field(gt=0, allow_inf_nan=False)
    seed: int = Field(ge=0)
    windows: bool = False


class _Description(BaseModel):
    """config.json."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: int
    stage: int = Field(ge=1)
    step: int = Field(ge=0)
    classes: list[str]
    class_counts: list[int]
    frames_per_second: float = Field(gt=0, allow_inf_nan=False)
    statistics: _Statistics
    weights_sha256: str
    config: dict[str, Any]


@dataclass(frozen=True)
class ExportedCascade:
    """A folder that `write_exported` made; a `TrainedCascade`."""

    path: Path
    described: _Description

    @property
    def step(self) -> int:
        """Generator updates of the last stage."""
        return self.described.step

    @property
    def stage_number(self) -> int:
        """The number of the last stage."""
        return self.described.stage

    @property
    def classes(self) -> list[str]:
        """The classes' names, by label."""
        return self.described.classes

    @property
    def class_counts(self) -> list[int]:
        """Training videos per class; empty without classes."""
        return self.described.class_counts

    @property
    def frames_per_second(self) -> float:
        """Of the videos that it makes."""
        return self.described.frames_per_second

    @property
    def digest(self) -> str:
        """The SHA-256 of the weights' file."""
        return self.described.weights_sha256

    @property
    def passes(self) -> DummyPasses:
        """Those that its statistics are of."""
        return DummyPasses(**self.described.statistics.model_dump())

    def config(self) -> Config:
        """The configuration it was trained with."""
        return config_from_tree(self.described.config, source=str(self.path / CONFIG))

    def generators(self) -> dict[int, dict[str, Tensor]]:
        """State dicts of the generators, by stage. UserError where the file is not what it was."""
        return {number: weights for number, (weights, _) in self._stages().items()}

    def fix_statistics(self, cascade: GeneratorCascade) -> None:
        """Fix the norms of its own generators. Raises UserError as `generators` does."""
        stages = self._stages()
        for number, generator in enumerate(cascade.generators, start=1):
            fix_norm_statistics(generator, stages[number][1])

    def _stages(self) -> dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """(weights, norm statistics) of every stage."""
        path = self.path / WEIGHTS
        if sha256(path) != self.digest:
            raise UserError(f"{path} is damaged, or not what {self.path / CONFIG} was written for")
        try:
            with reading(path):
                tensors = load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is not a file of tensors: {error}") from None
        config = self.config()
        found = {}
        for number in range(1, self.stage_number + 1):
            weights = _below(f"stages.{number}.weights.", tensors)
            try:
                with torch.device("meta"):
                    expected = build_generator(config, number).state_dict()
            except (RuntimeError, TypeError, ValueError) as error:  # sizes past what is counted
                raise UserError(
                    f"{self.path / CONFIG}: no network of stage {number} can be built: "
                    f"{str(error).partition(chr(10))[0]}"
                ) from None
            _check_same(expected, weights, f"{path}: stage {number}")
            found[number] = weights, _below(f"stages.{number}.statistics.", tensors)
        return found


def find_trained(path: Path) -> TrainedCascade:
    """The exported cascade at `path`, or the newest checkpoint at or under it.

    Raises UserError with one line when there is neither.
    """
    if not (path / CONFIG).exists():
        return find_checkpoint(path)
    try:
        with reading(path / CONFIG):
            tree = json.loads((path / CONFIG).read_text())
        found = tree["format"]
    except (ValueError, KeyError, TypeError, RecursionError):  # brackets without end
        raise UserError(f"{path / CONFIG} is not an exported cascade's") from None
    if found != FORMAT:
        raise UserError(f"{path} has export format {found}; this version reads {FORMAT}")
    try:
        exported = ExportedCascade(path, _Description.model_validate(tree))
    except ValidationError as error:
        reason = explain(error.errors()[0], list(_Description.model_fields))
        raise UserError(f"{path / CONFIG}: {reason}") from None
    config = exported.config()
    num_classes = config.data.num_classes
    if exported.stage_number not in config.stages:
        raise UserError(f"{path / CONFIG}: there is no stage {exported.stage_number}")
    if odd := [name for name in exported.classes if not name.isprintable()]:
        raise UserError(f"{path / CONFIG}: {odd[0]!r} is no class name")
    if len(exported.class_counts) != (num_classes or 0):
        raise UserError(f"{path / CONFIG}: class_counts must have {num_classes or 0} items")
    return exported


def fix_norms(cascade: GeneratorCascade, trained: TrainedCascade, passes: DummyPasses) -> None:
    """Fix the norms as the passes do, of which an exported cascade has its own already."""
    if isinstance(trained, ExportedCascade) and passes == trained.passes:
        trained.fix_statistics(cascade)
    else:
        run_passes(cascade, trained, passes)


def write_exported(
    folder: Path, cascade: GeneratorCascade, trained: TrainedCascade, passes: DummyPasses
) -> None:
    """Write a cascade whose statistics are fixed by `passes`. Raises UserError when it cannot be.

    The weights are `trained`'s; the cascade's own are folded for sampling.
    """
    tensors: dict[str, Tensor] = {}
    for number, weights in trained.generators().items():
        tensors |= {f"stages.{number}.weights.{name}": value for name, value in weights.items()}
    for number, generator in enumerate(cascade.generators, start=1):
        statistics = norm_statistics(generator)
        tensors |= {f"stages.{number}.statistics.{name}": v for name, v in statistics.items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    partial, path = folder / (WEIGHTS + PARTIAL), folder / WEIGHTS
    with writing(path, SafetensorError):
        folder.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        save_file(tensors, partial)
        partial.chmod(mode)  # it is the owner's alone otherwise
        put_in_place(partial, path)
    described = _Description(
        format=FORMAT,
        stage=trained.stage_number,
        step=trained.step,
        classes=trained.classes,
        class_counts=trained.class_counts,
        frames_per_second=trained.frames_per_second,
        statistics=_Statistics(**asdict(passes)),
        weights_sha256=sha256(path),
        config=trained.config().to_tree(),
    )
    with writing(folder / CARD):
        (folder / CARD).write_text(_card(trained, described, tensors))
    write_json(folder / CONFIG, described.model_dump())


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin so, without it."""
    named = tensors.items()
    return {name.removeprefix(prefix): value for name, value in named if name.startswith(prefix)}


def _check_same(expected: dict[str, Tensor], given: dict[str, Tensor], where: str) -> None:
    """UserError where names, shapes or dtypes differ from the network's."""
    if odd := expected.keys() ^ given.keys():
        raise UserError(f"{where}: {min(odd)} is in only one of the file and the network")
    for name, tensor in expected.items():
        found = given[name]
        if (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            raise UserError(
                f"{where}: {name} is {found.dtype} {tuple(found.shape)}, the network has "
                f"{tensor.dtype} {tuple(tensor.shape)}"
            )
        if not found.isfinite().all():
            raise UserError(f"{where}: {name} has values that are not finite")


def _card(trained: TrainedCascade, described: _Description, tensors: dict[str, Tensor]) -> str:
    """README.md: what a reader must know before using it."""
    return "\n".join([*_card_lines(trained, described, tensors), ""])


def _card_lines(
    trained: TrainedCascade, described: _Description, tensors: dict[str, Tensor]
) -> Iterator[str]:
    config, last = trained.config(), trained.stage_number
    stage = config.stages[last]
    statistics = described.statistics
    yield f"# {config.name}: videos of {stage.resolution}x{stage.resolution} pixels"
    yield ""
    if last == 1:
        yield "A video GAN of one stage, trained with SSW-GAN's engine."
    else:
        yield f"A cascade of {last} stages, trained one after the other with SSW-GAN's engine."
    yield "Stage 1 makes a clip; each later stage upsamples it in space and time."
    yield ""
    yield "| stage | makes | frames per second | temporal modules | values |"
    yield "|---|---|---|---|---|"
    for number in range(1, last + 1):
        one = config.stages[number]
        made = config.stages[1].num_frames * config.unrolling(number)
        rate = trained.frames_per_second * stage.frame_stride / one.frame_stride
        prefix = f"stages.{number}.weights."
        values = sum(v.numel() for name, v in tensors.items() if name.startswith(prefix))
        size = f"{one.resolution}x{one.resolution}/{made}"
        yield f"| {number} | {size} | {rate:g} | {one.generator.temporal} | {values:,} |"
    yield ""
    yield f"- Training: {trained.step} generator updates of stage {last}, on `{config.data.path}`."
    if trained.classes:
        named = ", ".join(trained.classes[:20]) + (", ..." if len(trained.classes) > 20 else "")
        yield f"- Classes: {len(trained.classes)} ({named})."
    elif config.data.num_classes:
        yield f"- Classes: {config.data.num_classes}, without names."
    else:
        yield "- Classes: none; the cascade is unconditional."
    yield (
        f"- Norm statistics: {statistics.num_passes} passes of {statistics.batch_size} videos of "
        f"{statistics.num_frames} frames, sigma {statistics.sigma:g}, seed {statistics.seed}. "
        "Videos of other lengths use them, too."
    )
    yield "- Licence: whoever publishes this folder must state it, and that of the training data."
    yield "- Quality: not stated here; `engine/measure.py` measures it."
    yield ""
    yield "```python"
    yield "from engine import Cascade"
    yield ""
    yield 'cascade = Cascade.from_pretrained("this folder")'
    yield "videos = cascade.generate(num=4, seed=1)  # uint8 [4, frames, 3, height, width]"
    yield "```"
    yield ""
    yield "`python engine/sample.py --checkpoint DIR --out samples` writes files."
    yield ""
    digest = hashlib.sha256(json.dumps(described.config, sort_keys=True).encode()).hexdigest()
    yield f"Configuration {digest[:12]}, weights {described.weights_sha256[:12]}."
