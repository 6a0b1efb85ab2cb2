"""`mtp-router doctor`: what this machine offers the service, what is wrong, and what to do about it."""

from __future__ import annotations

import argparse
import json

from router.cli.connection import find_target, read_settings
from router.cli.failures import FAILED, OK, UsageError, one_line
from router.doctor import Finding, diagnose


def run(arguments: argparse.Namespace) -> int:
    """Prints every finding; exit status 1 where one is a problem."""
    settings = read_settings(arguments)
    try:
        target = find_target(arguments)
    except UsageError:  # the server picks its port: nothing to look for
        target = None
    diagnosis = diagnose(settings, target)
    if arguments.json:
        print(json.dumps(diagnosis.to_json(), ensure_ascii=False))
    else:
        print("\n".join(_line(finding) for finding in diagnosis.findings))
    return OK if diagnosis.healthy else FAILED


def _line(finding: Finding) -> str:
    advice = f"  -> {one_line(finding.advice)}" if finding.advice else ""
    return f"{finding.state.value:<8} {finding.area:<18} {one_line(finding.what)}{advice}"
