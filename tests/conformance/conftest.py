"""Collects what each conformance test established and prints it as two tables."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_mtp_backend.families.base import Model
from mlx_mtp_backend.synthetic import Recipe, write
from tests.conformance import decode
from tests.support.conversion import convert

ON_GPU = mx.default_device().type == mx.gpu
if not ON_GPU:
    mx.disable_compile()  # as the engine does there


@pytest.fixture
def establish(request: pytest.FixtureRequest) -> Callable[[str, str, int, str], None]:
    """establish(promise, what was checked, number of cases, worst figure)."""
    return lambda *row: request.node.user_properties.append(("promise", row))


@pytest.fixture
def caught(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """caught(planted bug, the check that failed)."""
    return lambda *row: request.node.user_properties.append(("bug", row))


def _table(terminal: pytest.TerminalReporter, title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    if not rows:
        return
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    terminal.section(title)
    for row in (head, tuple("-" * width for width in widths), *rows):
        terminal.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the tests told travels in their reports, from whichever process ran them."""
    told = [
        pair
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for pair in report.user_properties
    ]
    promises = sorted(tuple(str(cell) for cell in row) for kind, row in told if kind == "promise")
    bugs = sorted(tuple(row) for kind, row in told if kind == "bug")
    _table(terminalreporter, "conformance", ("promise", "checked", "cases", "worst figure"), promises)
    _table(terminalreporter, "planted bugs", ("bug", "caught by"), bugs)


# On a GPU, one that the kernels take.
SHAPE = {"hidden": 256, "width": 384, "head_dim": 256, "linear_dim": 128} if ON_GPU else {}


@pytest.fixture(scope="session")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; logits depend on every token before."""
    return write(tmp_path_factory.mktemp("history"), Recipe(kind="history", **SHAPE))


@pytest.fixture(scope="session")
def history_model(history: Path) -> Model:
    return decode.load(history)


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Likewise, of mixtures of experts."""
    shape = SHAPE | {"width": 768} if ON_GPU else {}
    return write(tmp_path_factory.mktemp("experts"), Recipe(kind="history", experts=8, **shape))


@pytest.fixture(scope="session")
def quantised_experts(experts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as mlx-lm converts it, the head beside it: 4 bits, 8 for the routers."""
    return convert(experts, tmp_path_factory.mktemp("quantised"))
