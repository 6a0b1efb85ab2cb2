"""The server as a process: what signals do to it, what it says as it starts, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import functools
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Callable

from router import event_loop
from router.catalog import Catalog, read_catalog, warn_of
from router.domain import RouterError
from router.lifecycle import Lifecycle
from router.refresh import Reader
from router.server import ListenError, RouterServer, build_backends
from router.settings import Settings, data_home

COLLECT_AFTER = (10_000, 20, 20)  # objects, and collections of the younger generations


def spare_the_collector() -> None:
    """Takes what has been loaded by now out of the garbage collector's sight, which would walk through it, for tens of
    milliseconds and with every stream waiting, again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)


async def run(
    settings: Settings, load: Callable[[], Settings], *, announce_json: bool = False, lifeline: int | None = None
) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends at once. SIGHUP looks for models again.

    Args:
        lifeline: the end of a pipe; the server drains when the other end is closed.

    Raises:
        ListenError: it cannot listen at its address.
    """
    pulled = data_home() / "models"
    catalog = await read_catalog(settings, pulled)
    warn_of(catalog.entries)
    lifecycle = Lifecycle(settings.scheduler)
    build = functools.partial(build_backends, lifecycle=lifecycle)
    reader = Reader(settings, load, pulled, build)
    server = RouterServer(settings.server, catalog, build(settings, catalog), reader, lifecycle, settings.resilience)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def cut_off(descriptor: int) -> None:
        loop.remove_reader(descriptor)
        stop.set()

    if lifeline is not None:
        loop.add_reader(lifeline, cut_off, lifeline)
    refreshes: set[asyncio.Task[None]] = set()

    def hang_up() -> None:
        task = asyncio.create_task(_refresh_quietly(server))
        refreshes.add(task)
        task.add_done_callback(refreshes.discard)

    if not _on_terminal():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to read again
    await server.start()
    # Of a terminal that was closed, the signal means what it says.
    loop.add_signal_handler(signal.SIGHUP, stop.set if _on_terminal() else hang_up)
    _announce(server.address, catalog, as_json=announce_json)
    spare_the_collector()
    await stop.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
        signal.signal(number, _end_at_once)
    for task in refreshes:
        task.cancel()
    await server.drain()


def _end_at_once(number: int, frame: object) -> None:
    """Ends the process without its threads, one of which may be in the middle of a slice of a load. llama.cpp children
    end by themselves once it is gone."""
    os.write(2, b"mtp-router: ended without draining\n")
    os._exit(128 + number)


def _on_terminal() -> bool:
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()


async def _refresh_quietly(server: RouterServer) -> None:
    with contextlib.suppress(RouterError):  # it is in the log
        await server.refresh()


def _announce(address: str, catalog: Catalog, *, as_json: bool) -> None:
    names = [entry.name for entry in catalog.entries]
    if as_json:
        line = json.dumps({"event": "listening", "address": address, "models": names})
    else:
        line = f"listening on {address}; models: {', '.join(names) or 'none (mtp-router pull smollm2 fetches one)'}"
    print(line, flush=True)


def serve(
    settings: Settings, load: Callable[[], Settings], *, announce_json: bool = False, lifeline: int | None = None
) -> int:
    """Runs the server in this process. Returns the exit status: 0 after a drain, 1 where it could not listen.

    Args:
        load: reads the settings again.
        lifeline: see `run`.
    """
    faulthandler.enable()  # an abort in native code tells in the log where it came from
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request to a child
    try:
        event_loop.run(run(settings, load, announce_json=announce_json, lifeline=lifeline))
    except ListenError as error:
        print(f"mtp-router: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mtp-router: ended without draining", file=sys.stderr)
        return 130
    return 0
