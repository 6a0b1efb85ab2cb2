"""`mtp-router models`: what the server can answer with."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from mtp_router.generate import v1
from rich.console import Console
from rich.table import Table
from rich.text import Text

from router.cli.connection import connect
from router.cli.failures import OK, one_line
from router.cli.output import head_warning, json_line
from router.client import enum_name

HEADINGS = ("model", "backend", "state", "context", "size", "capabilities")
MARKS = {v1.CAPABILITY_SUPPORT_SUPPORTED: "yes", v1.CAPABILITY_SUPPORT_UNSUPPORTED: "no"}


def run(arguments: argparse.Namespace) -> int:
    """Lists the models: a table on a terminal, tab-separated lines elsewhere."""
    with connect(arguments) as client:
        models = [client.get_model(arguments.name)] if arguments.name else list(client.list_models())
    if arguments.json:
        for model in models:
            print(json_line(model))
        return OK
    console = Console(highlight=False)
    if console.is_terminal:
        _print_table(models, console)
    else:
        for model in models:
            print("\t".join(_row(model)))
    if not models:
        print("no models; `mtp-router pull smollm2` fetches one, and `mtp-router refresh` tells the server")
    for model in models:
        for line in _remarks(model, evidence=arguments.evidence):
            console.print(Text(line), soft_wrap=True)
    return OK


def _print_table(models: Iterable[v1.Model], console: Console) -> None:
    table = Table(*HEADINGS, box=None, header_style="bold")
    for model in models:
        table.add_row(*(Text(cell) for cell in _row(model)))
    console.print(table)


def _row(model: v1.Model) -> tuple[str, ...]:
    names = model.name if not model.aliases else f"{model.name} ({', '.join(model.aliases)})"
    can = [report for report in model.capabilities if report.support == v1.CAPABILITY_SUPPORT_SUPPORTED]
    cells = (
        names,
        model.route.backend or "-",
        enum_name(v1.ModelState, model.state),
        str(model.context_length) if model.HasField("context_length") else "-",
        f"{model.size_bytes / 1e6:.0f} MB" if model.HasField("size_bytes") else "-",
        ", ".join(enum_name(v1.Capability, report.capability) for report in can) or "-",
    )
    return tuple(one_line(cell) for cell in cells)


def _remarks(model: v1.Model, *, evidence: bool) -> Iterable[str]:
    """What is wrong with a model, and on request the evidence for each capability."""
    if model.problem:
        yield one_line(f"{model.name}: {model.problem}")
    if (warning := head_warning(model)) is not None:
        yield warning
    if not evidence:
        return
    if model.route.reason:
        yield one_line(f"{model.name}: {model.route.reason}")
    if model.HasField("memory_bytes"):
        yield f"  in memory    about {model.memory_bytes / 1e6:.0f} MB once loaded, every context full"
    if model.fallbacks:
        yield "  fallbacks    " + one_line(", ".join(model.fallbacks))
    for report in model.capabilities:
        name = enum_name(v1.Capability, report.capability)
        yield f"  {name:<13}{MARKS.get(report.support, 'unknown'):<9}" + one_line(report.evidence)
