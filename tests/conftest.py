"""What the tests as a whole say at their end: which did not run for want of a program, and how to change that."""

from __future__ import annotations

from collections import Counter

import pytest

# A skip whose reason begins so must not be overlooked.
NOT_RUN = "NOT RUN: "


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print such reasons in red, however quiet pytest is asked to be."""
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ")
                      for report in terminalreporter.stats.get("skipped", []) if isinstance(report.longrepr, tuple))
    for reason, count in reasons.items():
        if reason.startswith(NOT_RUN):
            terminalreporter.write_line(f"{count} test{'s' * (count > 1)} {reason}", red=True, bold=True)
