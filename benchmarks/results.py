"""The result file of a run: its schema, where it was made, and how it is written and found.

One JSON file per run in benchmarks/results/, named by date and device. Times are seconds, rates
GB/s (1e9 bytes) and TFLOP/s, memory bytes.
"""

import json
import platform
import re
import subprocess
from collections import defaultdict
from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmarks.timing import Spread
from engine.errors import UserError

FOLDER = Path(__file__).resolve().parent / "results"
PRETENDED = "pretended"
"""What the name of a device begins with whose times are nobody's: benchmarks/pretended_gpu."""

Positive = Annotated[float, Field(gt=0)]
Amount = Annotated[int, Field(gt=0)]
Size = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """A part of the file: unknown keys are refused, nothing is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    KEY: ClassVar[tuple[str, ...]] = ()
    """The fields by which a later record replaces an earlier one in a file."""

    @property
    def key(self) -> tuple[str, ...]:
        """The values of `KEY`."""
        return tuple(getattr(self, name) for name in self.KEY)


class Rates(Record):
    """What the device does at best, measured in the same run."""

    copy_gb_per_s: Positive  # a large copy, bytes read and written
    matmul_tflop_per_s: Positive
    matmul_dtype: str  # bfloat16 on a GPU, float32 on a CPU, as the operators there


class Row(Record):
    """One side of one case."""

    KEY = "operator", "shape", "direction", "side"
    operator: str
    shape: str
    direction: str
    """forward, forward_backward, ..."""
    side: str
    dtype: str
    rounds: Amount
    seconds: Spread
    of_ours: Spread | None = None  # this side's time over ours, within rounds; None for our own row
    gb_per_s: Positive | None = None
    """The floor's bytes over the median time; shares are of the same run's `Rates`."""
    tflop_per_s: Positive | None = None
    share_of_copy: Positive | None = None
    share_of_matmul: Positive | None = None
    peak_bytes: Size | None = None
    """Allocated at most beyond what was there before; None where the device does not tell."""

    @property
    def peak_mb(self) -> float | None:
        """In the unit of the tables."""
        return self.peak_bytes and self.peak_bytes / 1e6

    @property
    def case(self) -> str:
        """How its case is named where it is skipped or fails."""
        return " ".join(self.key[:3])


def by_case(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """A dictionary per case, of its rows by side; cases that we have no row in are left out."""
    cases: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for row in rows:
        cases[row.case][row.side] = row
    return [case for case in cases.values() if "ours" in case]


class Count(Record):
    """Something counted on the meta device."""

    KEY = "what", "of"
    what: str
    of: str
    plain: float | None
    """With the references, or with PyTorch's own; None where there is no such thing."""
    ours: float
    unit: str


class Attempt(Record):
    """A training iteration at one micro-batch."""

    samples: Amount
    seconds: Spread | None
    """Of two D updates and one G update of so many samples each; None where it was not run."""
    peak_bytes: Size | None  # allocated at most in all, weights and optimizer included

    @property
    def seconds_per_sample(self) -> float | None:
        """The median's; None where it was not run."""
        return None if self.seconds is None else self.seconds.median / self.samples

    @property
    def peak_mb(self) -> float | None:
        """In the unit of the tables."""
        return self.peak_bytes and self.peak_bytes / 1e6


class WholeStep(Record):
    """The training iteration of one setup in one build; benchmarks/setups.py has both."""

    KEY = "setup", "build", "how"
    setup: str
    build: str
    how: Literal["measured", "counted"]
    """On a GPU, or on the meta device, where nothing is run and there are no seconds."""
    tflop_per_sample: Positive  # executed per iteration
    usual: Attempt  # at the paper's samples per GPU
    best: Attempt | None = None  # the least time per sample; None where that was not looked for
    fits: dict[str, int | None]
    """Most samples per GPU, a power of two, by the GPU's memory; None where it is not known."""
    matmul_tflop_per_s: Positive | None = None  # measured in the same call

    @property
    def case(self) -> str:
        """How it is named where it is skipped or fails."""
        suffix = "" if self.how == "measured" else "_counted"
        return f"whole_step{suffix}[{self.setup}-{self.build}]"


class Feed(Record):
    """How fast clips come from a part of the loader, pulled as fast as they come."""

    KEY = ("case",)  # all parts of a case are replaced together
    case: str
    clips: str  # which, of which videos
    decoder: str
    num_threads: Amount
    part: str  # decode, pipeline, loader or transfer; see benchmarks/loading.py
    batch_size: Amount
    rounds: Amount
    seconds: Spread  # wall time per clip
    cpu_seconds: Annotated[float, Field(ge=0)]  # the process's CPU time per clip, all threads
    needed_per_s: Positive  # clips per second that a step on one device consumes

    @property
    def per_s(self) -> Spread:
        """Clips per second."""
        return Spread(1 / self.seconds.median, 1 / self.seconds.p80, 1 / self.seconds.p20)

    @property
    def cpu_ms(self) -> float:
        """Milliseconds of CPU time per clip."""
        return 1e3 * self.cpu_seconds


class Skip(Record):
    """A case that was not measured, and why."""

    case: str
    reason: str


class Device(Record):
    """Where the run was made."""

    kind: Literal["cuda", "cpu"]
    name: str
    num_threads: int | None  # of a CPU run
    driver: str | None  # of a GPU


class Made(Record):
    """When, where and of which code a file was made."""

    date: datetime
    device: Device
    versions: dict[str, str | None]  # python, torch, triton, cuda and cudnn
    commit: str | None  # None where the tree is no git checkout
    dirty: bool | None  # whether tracked files differed from the commit


class Document(Made):
    """A result file."""

    format: Literal[1]
    quick: bool
    seconds: float  # how long the run took, all calls of it together
    rates: list[Rates]
    """Of every call that added to the file; shares in `rows` are of their own call's."""
    rows: list[Row]
    counts: list[Count]
    steps: list[WholeStep] = []
    feeds: list[Feed] = []
    skipped: list[Skip]
    failed: list[str]  # cases that were refused or broke

    @classmethod
    def begun(cls, made: dict[str, Any], *, quick: bool, **found: Any) -> "Document":
        """With what is found, and nothing else yet. `made`: the fields of `Made`."""
        nothing: dict[str, Any] = {
            name: [] for name in ("rates", "rows", "counts", "skipped", "failed")
        }
        return cls(**made, **{"format": 1, "quick": quick, "seconds": 0} | nothing | found)

    @property
    def holds_results(self) -> bool:
        """Whether anything was measured or counted."""
        return bool(self.rows or self.counts or self.steps or self.feeds)


# ---------------------------------------------------------------------------- where it was made


def made_here() -> dict[str, Any]:
    """The fields of `Made`: now, on this machine, of this commit."""
    git = "git", "-C", str(FOLDER.parent), "describe"
    described = _output(*git, "--always", "--abbrev=40", "--exclude=*", "--dirty")
    return {
        "date": datetime.now(UTC).replace(microsecond=0),
        "device": this_device(),
        "versions": these_versions(),
        "commit": described and described.removesuffix("-dirty"),
        "dirty": described and described.endswith("-dirty"),
    }


def this_device() -> Device:
    """The GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        name, driver = torch.cuda.get_device_name(), drivers and drivers.splitlines()[0]
        return Device(kind="cuda", name=name, num_threads=None, driver=driver)
    about = Path("/proc/cpuinfo")
    text = about.read_text() if about.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = found[1].strip() if found else platform.machine()
    return Device(kind="cpu", name=name, num_threads=torch.get_num_threads(), driver=None)


def these_versions() -> dict[str, str | None]:
    """Versions of what the measurement depends on."""
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
    }


def version_of(package: str) -> str | None:
    """None for what is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints; None where it is missing, fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


# ------------------------------------------------------------------------------------- files


def write(document: Document, folder: Path) -> Path:
    """Write a new file into the folder; never over another one.

    Raises UserError for a pretended device's in `FOLDER`.
    """
    name = document.device.name
    if folder.resolve() == FOLDER and name.startswith(PRETENDED):
        raise UserError(f"{name} is no device: nothing it measured is a result")
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path = folder / f"{document.date:%Y-%m-%dT%H%M%S}-{document.device.kind}-{device}.json"
    if path.exists():
        raise UserError(f"{path} is there already")
    save(document, path)
    return path


def save(document: Record, path: Path) -> None:
    """Write the file at this path."""
    path.write_text(json.dumps(document.model_dump(mode="json"), indent=1) + "\n")


def read(path: Path) -> Document:
    """Read and check a file. Raises UserError with one line."""
    try:
        return Document.model_validate(json.loads(path.read_text()))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path} is no result file: {place}: {first['msg']}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def newest(folder: Path) -> dict[str, Document]:
    """The newest file of each kind of device, by the date in it. Raises UserError as `read`."""
    found = sorted(map(read, sorted(folder.glob("*.json"))), key=lambda document: document.date)
    return {document.device.kind: document for document in found}


def added(before: Document, more: Document, passed: Collection[str] = ()) -> Document:
    """One file of two calls on the same device, versions and commit; later rows replace earlier.

    `passed` names the cases of the second call that need no longer be listed as skipped or failed.
    Raises UserError where they are not the same.
    """
    for name in ("device", "versions", "commit", "quick"):
        was, now = getattr(before, name), getattr(more, name)
        if was != now:
            raise UserError(f"cannot add to a run with another {name}: {was} there, {now} here")
    both: dict[str, Any] = {}
    for name in ("rows", "counts", "steps", "feeds"):
        again = {record.key for record in getattr(more, name)}
        kept = [record for record in getattr(before, name) if record.key not in again]
        both[name] = kept + getattr(more, name)
    done = {row.case for row in more.rows} | {step.case for step in more.steps}
    done |= {feed.case for feed in more.feeds} | set(passed)
    both["skipped"] = [s for s in before.skipped if s.case not in done] + more.skipped
    both["failed"] = [name for name in before.failed if name not in done] + more.failed
    both["dirty"] = more.dirty if before.dirty is None else before.dirty or bool(more.dirty)
    both["seconds"] = before.seconds + more.seconds
    both["rates"] = before.rates + more.rates
    return before.model_copy(update=both)
