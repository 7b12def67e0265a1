"""A plugin of pytest: each test's outcome is written as soon as it is known, and what has one is not run again.

python -m pytest -p bench.resume --outcomes FILE.jsonl ...

A test in which the process died counts as failed. Once a GPU has refused its work nothing that follows in the same process could pass: the
session ends with status 2, and the next one goes on.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.lines import append, read

REFUSED = "CUDA error"  # begins what PyTorch says from then on


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="lines of JSON; tests that it holds are not run again")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("outcomes"):
        config.pluginmanager.register(Outcomes(path))


class Outcomes:
    """Of every test so far, in this session and earlier ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = {row["test"]: row for row in read(path)}
        for test, row in self.known.items():
            if row["outcome"] == "begun":
                self.note(test, "failed", "the process died, or was stopped")
        self.earlier = [row for row in self.known.values() if row["outcome"] == "failed"]

    def note(self, test: str, outcome: str, said: str = "") -> None:
        self.known[test] = {"test": test, "outcome": outcome, "said": said}
        append(self.path, self.known[test])

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.known])
        items[:] = [item for item in items if item.nodeid not in self.known]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.note(nodeid, "begun")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.note(report.nodeid, report.outcome, report.longreprtext[-2000:] if report.failed else "")
        if report.failed and REFUSED in report.longreprtext:
            self.session.shouldstop = "the GPU has refused its work"

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        ended = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
        if self.known and exitstatus in ended:
            failed = any(row["outcome"] == "failed" for row in self.known.values())
            session.exitstatus = pytest.ExitCode.TESTS_FAILED if failed else pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for row in self.earlier:
            terminalreporter.write_line(f"FAILED earlier {row['test']}: {row['said'].strip().splitlines()[-1]}")
