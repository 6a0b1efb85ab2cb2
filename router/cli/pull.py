"""`mtp-router pull`: fetches a small model."""

from __future__ import annotations

import argparse
import json
import sys

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from router.cli.failures import OK, UsageError
from router.pull import PULLABLE, PullableModel, Pulled, pull
from router.settings import data_home


def run(arguments: argparse.Namespace) -> int:
    """Fetches the model unless it is there already."""
    model = PULLABLE.get(arguments.name)
    if model is None:
        known = "; ".join(f"{entry.name} ({entry.size / 1e6:.0f} MB, {entry.license})" for entry in PULLABLE.values())
        raise UsageError(f"cannot pull {arguments.name!r}; there are: {known}")
    pulled = _pull_with_bar(model)
    if arguments.json:
        print(json.dumps({"model": model.name, "path": str(pulled.path), "fetched": pulled.fetched}))
    else:
        print(f"{model.name}: {'fetched to' if pulled.fetched else 'already there, sha256 checked:'} {pulled.path}")
    return OK


def _pull_with_bar(model: PullableModel) -> Pulled:
    """Pulls with a progress bar on standard error where that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(f"pulling {model.name}", total=None)
        return pull(model, data_home() / "models", lambda done, total: bar.update(task, completed=done, total=total))
