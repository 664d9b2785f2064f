"""A configuration small enough to train in a second, and ways to run the scripts on it.

Most tests call a script's `main` in this process, which saves DeepSpeed's start-up; the ones that
are about processes start real ones.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest
import torch
from torch import Tensor

import engine.sample
import engine.train
from engine.command_line import run
from engine.configuration import Config, load_config
from engine.trainer.ranks import Ranks

REPOSITORY = Path(engine.train.__file__).parent.parent
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# 8x8/3 every second frame, then 8x8/2 -> 16x16/4.
TINY = """\
name: tiny
data:
  path: {data}
  num_classes: 2
  num_threads: 1
  procedural: {{num_clips: 8, num_frames: 16, resolution: 16, codec: mjpeg, seed: 0}}
training:
  iterations: 4
  global_batch: 4
  micro_batch: 4
  log_every: 1
  norm_statistics_passes: 2
stages:
  1:
    resolution: 8
    num_frames: 3
    frame_stride: 2
    generator:
      {{temporal: conv_gru, channels: 4, multipliers: [2], latent_size: 8,
        class_embedding_size: 4}}
    discriminators: {{channels: 4, multipliers: [1, 2], spatial_frames: 2}}
  2:
    resolution: 16
    num_frames: 4
    frame_stride: 1
    generator:
      {{temporal: separable_conv, channels: 4, multipliers: [2, 1], latent_size: 8,
        class_embedding_size: 4}}
    discriminators: {{channels: 4, multipliers: [1, 2, 2], spatial_frames: 2}}
"""


@dataclass(frozen=True)
class Tiny:
    """The configuration's file; its data set lies beside it and is made on first use."""

    config_file: Path

    @property
    def data(self) -> Path:
        """The folder of video files."""
        return self.config_file.parent / "data"

    def config(self, *overrides: str) -> Config:
        """The configuration, changed as by `--set`."""
        return load_config(self.config_file, overrides)

    def options(self, stage: int, out: Path, *more: str | Path) -> list[str]:
        """train.py's arguments."""
        fixed = ("--config", self.config_file, "--stage", stage, "--out", out)
        return [str(argument) for argument in (*fixed, *more)]

    def train(self, stage: int, out: Path, *more: str | Path) -> "Finished":
        """Train in this process."""
        return call(engine.train.main, *self.options(stage, out, *more))

    def trained(self, stage: int, out: Path, *more: str | Path) -> Path:
        """Train in this process, which must succeed; the newest checkpoint's folder."""
        finished = self.train(stage, out, *more)
        assert finished.code == 0, finished.err
        return sorted((out / f"stage{stage}" / "checkpoints").glob("step-*"))[-1]


def write_tiny(folder: Path) -> Tiny:
    """The tiny configuration in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tiny.yaml"
    file.write_text(TINY.format(data=folder / "data"))
    return Tiny(file)


@dataclass(frozen=True)
class Finished:
    """What a script left behind."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """Its one line on standard error; fails when it is not exactly one, or not exit code 2."""
        assert "Traceback" not in self.out + self.err
        assert self.code == 2, (self.code, self.out, self.err)
        (line,) = self.err.splitlines()
        assert line.startswith("error: ")
        return line


def call(main: Any, *arguments: str | Path) -> Finished:
    """Run a script's `main` as `python script.py ARGUMENTS` would, in this process.

    Descriptors 1 and 2 are replaced by files, as train.py works below sys.stdout.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, _Descriptors() as descriptors:
        patch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        patch.setattr(Ranks, "disconnect", lambda self: None)  # the next call goes on with it
        patch.setattr(engine.train, "follow_launcher", lambda: None)  # connecting sets LOCAL_RANK
        patch.setattr(os, "_exit", sys.exit)  # this process has tests left to run
        try:
            run(main)
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return Finished(code, *descriptors.texts)


class _Descriptors:
    """Catches what is written to descriptors 1 and 2 and to sys.stdout and sys.stderr."""

    def __enter__(self) -> "_Descriptors":
        self._streams = sys.stdout, sys.stderr
        for stream in self._streams:
            stream.flush()
        self._originals = os.dup(1), os.dup(2)
        self._files = [TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115 — closed on exit
        for number, file in enumerate(self._files, start=1):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (
            os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2)
        )
        self.texts: tuple[str, str] = ("", "")
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.close()
        sys.stdout, sys.stderr = self._streams
        texts = []
        for number, (file, original) in enumerate(
            zip(self._files, self._originals, strict=True), start=1
        ):
            os.dup2(original, number)
            os.close(original)
            file.seek(0)
            texts.append(file.read())
            file.close()
        self.texts = texts[0], texts[1]


def sample(*arguments: str | Path) -> Finished:
    """Run sample.py in this process."""
    return call(engine.sample.main, *arguments)


@contextlib.contextmanager
def full_disk(free_bytes: int) -> Iterator[None]:
    """No file grows beyond so many bytes, which fails as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[None]:
    """A file system of its own in `folder`, in memory; skips the test where none may be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no file system may be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def free_port() -> int:
    """A port for a launcher, so that several tests can run at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    """For a process of its own: as this one's, but with no rank, and with the device that DeepSpeed
    finds, whatever a script that ran in this process has set."""
    left_out = {*LAUNCHER_VARIABLES, "DS_ACCELERATOR"}
    kept = {k: v for k, v in os.environ.items() if k not in left_out}
    return kept | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/tests", "OMP_NUM_THREADS": "1"}


def python(script: str, *arguments: str | Path, seconds: float = 120) -> Finished:
    """`python SCRIPT ARGUMENTS` in a process of its own; `script` is below the repository."""
    return _process([sys.executable, str(REPOSITORY / script), *map(str, arguments)], seconds)


def two_ranks(script: str | Path, *arguments: str | Path, seconds: float = 240) -> Finished:
    """`deepspeed --num_gpus 2 SCRIPT ARGUMENTS`."""
    return _process(launcher(2, script, *arguments), seconds)


def launcher(num_ranks: int, script: str | Path, *arguments: str | Path) -> list[str]:
    """The command `deepspeed --num_gpus NUM_RANKS SCRIPT ARGUMENTS`."""
    deepspeed = Path(sys.executable).with_name("deepspeed")
    options = ["--num_gpus", str(num_ranks), "--master_port", str(free_port())]
    command = [sys.executable, str(deepspeed), *options, "--log_level", "error"]
    return [*command, str(REPOSITORY / script), *map(str, arguments)]


def _process(command: list[str], seconds: float) -> Finished:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, env=environment(), check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts and lists, by path."""
    if isinstance(state, Mapping):
        items = [(str(key), value) for key, value in state.items()]
    elif isinstance(state, list | tuple):
        items = [(str(position), value) for position, value in enumerate(state)]
    else:
        return {prefix: state}
    return {k: v for key, value in items for k, v in flat(value, f"{prefix}/{key}").items()}


def differences(a: Any, b: Any) -> list[str]:
    """Paths of the leaves that are not bit for bit the same in two nested states."""
    flat_a, flat_b = flat(a), flat(b)

    def same(x: Any, y: Any) -> bool:
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            return x.dtype == y.dtype and torch.equal(x, y)
        return type(x) is type(y) and (x == y or vars_of(x) == vars_of(y) != {})

    def vars_of(x: Any) -> dict[str, Any]:
        return getattr(x, "__dict__", {})  # DeepSpeed's LossScaler has no ==

    return sorted(
        (flat_a.keys() ^ flat_b.keys())
        | {k for k in flat_a.keys() & flat_b.keys() if not same(flat_a[k], flat_b[k])}
    )


def contents(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's tensor files hold, by file."""
    return {
        str(file.relative_to(checkpoint)): torch.load(file, weights_only=True)
        for file in sorted(checkpoint.rglob("*.pt"))
    }


def network_in(held: dict[str, Any], network: str) -> dict[str, Tensor]:
    """The weights, as rows, and buffers of one network in a checkpoint's `contents`."""
    shards = [held[name] for name in sorted(held) if name.startswith(f"{network}-")]
    starts = sorted(
        (name, start, number)
        for number, shard in enumerate(shards)
        for name, start in shard["starts"].items()
    )
    pieces: dict[str, list[Tensor]] = {}
    for name, _, number in starts:
        pieces.setdefault(name, []).append(shards[number]["values"]["weight"][name])
    return {name: torch.cat(rows) for name, rows in pieces.items()} | shards[0]["buffers"]


MEASURED = (
    *("seconds_per_step", "clips_per_second", "waiting_for_clips", "memory_MB"),
    *("gpu_memory_MB", "gpu_utilization", "gpu_clock_MHz", "gpu_power_W"),
)


def logged(stage_folder: Path) -> list[dict[str, float]]:
    """log.jsonl without what depends on the machine."""
    lines = (stage_folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]
