"""Refuses or skips where clang is absent, and prints what each kernel's checks found."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass

import pytest

from tests.metal_host.host import available


@dataclass
class Tally:
    """What ran for one kernel."""

    cases: int = 0
    bugs: int = 0
    worst: float = 0.0
    seconds: float = 0.0


RAN = pytest.StashKey[list[tuple[str, Tally]]]()


@pytest.fixture(scope="session", autouse=True)
def compiler() -> None:
    """Where METAL_HOST=required, as in CI, a missing compiler is a failure; elsewhere it is a reason to skip."""
    problem = available()
    if problem and os.environ.get("METAL_HOST") == "required":
        pytest.fail(problem)
    if problem:
        pytest.skip(problem)


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[[str], contextmanager[Tally]]:
    """A kernel's tally of this test, on whose clock the context runs."""

    @contextmanager
    def running(kernel: str) -> Iterator[Tally]:
        entry, started = Tally(), time.monotonic()
        request.node.stash.setdefault(RAN, []).append((kernel, entry))
        try:
            yield entry
        finally:
            entry.seconds = time.monotonic() - started

    return running


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Tallies travel in the test's report, which may be made in another process than the summary."""
    if call.when == "call":
        item.user_properties += [("metal", (kernel, *astuple(entry))) for kernel, entry in item.stash.get(RAN, [])]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Adds up what the tests' reports carry, from whichever process ran them."""
    tallies: dict[str, Tally] = {}
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if getattr(report, "when", None) != "call":
            continue
        for kernel, cases, bugs, worst, seconds in (row for kind, row in report.user_properties if kind == "metal"):
            entry = tallies.setdefault(kernel, Tally())
            entry.cases, entry.bugs = entry.cases + cases, entry.bugs + bugs
            entry.worst, entry.seconds = max(entry.worst, worst), entry.seconds + seconds
    if not tallies:
        return
    terminalreporter.section("Metal texts on the host")
    terminalreporter.write_line(
        f"{'kernel':<20}{'cases':>6}{'worst error':>13}{'planted bugs caught':>21}{'seconds':>9}"
    )
    for kernel, t in sorted(tallies.items()):
        terminalreporter.write_line(f"{kernel:<20}{t.cases:>6}{t.worst:>13.1e}{t.bugs:>21}{t.seconds:>9.1f}")
