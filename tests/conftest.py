"""What every test starts from."""

import os

# Before torch is imported: workers that each take every core only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before matplotlib is imported: there is no display.
os.environ.setdefault("MPLBACKEND", "Agg")

import contextlib
import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forks import Forks
from small_runs import Tiny, write_tiny

from engine.trainer.ranks import Ranks

with contextlib.suppress(AttributeError, OSError):  # Linux's, and not in every container
    # As batch work no process interrupts another by waking up, here and in all that tests start.
    # Else gloo's threads interrupt the one whose lock they want, and try for it again and again:
    # ranks that outnumber the cores spend a third of their time so.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--mutants",
        metavar="N or M:N",
        help="how many damaged inputs of each kind the tests make, or which of them",
    )


_COSTLY = (
    "trainer/test_zero.py",
    "test_miniature.py",
    "kernels/test_convolution.py",
    "kernels/test_compiled.py",
    "trainer/test_learning.py",
    "trainer/test_multi_node.py",
    "models/test_gpu_forms.py",
    "test_train_script.py",
    "trainer/test_resume.py",
)
"""Files that take longest, which run first: one that begins last leaves the other worker idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put costly files first, and leave all else in its order."""
    place = {Path(__file__).parent / name: number for number, name in enumerate(_COSTLY)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(autouse=True, scope="module")
def _settled_heap() -> None:
    """Leave what is loaded by now, millions of objects, out of later garbage collections.

    DeepSpeed asks for one whenever an engine ends, which takes longer than a small run's steps.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The tiny configuration."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def cascade_run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both stages, two steps each, with checkpoints of both steps. Not to be changed."""
    out = tmp_path_factory.mktemp("cascade")
    for stage in (1, 2):
        tiny.trained(stage, out, "--max-steps", "2", "--set", "training.checkpoint_every=1")
    return out


@pytest.fixture
def run(cascade_run: Path, tmp_path: Path) -> Path:
    """A copy of `cascade_run`, to be damaged."""
    out = tmp_path / "run"
    shutil.copytree(cascade_run, out)
    return out


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    """A connected job of one rank on the CPU, in this process."""
    ranks = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    ranks.connect()
    return ranks


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Starts ranks without a launcher."""
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def i3d_weights() -> Path:
    """The I3D network's weights; fetched once, like `make i3d`, where pip reaches an index."""
    from engine.errors import UserError
    from engine.evaluation.i3d_weights import main, weights_path

    path = weights_path()
    if not path.is_file():
        try:
            main([])
        except UserError as error:
            pytest.skip(f"no I3D weights, and they cannot be fetched: {error}")
    return path
