"""What the command line says when something fails: one line that names the reason and, where known, the way out."""

from __future__ import annotations

import json
from typing import Any

import grpc

from router.client import RouterCallError

OK, FAILED, USAGE = 0, 1, 2

CONTROL = dict.fromkeys((*range(0x20), *range(0x7F, 0xA0)))
# A terminal would obey the escape sequences that a model or a server may send.
SHOWN = {code: None for code in CONTROL if code not in (ord("\n"), ord("\t"))}


class UsageError(Exception):
    """The arguments or the settings are wrong; the message says which and why."""


def one_line(text: str) -> str:
    """Text for a person on one line, without control characters."""
    return " ".join(text.split()).translate(CONTROL)


def describe(error: RouterCallError, target: str, *, begun: bool = False) -> str:
    """A failed call in one line; `begun` tells that the server had begun to answer."""
    if error.code is grpc.StatusCode.UNAVAILABLE and not error.reason:
        if begun:
            return f"the server at {target} is gone; the text so far is a prefix, not the answer"
        return f"no server answers at {target}: none runs, or it is shutting down; `mtp-router serve` starts one"
    if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and not error.reason and "larger than max" in error.message:
        return f"the request is larger than the server at {target} takes; its settings say server.max_request_bytes"
    again = f"; try again in {error.retry_after:g} s" if error.retry_after is not None else ""
    return f"{error.reason or error.code.name}: {one_line(str(error))}{again}"


def as_json(error: RouterCallError) -> str:
    """A failed call as one JSON object."""
    body: dict[str, Any] = {
        "code": error.code.name,
        "reason": error.reason,
        "message": error.message,
        "metadata": error.metadata,
        "violations": [violation._asdict() for violation in error.violations],
        "retry_after": error.retry_after,
    }
    return json.dumps({"error": body})
