"""`mtp-router serve`: runs the server."""

from __future__ import annotations

import argparse

from router.cli.connection import checked_settings
from router.settings import ServerSettings, Settings, load_settings


def run(arguments: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT; the exit status is the server's."""

    def load() -> Settings:
        settings = load_settings(arguments.config)
        if arguments.listen is None:
            return settings
        server = ServerSettings(**{**settings.server.model_dump(), "listen": arguments.listen})
        return settings.model_copy(update={"server": server})

    settings = checked_settings(load)
    from router.server import serve  # loads the backends, which no other command needs

    return serve(settings, load, announce_json=arguments.json)
