"""What hostile model files cost: outcome, processor time and peak memory of each, in a process of its own.

    make hostile

The corpus is that of the tests (tests/support/hostile.py); `mtp-router inspect` and the catalog read files as it does.
Ends with status 1 where a file was not refused that must be, or one was that must not.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from support.hostile import CASES, MARK, Case, good_checkpoint

from router.facts import read_facts


def main() -> int:
    parser = argparse.ArgumentParser(prog="make hostile", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one object a case")
    as_json = parser.parse_args().json
    logging.disable()
    with tempfile.TemporaryDirectory() as place:
        good = Path(place) / "good"
        in_child(lambda: good_checkpoint(good) and {})
        read_facts(good)  # whatever is imported or built once is paid for before the first case
        rows = [run(case, Path(place) / str(number), good) for number, case in enumerate(CASES)]
    for row in rows:
        print(json.dumps(row) if as_json else line(row), flush=True)
    wrong = [row["case"] for row in rows if not row["as_expected"]]
    summary = f"{len(rows)} files on {platform.machine()}, Python {platform.python_version()}: "
    summary += (
        f"slowest {max(row['seconds'] for row in rows):.2f} s, most memory {max(row['peak_mb'] for row in rows):.0f} MB"
    )
    print(summary + (f"; NOT AS EXPECTED: {', '.join(wrong)}" if wrong else ""), file=sys.stderr)
    return 1 if wrong else 0


def run(case: Case, folder: Path, good: Path) -> dict[str, Any]:
    """One case: written in one process, read in another."""
    folder.mkdir()
    path = Path(in_child(lambda: {"path": str(case.make(folder, good))})["path"])
    found = in_child(lambda: measured(path))
    ran = (folder / MARK).exists()
    refused = bool(found["problem"])
    return {
        "case": case.name,
        **found,
        "as_expected": refused == bool(case.says) and case.says in found["problem"] and not ran,
    }


def measured(path: Path) -> dict[str, Any]:
    """Reads the files at `path` twice: for outcome and processor time, and for the most MB that Python held at once."""
    begin = time.process_time()
    problem = read_facts(path).problem
    seconds = time.process_time() - begin
    tracemalloc.start()
    read_facts(path)
    _, peak = tracemalloc.get_traced_memory()
    return {"problem": problem, "seconds": round(seconds, 4), "peak_mb": round(peak / 1e6, 1)}


def in_child(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns in a forked process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(writing, json.dumps(work()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"a child ended with status {status}")
    return dict(json.loads(told))


def line(row: dict[str, Any]) -> str:
    outcome = f"refused: {row['problem']}" if row["problem"] else "served"
    mark = "" if row["as_expected"] else "  NOT AS EXPECTED"
    return f"{row['seconds']:8.4f} s {row['peak_mb']:7.1f} MB  {row['case']:<58} {outcome}{mark}"


if __name__ == "__main__":
    sys.exit(main())
