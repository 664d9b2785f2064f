"""The result file of a run: its schema, where it was made, and how it is written and found.

One JSON file per run in benchmarks/results/, named by date and device. Times are seconds, rates
GB/s (1e9 bytes) and TFLOP/s, memory bytes.
"""

import json
import math
import platform
import re
import subprocess
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmarks.setups import BUILDS, USABLE_BYTES
from benchmarks.timing import Spread
from engine.errors import UserError

FOLDER = Path(__file__).resolve().parent / "results"
REPOSITORY = FOLDER.parents[1]
PRETENDED = "pretended"
"""What the name of a device begins with whose times are nobody's: benchmarks/pretended_gpu."""

Positive = Annotated[float, Field(gt=0)]
Amount = Annotated[int, Field(gt=0)]


class Record(BaseModel):
    """A part of the file: unknown keys are refused, nothing is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Rates(Record):
    """What the device does at best, measured in the same run."""

    copy_gb_per_s: Positive
    """A large copy, bytes read and written."""
    matmul_tflop_per_s: Positive
    matmul_dtype: str
    """bfloat16 on a GPU, float32 on a CPU, as the operators there."""


class Row(Record):
    """One side of one case."""

    operator: str
    shape: str
    direction: str
    """forward, forward_backward, ..."""
    side: str
    dtype: str
    rounds: Amount
    seconds: Spread
    of_ours: Spread | None = None
    """This side's time over ours, within rounds; None for our own row."""
    gb_per_s: Positive | None = None
    """The floor's bytes over the median time."""
    tflop_per_s: Positive | None = None
    share_of_copy: Positive | None = None
    """Of the copy bandwidth of the same run."""
    share_of_matmul: Positive | None = None
    peak_bytes: Annotated[int, Field(ge=0)] | None = None
    """Allocated at most beyond what was there before; None where the device does not tell."""

    @property
    def key(self) -> tuple[str, ...]:
        """What there is one row of in a file."""
        return self.operator, self.shape, self.direction, self.side

    @property
    def case(self) -> str:
        """How its case is named where it is skipped or fails."""
        return case_name(*self.key[:3])


class Count(Record):
    """Something counted on the meta device."""

    what: str
    of: str
    plain: float | None
    """With the references, or with PyTorch's own; None where there is no such thing."""
    ours: float
    unit: str

    @property
    def key(self) -> tuple[str, ...]:
        """What there is one count of in a file."""
        return self.what, self.of


class Attempt(Record):
    """A training iteration at one micro-batch."""

    samples: Amount
    seconds: Spread | None
    """Of two D updates and one G update of so many samples each; None where it was not run."""
    peak_bytes: Annotated[int, Field(ge=0)] | None
    """Allocated at most in all, weights and optimizer included."""

    @property
    def seconds_per_sample(self) -> float | None:
        """The median's; None where it was not run."""
        return None if self.seconds is None else self.seconds.median / self.samples


class WholeStep(Record):
    """The training iteration of one setup in one build; benchmarks/setups.py has both."""

    setup: str
    build: str
    how: Literal["measured", "counted"]
    """On a GPU, or on the meta device, where nothing is run and there are no seconds."""
    tflop_per_sample: Positive
    """Executed per iteration."""
    usual: Attempt
    """At the paper's samples per GPU."""
    best: Attempt | None = None
    """The least time per sample; None where that was not looked for."""
    fits: dict[str, int | None]
    """Most samples per GPU, a power of two, by the GPU's memory; None where it is not known."""
    matmul_tflop_per_s: Positive | None = None
    """Measured in the same call."""

    @property
    def key(self) -> tuple[str, ...]:
        """What there is one of in a file."""
        return self.setup, self.build, self.how

    @property
    def case(self) -> str:
        """How it is named where it is skipped or fails."""
        suffix = "" if self.how == "measured" else "_counted"
        return f"whole_step{suffix}[{self.setup}-{self.build}]"


class Feed(Record):
    """How fast clips come from a part of the loader, pulled as fast as they come."""

    case: str
    clips: str
    """Which, of which videos."""
    decoder: str
    num_threads: Amount
    part: str
    """decode, pipeline, loader or transfer; see benchmarks/loading.py."""
    batch_size: Amount
    rounds: Amount
    seconds: Spread
    """Wall time per clip."""
    cpu_seconds: Annotated[float, Field(ge=0)]
    """The process's CPU time per clip, all threads."""
    needed_per_s: Positive
    """Clips per second that a step on one device consumes."""

    @property
    def key(self) -> tuple[str, ...]:
        """All parts of a case are replaced together."""
        return (self.case,)


class Skip(Record):
    """A case that was not measured, and why."""

    case: str
    reason: str


class Device(Record):
    """Where the run was made."""

    kind: Literal["cuda", "cpu"]
    name: str
    num_threads: int | None
    """Of a CPU run."""
    driver: str | None
    """Of a GPU."""


class Made(Record):
    """When, where and of which code a file was made."""

    date: datetime
    device: Device
    versions: dict[str, str | None]
    """python, torch, triton, cuda and cudnn."""
    commit: str | None
    """None where the tree is no git checkout."""
    dirty: bool | None
    """Whether tracked files differed from the commit."""


class Document(Made):
    """A result file."""

    format: Literal[1]
    quick: bool
    seconds: float
    """How long the run took, all calls of it together."""
    rates: list[Rates]
    """Of every call that added to the file; shares in `rows` are of their own call's."""
    rows: list[Row]
    counts: list[Count]
    steps: list[WholeStep] = []
    feeds: list[Feed] = []
    skipped: list[Skip]
    failed: list[str]
    """Cases that were refused or broke."""

    @classmethod
    def empty(cls, made: dict[str, Any], *, quick: bool) -> "Document":
        """Nothing measured yet. `made`: the fields of `Made`."""
        empty: dict[str, Any] = {"rates": [], "rows": [], "counts": [], "skipped": [], "failed": []}
        return cls(**made, format=1, quick=quick, seconds=0, **empty)

    @property
    def holds_results(self) -> bool:
        """Whether anything was measured or counted."""
        return bool(self.rows or self.counts or self.steps or self.feeds)


# ---------------------------------------------------------------------------- where it was made


def made_here() -> dict[str, Any]:
    """The fields of `Made`: now, on this machine, of this commit."""
    git = "git", "-C", str(REPOSITORY)
    commit = _output(*git, "rev-parse", "HEAD") or None
    changes = _output(*git, "status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.now(UTC).replace(microsecond=0),
        "device": this_device(),
        "versions": these_versions(),
        "commit": commit,
        "dirty": None if commit is None else bool(changes),
    }


def this_device() -> Device:
    """The GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        threads = torch.get_num_threads()
        return Device(kind="cpu", name=_cpu_name(), num_threads=threads, driver=None)
    drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    driver = drivers.splitlines()[0] if drivers else None
    name = torch.cuda.get_device_name()
    return Device(kind="cuda", name=name, num_threads=None, driver=driver)


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


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


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
        tree: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    try:
        return Document.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path} is no result file: {place}: {first['msg']}") from None


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
    done = {row.case for row in more.rows} | {feed.case for feed in more.feeds} | set(passed)
    both["skipped"] = [s for s in before.skipped if s.case not in done] + more.skipped
    both["failed"] = [name for name in before.failed if name not in done] + more.failed
    both["dirty"] = more.dirty if before.dirty is None else before.dirty or bool(more.dirty)
    both["seconds"] = before.seconds + more.seconds
    both["rates"] = before.rates + more.rates
    return before.model_copy(update=both)


def case_name(operator: str, shape: str, direction: str) -> str:
    """How skipped and failed cases are named."""
    return f"{operator} {shape} {direction}"


# -------------------------------------------------------------------------- whole iterations


def step_of(
    setup: str,
    build: str,
    attempts: Sequence[Attempt],
    tflop_per_sample: float,
    matmul_tflop_per_s: float | None,
    limit_bytes: int | None = None,
) -> WholeStep:
    """The record of a setup in a build, from the sizes that were run. `limit_bytes` as below."""
    tried = sorted(attempts, key=lambda attempt: attempt.samples)
    best = min(tried, key=lambda attempt: attempt.seconds_per_sample or math.inf)
    return WholeStep(
        setup=setup,
        build=build,
        how="measured",
        tflop_per_sample=tflop_per_sample,
        usual=tried[0],
        best=None if BUILDS[build].usual_samples_only else best,
        fits={gpu: most_that_fits(tried, size, limit_bytes) for gpu, size in USABLE_BYTES.items()},
        matmul_tflop_per_s=matmul_tflop_per_s,
    )


def most_that_fits(
    attempts: Sequence[Attempt], usable_bytes: int, limit_bytes: int | None = None
) -> int | None:
    """Most samples, a power of two or 0; None where twice as many were not tried.

    `limit_bytes`: the memory into which twice the largest attempt did not fit, if that was tried.
    """
    fitting = [a.samples for a in attempts if (a.peak_bytes or 0) <= usable_bytes]
    most = max(fitting, default=0)
    twice_is_too_large = 2 * most in {attempt.samples for attempt in attempts} - set(fitting)
    return most if twice_is_too_large or (limit_bytes or 0) >= usable_bytes else None
