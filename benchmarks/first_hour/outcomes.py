"""A plugin for pytest: what became of every test, in a call's file, while the others still run.

    pytest -p benchmarks.first_hour.outcomes --outcomes DIR/CALL.json tests/kernels -m gpu

A test is a part of parts.py. Started again, pytest runs those that are not recorded yet.
"""

import gc
import sys
from pathlib import Path

import pytest

from benchmarks.first_hour.parts import START_AGAIN, Outcome, Recorder, context_is_whole

LONGEST = 2000


def pytest_addoption(parser: pytest.Parser) -> None:
    """The file."""
    parser.addoption("--outcomes", type=Path, metavar="FILE", help="what became of every test")


def pytest_configure(config: pytest.Config) -> None:
    """Read what is recorded already."""
    path = config.getoption("outcomes")
    if path is not None:
        config.pluginmanager.register(_Outcomes(Recorder(path, path.stem, small=False)))


class _Outcomes:
    """The hooks that record."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._reports: list[pytest.TestReport] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            error = str(report.longrepr)[-LONGEST:]
            self._recorder.record(Outcome(name=report.nodeid, status="failed", error=error))

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Leave out what is recorded."""
        recorded = [item for item in items if item.nodeid in self._recorder.outcomes]
        items[:] = [item for item in items if item not in recorded]
        config.hook.pytest_deselected(items=recorded)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._reports = []
        self._recorder.record(Outcome(name=nodeid, status="begun"))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        outcome = outcome_of(nodeid, self._reports)
        self._recorder.record(outcome)
        if outcome.status != "failed":
            return
        forget_the_last_error()
        if not context_is_whole():
            pytest.exit("the GPU's context is lost", returncode=START_AGAIN)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Nothing is left to run where everything is recorded: that is no mistake."""
        if self._recorder.outcomes and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK


def forget_the_last_error() -> None:
    """Its frames hold a failed test's tensors, gigabytes that the next test would lack."""
    kept = ("last_exc", "last_type", "last_value", "last_traceback")
    found = [name for name in kept if hasattr(sys, name)]
    for name in found:
        delattr(sys, name)
    if found:
        gc.collect()


def outcome_of(nodeid: str, reports: list[pytest.TestReport]) -> Outcome:
    """From the reports of a test's setup, call and teardown."""
    seconds = round(sum(report.duration for report in reports), 3)
    for report in reports:
        if report.failed:
            error = str(report.longrepr)[-LONGEST:]
            return Outcome(name=nodeid, status="failed", seconds=seconds, error=error)
        if report.skipped:
            # (file, line, reason), but a sentence for what was expected to fail
            told = report.longrepr
            reason = told[2] if isinstance(told, tuple) else str(told)
            return Outcome(name=nodeid, status="left out", seconds=seconds, error=reason)
    return Outcome(name=nodeid, status="done", seconds=seconds)
