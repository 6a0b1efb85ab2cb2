"""`mtp-router verify`: whether a checkpoint keeps the promises on this machine, in one report; needs no server."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from mlx_mtp_backend import EngineError
from mlx_mtp_backend.decode.verification import Verification, verify
from router.cli import INTERRUPTED
from router.cli.failures import FAILED, OK, UsageError, one_line
from router.settings import data_home

MARKS = {True: "yes", False: "NO", None: "-"}


def run(arguments: argparse.Namespace) -> int:
    """Prints the report; exit status 1 where a promise does not hold or the checkpoint cannot be served."""
    path: Path = arguments.path
    if not path.is_dir():
        raise UsageError(f"{path} is no folder; verify takes a checkpoint folder, which the MLX engine runs")

    def tell(what: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)

    try:
        with _interruptible():
            report = verify(
                path,
                head_path=arguments.head,
                tokens=arguments.tokens,
                kernel_checks=data_home() / "kernel-checks.json",
                interpose_blas=arguments.openblas,
                on_progress=tell,
            )
    except EngineError as error:
        if arguments.json:
            print(json.dumps({"passed": False, "error": {"reason": error.reason.value, "message": error.detail}}))
        else:
            print(one_line(f"{path}: {error.reason.value}: {error.detail}"))
        return FAILED
    finally:
        tell("")
    print(json.dumps(report.to_json(), ensure_ascii=False) if arguments.json else "\n".join(lines(report)))
    return OK if report.passed else FAILED


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends the process at once. Else it would wait for the engine's thread, which does not stop in the middle of
    a slice of a load, and which cannot be left behind either: MLX aborts where it outlives the interpreter."""

    def leave(*_: object) -> None:
        if sys.stderr.isatty():
            os.write(sys.stderr.fileno(), b"\r\033[K")
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def lines(report: Verification) -> list[str]:
    """The report for a person."""
    loaded, plain = report.loaded, report.runs[0]
    return [
        one_line(f"{report.model}: {loaded.report.family}, {loaded.weight_bytes / 1e9:.2f} GB of weights"),
        *(f"  {name:<10} {value}" for name, value in report.system.items()),
        f"  {'bits by':<10} {one_line(loaded.fingerprint)}",
        "",
        *(f"{MARKS[v.holds]:<4}{v.promise}: {one_line(v.evidence)}" for v in report.verdicts),
        "",
        "depth  tokens/s  over plain  tokens/round  drafts kept",
        *(
            f"{r.depth:>5}  {r.tokens_per_second:>8.1f}  {r.tokens_per_second / plain.tokens_per_second:>10.2f}  "
            f"{r.tokens_per_round:>12.2f}  {' '.join(f'{share:.0%}' for share in r.accepted)}".rstrip()
            for r in report.runs
        ),
        f"fastest at depth {report.fastest.depth}; {plain.tokens} tokens a reply, temperature 0.6, top-p 0.95",
    ]
