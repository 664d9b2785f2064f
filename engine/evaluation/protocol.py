"""What a number of an evaluation was measured by: everything that two such numbers must share.

FVD of one model has been reported with factors between values that come of nothing but another
clip length, offset, resize or number of videos (StyleGAN-V, arXiv 2112.14683, section 4; Ge et al.,
arXiv 2404.12391). A protocol is therefore frozen, is written beside every number, and is part of
the key of every cached feature.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.errors import UserError
from engine.evaluation.i3d import BATCH_NORM_EPS, LEAST_FRAMES, Placing
from engine.evaluation.spectra import Radius
from engine.yaml_tree import parse_override

Role = Literal["real", "generated"]
Offset = Literal["first", "centre", "random"]


class EvaluationProtocol(BaseModel):
    """How clips are cut, shown to a network and compared. Immutable; see `find_protocol`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    # The clips
    resolution: int | None = Field(default=None, ge=8, le=4096)
    """Side of the square that frames are brought to first; None: frames stay as they are."""
    fit: Literal["centre-crop", "stretch"] = "centre-crop"
    """How: the shorter side is resized and the middle kept, or both sides are resized. Antialiased
    bilinear, rounded to uint8, as the training loader does it."""
    num_frames: int = Field(default=16, ge=1)
    frame_stride: int = Field(default=1, ge=1)
    """Every so many-th frame of the video; frame rates are not looked at."""
    real_stride: int = Field(default=1, ge=1)
    """Real videos have so many frames for one of the generated ones: the stride over the source
    frames that the model was trained with. Their clips are of every `frame_stride` times so
    many-th."""
    real_offset: Offset = "random"
    """Where a clip begins in a longer video; "random" depends on the seed and the file's content,
    not on its name or place."""
    generated_offset: Offset = "first"
    short: Literal["error", "drop", "loop"] = "error"
    """What is done with videos that are too short for a clip: nothing is measured, they are left
    out and counted, or they start again until the clip is full, and are counted."""
    few_frames: Literal["error", "loop"] = "error"
    """What is done where `num_frames` are fewer than the network takes: nothing is measured, or
    every clip starts again until there are enough, for the network only."""
    num_videos: int | None = Field(default=None, ge=2)
    """Of each source at most, chosen at random by the seed; None: all. How many there were stands
    beside every number."""
    quantisation: Literal["uint8"] = "uint8"
    """Both sources are 0..255 before anything is measured: unrounded values of a generator would
    lack the rounding that real frames have."""
    # The network
    network: str = "i3d-kinetics-400"
    """TF-Hub's module, or the name of a TorchScript file."""
    network_sha256: str = ""
    """Of the weights; filled in when the network is loaded."""
    network_resize: Placing = "half-pixel"
    """How frames get the network's 224x224 pixels; see `engine.evaluation.i3d.bilinear`."""
    # The statistics, all float64
    covariance: Literal["unbiased", "biased"] = "unbiased"
    inception_splits: int = Field(default=10, ge=1)
    precision_neighbours: int = Field(default=3, ge=1)
    """k of precision and recall."""
    density_neighbours: int = Field(default=5, ge=1)
    """k of density and coverage."""
    kvd_subset_size: int | None = Field(default=None, ge=2)
    """None: the estimate of all clips; else the mean over random subsets of so many."""
    kvd_subsets: int = Field(default=100, ge=1)
    psd_frames: tuple[int, ...] = (1, 10, 25, 50)
    """Frames of the clip whose spectra are compared, from 1; those beyond its end are left out."""
    psd_radius: Radius = "rounded"
    """To which whole radius a frequency belongs (engine/evaluation/spectra.py)."""
    psd_sets: int = Field(default=3, ge=1)
    """Into so many sets clips are divided for the mean and the band of spectra."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    # For the reader
    unknown: tuple[str, ...] = ()
    """What the publication that the preset is named after does not say, or we cannot do."""

    @model_validator(mode="after")
    def _frames_are_numbered_from_1(self) -> "EvaluationProtocol":
        if any(number < 1 for number in self.psd_frames):
            raise ValueError("psd_frames are numbered from 1")
        return self

    def stride(self, role: Role) -> int:
        """From one frame of a clip to the next, in frames of its video."""
        return self.frame_stride * (self.real_stride if role == "real" else 1)

    def source_frames(self, role: Role) -> int:
        """Frames of a video from a clip's first to its last, both counted."""
        return (self.num_frames - 1) * self.stride(role) + 1

    def check_frames(self, least: int = LEAST_FRAMES) -> None:
        """Raises UserError where clips are too short for the network and no rule says what then."""
        if self.num_frames < least and self.few_frames == "error":
            raise UserError(
                f"the protocol's clips have {self.num_frames} frames, and the network needs "
                f"{least}: its strides over time leave nothing of fewer; --set few_frames=loop "
                "repeats them, which compares with no published number"
            )

    def fingerprint(self) -> str:
        """sha256 of everything above but what is only for the reader."""
        tree = self.model_dump(mode="json", exclude={"unknown", "name"})
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    def to_tree(self) -> dict[str, Any]:
        """For JSON: all fields, what no field changes, and the fingerprint."""
        return {**self.model_dump(mode="json"), **_FIXED, "fingerprint": self.fingerprint()}

    def lines(self) -> list[str]:
        """A few lines for a person, beside the table."""
        size = f"{self.resolution}x{self.resolution}" if self.resolution else "frames as they are"
        size += f" ({self.fit})" if self.resolution else ""
        every = _ordinal(self.frame_stride)
        if self.real_stride > 1:
            every += f" ({_ordinal(self.stride('real'))} of real videos)"
        offsets = f"offset {self.real_offset} (real), {self.generated_offset} (generated)"
        most = "all" if self.num_videos is None else f"{self.num_videos} at most"
        return [
            f"protocol {self.name}: {size}, {self.num_frames} frames, every "
            f"{every}, {offsets}, uint8, videos: {most}, seed {self.seed}",
            f"  network {self.network} {self.network_sha256[:12]}, resize {self.network_resize}, "
            f"covariance {self.covariance}, short clips: {self.short}",
            *(f"  not known: {each}" for each in self.unknown),
        ]


def _ordinal(number: int) -> str:
    return "one" if number == 1 else f"{number}th"


_FIXED = {
    "statistics_dtype": "float64",
    "covariance_eps": 0.0,  # nothing is added to diagonals: our root of singular ones needs no help
    "batch_norm_eps": BATCH_NORM_EPS,
    "kernel": "(x·y / F + 1)³",
}
_STYLEGAN_V = {
    "num_videos": 2048,
    "covariance": "biased",
    "network_resize": "half-pixel",
    "real_offset": "random",
    "generated_offset": "first",
    "short": "drop",
    "unknown": (
        "StyleGAN-V takes the first 2048 videos of a data set; here they are chosen by the seed",
        "its real offsets come of an unseeded generator",
    ),
}
_SSW_AND_DVD = (
    "how many videos of each source",
    "which windows of real videos, and whether they come of the training or the validation set",
    "how frames are resized to 224x224; assumed as in the original FVD code (TF1)",
    "whether covariances are unbiased; assumed as in the original FVD code (TF-GAN)",
    "IS and FID are of an I3D trained on Kinetics-600, which was not published: ours are of the "
    "Kinetics-400 one, and are called is-k400 and fid-k400",
)
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "resolution": 128,
        "num_frames": 50,
        "network_resize": "tf1",
        "unknown": _SSW_AND_DVD,
    },
    "dvdgan": {
        "resolution": 128,
        "num_frames": 48,
        "network_resize": "tf1",
        "unknown": _SSW_AND_DVD,
    },
    "fvd2048_16f": {**_STYLEGAN_V, "num_frames": 16},
    "fvd2048_128f": {**_STYLEGAN_V, "num_frames": 128},
    "fvd2048_128f_subsample8f": {**_STYLEGAN_V, "num_frames": 16, "frame_stride": 8},
    "stylegan-v": {**_STYLEGAN_V, "num_frames": 16},
    "original-fvd": {
        "num_frames": 16,
        "network_resize": "tf1",
        "unknown": (
            "the code of FVD's authors leaves frames, offsets and the number of videos to its user",
        ),
    },
}
"""`paper` is SSW-GAN; `stylegan-v` is its main figure, fvd2048_16f."""


def find_protocol(name: str, changes: Sequence[str] = ()) -> EvaluationProtocol:
    """The preset, with `KEY=VALUE` changes, which its name then tells.

    Raises UserError for an unknown preset or key, or a value that the key does not take.
    """
    if name not in PRESETS:
        raise UserError(f"no protocol {name!r}; there are {', '.join(PRESETS)}")
    tree = dict(PRESETS[name])
    for change in changes:
        key, value = parse_override(change)
        keys = [each for each in EvaluationProtocol.model_fields if each not in _NOT_TO_BE_SET]
        if key not in keys:
            raise UserError(f"--set {change}: there is no such key; there are {', '.join(keys)}")
        tree[key] = value
    changed = ", ".join(changes)
    tree["name"] = f"{name}, changed: {changed}" if changed else name
    try:
        return EvaluationProtocol(**tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"--set {key}={tree.get(key)}: {first['msg'].lower()}") from None


_NOT_TO_BE_SET = {"name", "unknown", "network", "network_sha256", "quantisation"}
