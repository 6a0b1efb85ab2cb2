"""`mtp-router serve`: runs the server."""

from __future__ import annotations

import argparse

from pydantic import ValidationError

from router.cli.connection import describe_settings, read_settings
from router.cli.failures import UsageError
from router.settings import ServerSettings, Settings


def run(arguments: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT; the exit status is the server's."""
    settings = read_settings(arguments)
    if arguments.listen is not None:
        settings = _listen_at(settings, arguments.listen)
    from router.server import serve  # loads the backends, which no other command needs

    return serve(settings, announce_json=arguments.json)


def _listen_at(settings: Settings, address: str) -> Settings:
    try:
        server = ServerSettings(**{**settings.server.model_dump(), "listen": address})
    except ValidationError as error:
        raise UsageError(describe_settings(error)) from None
    return settings.model_copy(update={"server": server})
