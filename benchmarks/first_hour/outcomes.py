"""A plugin for pytest: what became of every test, in a call's file, while the others still run.

    pytest -p benchmarks.first_hour.outcomes --outcomes DIR/CALL.json tests/kernels -m gpu

A test is a part of parts.py. Started again, pytest runs those that are not recorded yet.
"""

import gc
import sys
from pathlib import Path

import pytest

from benchmarks.first_hour.parts import START_AGAIN, Recorder, context_is_whole


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
            self._recorder.record(report.nodeid, "failed", error=str(report.longrepr))

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Leave out what is recorded."""
        recorded = [item for item in items if item.nodeid in self._recorder.outcomes]
        items[:] = [item for item in items if item not in recorded]
        config.hook.pytest_deselected(items=recorded)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._reports = []
        self._recorder.record(nodeid, "begun")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """From the reports of a test's setup, call and teardown, the first that did not pass."""
        seconds = round(sum(report.duration for report in self._reports), 3)
        stopped = [report for report in self._reports if not report.passed]
        if not stopped:
            self._recorder.record(nodeid, "done", seconds=seconds)
        elif stopped[0].skipped:
            # (file, line, reason), but a sentence for what was expected to fail
            told = stopped[0].longrepr
            reason = told[2] if isinstance(told, tuple) else str(told)
            self._recorder.record(nodeid, "left out", seconds=seconds, error=reason)
        else:
            error = str(stopped[0].longrepr)
            self._recorder.record(nodeid, "failed", seconds=seconds, error=error)
            forget_the_last_error()
            if not context_is_whole():
                pytest.exit("the GPU's context is lost", returncode=START_AGAIN)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Nothing is left to run where everything is recorded: that is no mistake."""
        if self._recorder.outcomes and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK


def forget_the_last_error() -> None:
    """Its frames hold a failed test's tensors, gigabytes that the next test would lack."""
    names = ("last_exc", "last_type", "last_value", "last_traceback")
    found = [name for name in names if hasattr(sys, name)]
    for name in found:
        delattr(sys, name)
    if found:
        gc.collect()
