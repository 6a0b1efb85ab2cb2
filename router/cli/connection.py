"""Settings and the address of the server, as the arguments say."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from router.cli.failures import UsageError, one_line
from router.client import DEFAULT_DEADLINE, Client, RetryPolicy
from router.settings import Settings, describe_problem, load_settings

# A server may listen at every address of its host; a client needs one.
REACHED_AT = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}


def read_settings(arguments: argparse.Namespace) -> Settings:
    """The settings in force. Raises UsageError."""
    return checked_settings(lambda: load_settings(arguments.config))


def checked_settings(load: Callable[[], Settings]) -> Settings:
    """What `load` reads. Raises UsageError."""
    try:
        return load()
    except (OSError, ValueError) as error:  # of TOML and pydantic too
        raise UsageError(one_line(describe_problem(error))) from None


def find_target(arguments: argparse.Namespace) -> str:
    """The server's address: --target, else where the settings tell a server to listen. Raises UsageError."""
    if arguments.target is not None:
        return str(arguments.target)
    listen = read_settings(arguments).server.listen
    if listen.startswith("unix:"):
        return listen
    host, _, port = listen.rpartition(":")
    if int(port) == 0:
        raise UsageError("the settings let the server pick a free port; name it with --target HOST:PORT")
    return f"{REACHED_AT.get(host, host)}:{port}"


def connect(arguments: argparse.Namespace) -> Client:
    """A client of that server; `arguments.target` says where from here on, for messages."""
    arguments.target = find_target(arguments)
    # A person waits: half a second of retries, then say that there is no server.
    return Client(arguments.target, deadline=arguments.deadline or DEFAULT_DEADLINE, retry=RetryPolicy(attempts=3))
