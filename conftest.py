"""Two options by which nox keeps the tests honest: no skip that nobody asked for, and nothing installed that was not declared."""

from __future__ import annotations

import importlib.util

import pytest

ABSENT = pytest.StashKey[tuple[str, ...]]()
SKIPS = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("colossal")
    group.addoption(
        "--strict-skips",
        action="store_true",
        help="fail when a test is skipped, unless it is for want of a module that --absent names",
    )
    group.addoption("--absent", default="", help="modules, separated by commas, that must not be importable here")


def pytest_configure(config: pytest.Config) -> None:
    names = tuple(name for name in str(config.getoption("--absent")).split(",") if name)
    present = [name for name in names if importlib.util.find_spec(name) is not None]
    if present:
        message = f"importable here, though the package under test does not declare it: {', '.join(present)}"
        raise pytest.UsageError(message)
    config.stash[ABSENT] = names
    config.stash[SKIPS] = []
    config.pluginmanager.register(_SkipCollector(config), "colossal-skips")


class _SkipCollector:
    """Remembers skips whose reason is not an absent module."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(name in reason for name in self.config.stash[ABSENT]):
            self.config.stash[SKIPS].append(f"{report.nodeid}: {reason}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        nothing_failed = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        if self.config.getoption("--strict-skips") and self.config.stash[SKIPS] and nothing_failed:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.config.getoption("--strict-skips") and self.config.stash[SKIPS]:
            terminalreporter.section("skipped, which --strict-skips does not allow", red=True)
            for line in self.config.stash[SKIPS]:
                terminalreporter.line(line)
