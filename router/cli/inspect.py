"""`mtp-router inspect`: what a model's files show of themselves; needs no server and reads no weights."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_mtp_backend import EngineError, inspect_checkpoint
from router.cli.failures import FAILED, OK, UsageError, one_line
from router.domain import ModelFacts, ModelFormat
from router.facts import read_facts


def run(arguments: argparse.Namespace) -> int:
    """Prints the facts; exit status 1 for files that cannot be served."""
    path: Path = arguments.path
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    facts = read_facts(path, arguments.head)
    if arguments.json:
        print(json.dumps(_plain(facts, path, arguments.head), ensure_ascii=False))
    else:
        print("\n".join(_lines(facts, path)))
    return FAILED if facts.problem else OK


def _plain(facts: ModelFacts, path: Path, head: Path | None) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "path": str(path),
        "format": facts.format.value,
        "architecture": facts.architecture,
        "quantization": facts.quantization,
        "context_length": facts.context_length,
        "size_bytes": facts.size_bytes,
        "cache_bytes_per_token": facts.cache_bytes,
        "mtp_head": None if facts.head is None else asdict(facts.head),
        "problem": facts.problem,
        "capabilities": {
            capability.value: {"supported": fact.supported, "evidence": fact.evidence}
            for capability, fact in facts.capabilities.items()
        },
    }
    if facts.format is ModelFormat.CHECKPOINT:
        try:
            plain["checkpoint"] = inspect_checkpoint(path, head).to_json()
        except EngineError:  # `problem` says what is wrong
            plain["checkpoint"] = None
    return plain


def _lines(facts: ModelFacts, path: Path) -> list[str]:
    if facts.problem:
        return [one_line(f"{path}: cannot be served: {facts.problem}")]
    size = f"{facts.size_bytes / 1e6:.1f} MB" if facts.size_bytes is not None else "size not known"
    cache = f", {facts.cache_bytes / 1e3:.1f} kB of cache a token" if facts.cache_bytes is not None else ""
    experts = "" if facts.experts is None else ", {} experts a layer, {} a token".format(*facts.experts)
    marks = {True: "yes", False: "no", None: "unknown"}
    return [
        one_line(
            f"{path}: {facts.architecture} {facts.format.value}{experts}, "
            f"quantization {facts.quantization or 'not known'}, {size}, "
            f"context {facts.context_length or 'not known'}{cache}"
        ),
        *(
            f"  {capability.value:<13} {marks[fact.supported]:<8} {one_line(fact.evidence)}"
            for capability, fact in facts.capabilities.items()
        ),
    ]
