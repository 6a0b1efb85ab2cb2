"""`mtp-router refresh`: has the server look for models again."""

from __future__ import annotations

import argparse

from router.cli.connection import connect
from router.cli.failures import OK, one_line
from router.cli.output import json_line


def run(arguments: argparse.Namespace) -> int:
    """Prints what is different now."""
    with connect(arguments) as client:
        done = client.refresh()
    if arguments.json:
        print(json_line(done))
        return OK
    parts = {
        "added": done.added,
        "removed": done.removed,
        "changed": done.changed,
        "in use and so left as they were": done.kept,
        "take a restart": done.needs_restart,
    }
    for what, names in parts.items():
        if names:
            print(one_line(f"{what}: {', '.join(names)}"))
    if not any(parts.values()):
        print("nothing has changed")
    return OK
