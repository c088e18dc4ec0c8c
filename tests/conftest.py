"""For all tests: the environment of the stage commands, and an account of what was skipped."""

from pathlib import Path

import pytest

from runtime.environment import set_environment

set_environment()

ALLOWED = Path(__file__).with_name("allowed_skips.txt")


def read_allowed(text: str) -> list[tuple[str, str]]:
    """Pairs of nodeid prefix and reason prefix."""
    lines = (line.strip() for line in text.splitlines())
    pairs = (line.partition(": ") for line in lines if line and not line.startswith("#"))
    return [(nodeid, reason) for nodeid, _, reason in pairs]


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def unexpected_skips(config: pytest.Config) -> list[tuple[str, str]]:
    allowed = read_allowed(ALLOWED.read_text())
    skips = [(report.nodeid, skip_reason(report)) for report in skipped_reports(config)]
    return [(nodeid, reason) for nodeid, reason in skips if not any(nodeid.startswith(n) and reason.startswith(r) for n, r in allowed)]


def skipped_reports(config: pytest.Config) -> list[pytest.TestReport]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return [] if reporter is None else reporter.stats.get("skipped", [])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first, or it runs alone at the end while the other worker has nothing left."""
    items.sort(key=lambda item: item.path.name != "test_smoke.py")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A skip that allowed_skips.txt does not name makes the run fail."""
    if not hasattr(session.config, "workerinput") and unexpected_skips(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reports = skipped_reports(config)
    terminalreporter.section(f"{len(reports)} skipped")
    unexpected = unexpected_skips(config)
    for report in reports:
        nodeid, reason = report.nodeid, skip_reason(report)
        mark = "NOT ALLOWED " if (nodeid, reason) in unexpected else ""
        terminalreporter.write_line(f"{mark}{nodeid}: {reason}")
    if unexpected:
        terminalreporter.write_line(f"{len(unexpected)} of them stand in no line of {ALLOWED.name}: the run fails.")
