"""`mtp-router explain`: what would answer for a model now, and why."""

from __future__ import annotations

import argparse

from mtp_router.generate import v1

from router.cli.connection import connect
from router.cli.failures import FAILED, OK, one_line
from router.cli.output import json_line
from router.client import enum_name


def run(arguments: argparse.Namespace) -> int:
    """Asks the server; exit status 1 for a model that cannot be served."""
    with connect(arguments) as client:
        model = client.get_model(arguments.name)
    if arguments.json:
        print(json_line(model))
    elif model.problem:
        print(one_line(f"{model.name}: {model.problem}"))
    else:
        print(f"model:   {model.name}")
        print(f"backend: {model.route.backend} ({enum_name(v1.BackendKind, model.route.backend_kind)})")
        print(f"why:     {one_line(model.route.reason)}")
        if model.HasField("memory_bytes"):
            print(f"memory:  about {model.memory_bytes / 1e6:.0f} MB once loaded, every context full")
        if model.HasField("mtp_head"):
            print(f"head:    {_head(model.mtp_head)}")
        if model.mtp_head.warning:
            print(f"warning: {one_line(model.mtp_head.warning)}; `mtp-router verify` tells more")
    if model.fallbacks and not arguments.json:
        print(f"else:    {one_line(', then '.join(model.fallbacks))}")
    return FAILED if model.problem else OK


def _head(head: v1.MtpHead) -> str:
    """A head in a few words."""
    if not head.declared_layers and not head.present:
        return "none"
    present = "not told" if not head.HasField("present") else "present" if head.present else "absent or incomplete"
    where = f" ({'grafted, ' if head.grafted else ''}{head.place})" if head.place else ""
    return one_line(
        f"{head.declared_layers} layers declared, tensors {present}{where}, run by {head.driver or 'nothing'}"
    )
