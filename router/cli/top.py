"""`mtp-router top`: what the server is doing, over and over until Ctrl-C."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import httpx
from mtp_router.generate import v1
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from router.cli.connection import connect, read_settings
from router.cli.failures import OK, UsageError, one_line
from router.cli.output import head_warning
from router.client import Client, enum_name

PREFIX = "mtp_router_"
Figures = Mapping[tuple[str, str], float]  # by metric and model


@dataclass(frozen=True, slots=True)
class Look:
    """One look at the server. `figures` is empty where its metrics page is off or was not asked."""

    when: float
    backends: tuple[v1.Backend, ...]
    models: tuple[v1.Model, ...]
    figures: Figures = field(default_factory=dict)


def run(arguments: argparse.Namespace) -> int:
    """Shows a table that renews itself on a terminal; elsewhere, and with --once, one look."""
    console = Console(highlight=False)
    page = _page(arguments)
    with connect(arguments) as client:
        before, look = None, _look(client, page)
        if arguments.once or not console.is_terminal:
            console.print(_screen(look, before, page))
            return OK
        with Live(_screen(look, before, page), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(arguments.interval)
                before, look = look, _look(client, page)
                live.update(_screen(look, before, page), refresh=True)


def _page(arguments: argparse.Namespace) -> str:
    """Address of the metrics page; "" where there is none."""
    address = arguments.metrics or (None if arguments.target else read_settings(arguments).server.metrics_listen)
    if address is None or (address.endswith(":0") and not arguments.metrics):
        return ""
    return address if "://" in address else f"http://{address}/metrics"


def _look(client: Client, page: str) -> Look:
    figures = _read(page) if page else {}
    return Look(time.monotonic(), tuple(client.list_backends()), tuple(client.list_models()), figures)


def _read(page: str) -> Figures:
    """Sums by model. Raises UsageError where the page cannot be read."""
    try:
        reply = httpx.get(page, timeout=5.0, trust_env=False)
        reply.raise_for_status()
        sums: dict[tuple[str, str], float] = {}
        for family in text_string_to_metric_families(reply.text):
            for sample in family.samples:
                key = sample.name.removeprefix(PREFIX), sample.labels.get("model", "")
                sums[key] = sums.get(key, 0.0) + sample.value
        return sums
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        raise UsageError(f"cannot read the metrics page at {one_line(page)}") from None


def _screen(look: Look, before: Look | None, page: str) -> Group:
    parts: list[Table | Text] = [_backends(look.backends), Text(), _models(look, before)]
    parts += [Text(warning) for model in look.models if (warning := head_warning(model)) is not None]
    if not page:
        parts.append(Text("for rates set server.metrics_listen, or name the page with --metrics", style="dim"))
    return Group(*parts)


def _backends(backends: Iterable[v1.Backend]) -> Table:
    table = Table("backend", "state", "running", "waiting", "restarts", "in memory", box=None, header_style="bold")
    for backend in backends:
        state = enum_name(v1.BackendState, backend.state)
        cells = (backend.name, state, str(backend.active_requests), str(backend.queued_requests))
        loaded = ", ".join(backend.loaded_models) or "-"
        table.add_row(*(Text(one_line(cell)) for cell in (*cells, str(backend.restarts), loaded)))
    return table


def _models(look: Look, before: Look | None) -> Table:
    headings = ("model", "state", "memory", "requests/s", "tokens/s", "first token", "accepted")
    table = Table(*headings, box=None, header_style="bold")
    for model in look.models:
        memory = f"{model.memory_bytes / 2**30:.2f} GiB" if model.HasField("memory_bytes") else "-"
        cells = (model.name, enum_name(v1.ModelState, model.state), memory, *_rates(model.name, look, before))
        table.add_row(*(Text(one_line(cell)) for cell in cells))
    return table


def _rates(name: str, look: Look, before: Look | None) -> tuple[str, str, str, str]:
    """Requests and tokens a second, mean seconds to the first token, share of accepted drafts; since the last look, or
    the server's start for the first."""

    def rise(metric: str) -> float:
        past = before.figures.get((metric, name), 0.0) if before else 0.0
        return look.figures.get((metric, name), 0.0) - past

    def share(part: str, whole: str, form: str) -> str:
        return form.format(rise(part) / rise(whole)) if rise(whole) else "-"

    first = share("time_to_first_token_seconds_sum", "time_to_first_token_seconds_count", "{:.3f} s")
    accepted = share("spec_decode_num_accepted_tokens_total", "spec_decode_num_draft_tokens_total", "{:.0%}")
    if before is None:
        return "-", "-", first, accepted
    seconds = look.when - before.when
    requests, tokens = rise("requests_total") / seconds, rise("generation_tokens_total") / seconds
    return f"{requests:.1f}", f"{tokens:.1f}", first, accepted
