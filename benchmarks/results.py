"""The result file of a run: its schema, where it was made, and how it is written and found.

One JSON file per run in benchmarks/results/, named by date and device. Times are seconds, rates
GB/s (1e9 bytes) and TFLOP/s, memory bytes.
"""

import json
import platform
import re
import subprocess
from collections.abc import Collection
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmarks.timing import Spread
from engine.errors import UserError

FOLDER = Path(__file__).resolve().parent / "results"
REPOSITORY = FOLDER.parents[1]
PRETENDED = "pretended"
"""What the name of a device begins with whose times are nobody's: benchmarks/pretended_gpu."""
FORMAT: Final = 1

Positive = Annotated[float, Field(gt=0)]


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
    rounds: Annotated[int, Field(gt=0)]
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
    def key(self) -> tuple[str, str, str, str]:
        """What there is one row of in a file."""
        return self.operator, self.shape, self.direction, self.side


class Count(Record):
    """Something counted on the meta device."""

    what: str
    of: str
    plain: float | None
    """With the references, or with PyTorch's own; None where there is no such thing."""
    ours: float
    unit: str


class Attempt(Record):
    """A training iteration at one micro-batch."""

    samples: Annotated[int, Field(gt=0)]
    seconds: Spread | None
    """Of two D updates and one G update of so many samples each; None where it was not run."""
    peak_bytes: Annotated[int, Field(ge=0)] | None
    """Allocated at most in all, weights and optimizer included."""


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
    def key(self) -> tuple[str, str, str]:
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
    num_threads: Annotated[int, Field(gt=0)]
    part: str
    """decode, pipeline, loader or transfer; see benchmarks/loading.py."""
    batch_size: Annotated[int, Field(gt=0)]
    rounds: Annotated[int, Field(gt=0)]
    seconds: Spread
    """Wall time per clip."""
    cpu_seconds: Annotated[float, Field(ge=0)]
    """The process's CPU time per clip, all threads."""
    needed_per_s: Positive
    """Clips per second that a step on one device consumes."""


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


class Document(Record):
    """A result file."""

    format: Literal[1]
    date: datetime
    device: Device
    versions: dict[str, str | None]
    """python, torch, triton, cuda and cudnn."""
    commit: str | None
    """None where the tree is no git checkout."""
    dirty: bool | None
    """Whether tracked files differed from the commit."""
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


def this_device() -> Device:
    """The GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = drivers.splitlines()[0] if drivers else None
        name = torch.cuda.get_device_name()
        return Device(kind="cuda", name=name, num_threads=None, driver=driver)
    return Device(kind="cpu", name=_cpu_name(), num_threads=torch.get_num_threads(), driver=None)


def these_versions() -> dict[str, str | None]:
    """Versions of what the measurement depends on."""
    try:
        triton: str | None = version("triton")
    except PackageNotFoundError:
        triton = None
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
    }


def this_commit() -> tuple[str | None, bool | None]:
    """(commit, whether tracked files differ from it); (None, None) outside git."""
    commit = _output("git", "-C", str(REPOSITORY), "rev-parse", "HEAD")
    if not commit:
        return None, None
    status = _output("git", "-C", str(REPOSITORY), "status", "--porcelain", "--untracked-files=no")
    return commit, bool(status)


def write(document: Document, folder: Path) -> Path:
    """Write a new file into the folder; never over another one.

    Raises UserError for a pretended device's in `FOLDER`.
    """
    if folder.resolve() == FOLDER and document.device.name.startswith(PRETENDED):
        raise UserError(f"{document.device.name} is no device: nothing it measured is a result")
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", document.device.name.lower()).strip("-")
    stem = f"{document.date:%Y-%m-%dT%H%M%S}-{document.device.kind}-{device}"
    path = folder / f"{stem}.json"
    if path.exists():
        raise UserError(f"{path} is there already")
    save(document, path)
    return path


def save(document: Document, path: Path) -> None:
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
    found: dict[str, Document] = {}
    for path in sorted(folder.glob("*.json")):
        document = read(path)
        kind = document.device.kind
        if kind not in found or document.date > found[kind].date:
            found[kind] = document
    return found


def added(before: Document, more: Document, passed: Collection[str] = ()) -> Document:
    """One file of two calls on the same device, versions and commit; later rows replace earlier.

    `passed` names the cases of the second call that need no longer be listed as skipped or failed.
    Raises UserError where they are not the same.
    """
    for name in ("device", "versions", "commit", "quick"):
        was, now = getattr(before, name), getattr(more, name)
        if was != now:
            raise UserError(f"cannot add to a run with another {name}: {was} there, {now} here")
    again = {row.key for row in more.rows}
    counted = {(count.what, count.of) for count in more.counts}
    stepped = {step.key for step in more.steps}
    fed = {feed.case for feed in more.feeds}
    done = {case_name(*key[:3]) for key in again} | fed | set(passed)
    return before.model_copy(
        update={
            "dirty": _either(before.dirty, more.dirty),
            "seconds": before.seconds + more.seconds,
            "rates": before.rates + more.rates,
            "rows": [row for row in before.rows if row.key not in again] + more.rows,
            "counts": [c for c in before.counts if (c.what, c.of) not in counted] + more.counts,
            "steps": [step for step in before.steps if step.key not in stepped] + more.steps,
            "feeds": [feed for feed in before.feeds if feed.case not in fed] + more.feeds,
            "skipped": [s for s in before.skipped if s.case not in done] + more.skipped,
            "failed": [name for name in before.failed if name not in done] + more.failed,
        }
    )


def case_name(operator: str, shape: str, direction: str) -> str:
    """How skipped and failed cases are named."""
    return f"{operator} {shape} {direction}"


def now() -> datetime:
    """In UTC."""
    return datetime.now(UTC).replace(microsecond=0)


def _either(before: bool | None, more: bool | None) -> bool | None:
    return more if before is None else before or bool(more)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
