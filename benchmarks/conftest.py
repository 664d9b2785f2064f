"""How the benchmarks are run.

    pytest benchmarks/ --benchmark                    everything that this machine can measure
    pytest benchmarks/ --benchmark --quick            one size per operator, under a minute
    pytest benchmarks/ --benchmark -k "frame_norm and 512x32x32"       one operator, one size
    pytest benchmarks/ --benchmark --budget 420       start no case after seven minutes
    python benchmarks/report.py                       the newest results as tables

With a GPU the operators run at the sizes of Kinetics-600 in bf16, against eager PyTorch,
torch.compile and cuDNN's plain path; without one at a sixteenth of the channels in fp32 on one
thread, against eager PyTorch. Every run writes a JSON file to benchmarks/results/ (`--results DIR`
writes it elsewhere).

benchmarks/gpu_session.sh runs everything in calls of less than eight minutes where nothing stays
between them. Where the folder stays they go into one file, F being what the first has written:

    ... --budget 400 -k "frame_norm or conv_gru or spectral"
    ... --budget 400 --add-to F -k "whole_step and stage2_12 and compiled"

A whole iteration is one case per setup and build of benchmarks/setups.py, up to a minute each,
compiled ones several. What did not fit into the budget is listed as skipped; the same command with
`--add-to` and a narrower -k fills it in.
"""

import os

# Before torch is imported: CPU times are of one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

import kernels
from benchmarks import report, results
from benchmarks.calls import Call
from benchmarks.first_hour.outcomes import forget_the_last_error
from benchmarks.session import Session
from benchmarks.trainers import one_rank
from engine.errors import UserError
from engine.trainer.acceleration import choose_convolutions
from engine.trainer.ranks import Ranks

SESSION = pytest.StashKey[Session]()
WRITTEN = pytest.StashKey[Path]()
"""The new file, from the first case on."""
FOLDER = Path(__file__).resolve().parent
HOW_TO_RUN = "benchmarks are run by: pytest benchmarks/ --benchmark"
CUDA = torch.cuda.is_available()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Our options; those that begin with --benchmark- are pytest-benchmark's."""
    add = parser.getgroup("SSW-GAN benchmarks").addoption
    add("--benchmark", action="store_true", dest="run_benchmarks", help="measure, write results")
    add("--quick", action="store_true", help="one size per operator, forward + backward only")
    add("--budget", type=float, metavar="SECONDS", help="start no case after so many seconds")
    add(
        "--compile",
        action="store_true",
        dest="compile_references",
        help="torch.compile also on a CPU, half a minute per size, and of the spectral norm's list"
        " of weights, many minutes",
    )
    folder = results.FOLDER
    add("--results", type=Path, default=folder, metavar="DIR", help="where the file goes")
    add("--add-to", type=Path, metavar="FILE", help="add to an earlier result file of this device")


def pytest_configure(config: pytest.Config) -> None:
    """Start the session, and refuse what would fail only at its end."""
    if not config.getoption("run_benchmarks"):
        return
    if hasattr(config, "workerinput") or config.getoption("numprocesses", None):
        raise pytest.UsageError("benchmarks take turns in one process: run them without -n")
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("benchmarks need pytest-benchmark: pip install -e '.[dev]'")
    # Ours is what runs by itself, whatever KERNELS says.
    kernels.set_default("auto")
    # "fp32" shall mean it, as in training.
    torch.backends.cudnn.allow_tf32 = False
    choose_convolutions(benchmark=True)  # on both sides, as training has it
    quick, compile_asked = config.getoption("quick"), config.getoption("compile_references")
    session = config.stash[SESSION] = Session(
        device=torch.device("cuda", 0) if CUDA else torch.device("cpu"),
        quick=quick,
        compiled=(CUDA and not quick) or compile_asked,
        compile_asked=compile_asked,
        budget_seconds=config.getoption("budget"),
        seconds_per_case=0.3 if quick or CUDA else 1.0,
        least_rounds=3 if quick else 5,
    )
    if config.getoption("add_to") is not None:
        try:
            results.added(results.read(config.getoption("add_to")), session.document())
        except UserError as error:
            raise pytest.UsageError(str(error)) from None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """pytest-benchmark reads the session's clock instead of wall time."""
    session = config.stash.get(SESSION, None)
    for item in items:
        if session is not None and FOLDER in item.path.parents:
            item.add_marker(pytest.mark.benchmark(timer=lambda: session.clock))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip here, not by a mark: pytest then reports all of them in one line."""
    if FOLDER not in item.path.parents:
        return
    session = item.config.stash.get(SESSION, None)
    if session is None:
        pytest.skip(HOW_TO_RUN)
    if session.over_budget:
        pytest.skip(f"the budget of {session.budget_seconds:g} s is spent")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Skipped and failed cases go into the file too, which is written after every case.

    A later case may take the process with it.
    """
    outcome = yield
    session = item.config.stash.get(SESSION, None)
    if session is not None and FOLDER in item.path.parents:
        if outcome.skipped and call.excinfo is not None:
            skip = results.Skip(case=_case_of(item), reason=str(call.excinfo.value))
            session.results.skipped.append(skip)
        elif outcome.failed:
            session.results.failed.append(_case_of(item))
        elif call.when == "call":
            session.passed.append(_case_of(item))
        if call.when == "teardown" and item.config.getoption("add_to") is None:
            _write(item.config, session.document())
    return outcome


def pytest_runtest_logfinish() -> None:
    """A case that failed holds no memory of the next one's."""
    forget_the_last_error()


def _write(config: pytest.Config, document: results.Document) -> None:
    """A new file, or what it holds by now."""
    if WRITTEN in config.stash:
        results.save(document, config.stash[WRITTEN])
    elif document.holds_results:
        config.stash[WRITTEN] = results.write(document, config.getoption("results"))


def _case_of(item: pytest.Item) -> str:
    """As `results.Row.case` where the test is of a call, else the test's own name."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    call = parameters.get("call")
    if isinstance(call, Call):
        return f"{call.operator} {call.name} {parameters['direction']}"
    return item.name.removeprefix("test_")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Write the file and show its tables."""
    config = terminalreporter.config
    session = config.stash.get(SESSION, None)
    if session is None or not session.results.holds_results:
        return
    document, path = session.document(), config.getoption("add_to")
    if path is None:
        _write(config, document)  # with cases that were left out after the last one
        path = config.stash[WRITTEN]
    else:  # checked at the start; should the file have changed since, nothing is lost
        try:
            document = results.added(results.read(path), document, session.passed)
            results.save(document, path)
        except UserError as error:
            terminalreporter.write_line(f"error: {error}")
            path = results.write(document, config.getoption("results"))
    terminalreporter.section("SSW-GAN benchmarks")
    terminalreporter.write_line(report.render_document(document))
    terminalreporter.write_line(f"\nwritten to {path}")


@pytest.fixture
def session(request: pytest.FixtureRequest) -> Session:
    """The run that collects results."""
    return request.config.stash[SESSION]


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """A job of one; connected once, because DeepSpeed keeps its first connection's groups."""
    with one_rank(request.config.stash[SESSION].device) as ranks:
        yield ranks
