"""Refuses or skips where clang is absent, and prints what each kernel's checks found."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.metal_host.host import available


@dataclass
class Tally:
    """What ran for one kernel."""

    cases: int = 0
    bugs: int = 0
    worst: float = 0.0
    seconds: float = 0.0


TALLIES: dict[str, Tally] = {}


@pytest.fixture(scope="session", autouse=True)
def compiler() -> None:
    """Where METAL_HOST=required, as in CI, a missing compiler is a failure; elsewhere it is a reason to skip."""
    problem = available()
    if problem and os.environ.get("METAL_HOST") == "required":
        pytest.fail(problem)
    if problem:
        pytest.skip(problem)


@pytest.fixture
def tally() -> Callable[[str], contextmanager[Tally]]:
    """A kernel's tally, on whose clock the context runs."""

    @contextmanager
    def running(kernel: str) -> Iterator[Tally]:
        entry, started = TALLIES.setdefault(kernel, Tally()), time.monotonic()
        try:
            yield entry
        finally:
            entry.seconds += time.monotonic() - started

    return running


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not TALLIES:
        return
    terminalreporter.section("Metal texts on the host")
    terminalreporter.write_line(
        f"{'kernel':<20}{'cases':>6}{'worst error':>13}{'planted bugs caught':>21}{'seconds':>9}"
    )
    for kernel, t in sorted(TALLIES.items()):
        terminalreporter.write_line(f"{kernel:<20}{t.cases:>6}{t.worst:>13.1e}{t.bugs:>21}{t.seconds:>9.1f}")
