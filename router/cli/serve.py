"""`mtp-router serve`: runs the server."""

from __future__ import annotations

import argparse

from router.cli.connection import checked_settings
from router.settings import ServerSettings, Settings, load_settings
from router.supervise import supervised


def run(arguments: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT; the exit status is the server's."""

    def load() -> Settings:
        settings = load_settings(arguments.config)
        if arguments.listen is None:
            return settings
        server = ServerSettings(**{**settings.server.model_dump(), "listen": arguments.listen})
        return settings.model_copy(update={"server": server})

    settings = checked_settings(load)
    if arguments.supervise:
        return supervised(_options(arguments))
    from router.process import serve  # loads the backends, which no other command needs

    return serve(settings, load, announce_json=arguments.json, lifeline=arguments.lifeline)


def _options(arguments: argparse.Namespace) -> list[str]:
    """The same for the process that serves."""
    options = ["--json"] if arguments.json else []
    if arguments.config is not None:
        options += ["--config", str(arguments.config)]
    if arguments.listen is not None:
        options += ["--listen", arguments.listen]
    return options
