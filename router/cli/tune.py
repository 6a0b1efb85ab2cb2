"""`mtp-router tune`: measures a model's step through the Metal kernels on this Mac; needs no server."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from mlx_mtp_backend import EngineError
from mlx_mtp_backend.load.tuning import Tuned, TuningRefused, tune
from router.cli.failures import FAILED, OK, UsageError, one_line
from router.settings import data_home


def run(arguments: argparse.Namespace) -> int:
    """Prints what was measured; exit status 1 where nothing could be."""
    path: Path = arguments.path
    if not path.is_dir():
        raise UsageError(f"{path} is no folder; tune takes a checkpoint folder, which the MLX engine runs")

    def tell(what: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)

    try:
        tuned = tune(path, data_home() / "kernel-checks.json", head_path=arguments.head, on_progress=tell)
    except (TuningRefused, EngineError, OSError) as error:
        why = f"what was measured cannot be saved: {error}" if isinstance(error, OSError) else str(error)
        if arguments.json:
            print(json.dumps({"saved": False, "error": {"message": why}}))
        else:
            print(one_line(f"{path}: {why}"))
        return FAILED
    finally:
        tell("")
    print(json.dumps(fields(tuned)) if arguments.json else "\n".join(lines(tuned)))
    return OK


def lines(tuned: Tuned) -> list[str]:
    """The report for a person."""
    report = [f"{tuned.model} on {tuned.device}: {tuned.trials} trials of {len(tuned.products)} products", ""]
    if tuned.best is None:
        return [*report, "the kernels failed their checks here; stock operations stay, nothing was saved"]
    report.append("rows  stock ms  kernels ms  gain")
    for rows, stock in tuned.stock.items():
        kernels = tuned.best.seconds[rows]
        report.append(f"{rows:>4}  {1e3 * stock:>8.2f}  {1e3 * kernels:>10.2f}  {stock / kernels:>4.2f}")
    verdict = "saved: the kernels run from the next start of the server on" if tuned.saved else (
        "not saved: the kernels are no clear gain at every number of rows; stock operations stay"
    )  # fmt: skip
    return [*report, "", verdict]


def fields(tuned: Tuned) -> dict[str, object]:
    """The report for a program."""
    best = tuned.best and {
        "variants": {product: dataclasses.asdict(variant) for product, variant in tuned.best.variants.items()},
        "seconds": dict(tuned.best.seconds),
    }
    return {**{f.name: getattr(tuned, f.name) for f in dataclasses.fields(tuned)}, "best": best}
