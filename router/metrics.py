"""Figures for Prometheus. After the prefix, their names are those of vLLM and llama.cpp where these have them too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from router.domain import BackendState, BackendStatus, Delta, Finished
from router.lifecycle import Lifecycle
from router.resilience import BreakerState, Resilience
from router.scheduler import Phase

PREFIX = "mtp_router"
SNAPSHOT_TIMEOUT = 2.0  # seconds that a scrape waits for the event loop
# Seconds: from what a cached prompt takes to what a long prefill does.
LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
GAPS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 10)
WHO = ("model", "backend")


Labelled = Mapping[tuple[str, ...], float]  # values by the labels' values


@dataclass(frozen=True, slots=True)
class Gauge:
    """A figure that is read when it is asked for."""

    name: str
    help: str
    labels: tuple[str, ...]
    values: Labelled


class Pieces:
    """Times the pieces of one answer. Made by `Metrics.pieces`."""

    def __init__(self, gaps: Histogram) -> None:
        self._gaps = gaps
        self._gap: Histogram | None = None
        self._last = 0.0

    def came(self, who: tuple[str, str], delta: Delta, now: float) -> None:
        """A piece came; its time is shared out over its tokens."""
        if self._gap is None:
            self._gap = self._gaps.labels(*who)
        else:
            self._gap.observe((now - self._last) / (delta.token_count or 1))
        self._last = now


class Metrics:
    """Counters and histograms of one server.

    Args:
        gauges: reads what stands now; called on the event loop.
    """

    def __init__(self, gauges: Callable[[], list[Gauge]] = list) -> None:
        self.registry = CollectorRegistry()
        self._gauges = gauges
        self._requests = self._counter("requests", "Requests by how they ended.", *WHO, "outcome")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens of finished requests.", *WHO)
        self._cached = self._counter("prompt_tokens_cached", "Those of them that a prefix cache had.", *WHO)
        self._output = self._counter("generation_tokens", "Tokens generated.", *WHO)
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", LATENCIES)
        self._gap = self._histogram("inter_token_latency_seconds", "Between pieces of an answer, by token.", GAPS)
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival to the end.", LATENCIES)
        self._queue = self._histogram("request_queue_time_seconds", "Waiting for a place.", LATENCIES)
        self._load = self._histogram("request_load_time_seconds", "Waiting for the model to load.", LATENCIES)
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Tokens drafted.", *WHO)
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Drafted tokens accepted.", *WHO)
        self._drafted_at = self._counter(
            "spec_decode_num_draft_tokens_per_pos", "Tokens drafted, by position.", *WHO, "position"
        )
        self._accepted_at = self._counter(
            "spec_decode_num_accepted_tokens_per_pos", "Drafted tokens accepted, by position.", *WHO, "position"
        )
        self._retries = self._counter("retries", "Requests tried again before their first token.", "backend")
        self._breaker = self._counter("cb_transitions", "Circuit breakers' changes of state.", "backend", "to")
        self._merged = self._counter("merged_deltas", "Deltas that waited for their reader and were merged.")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, WHO, buckets=buckets, registry=self.registry)

    def noted(self, what: str, backend: str) -> None:
        """A retry, or a breaker's new state (see `Resilience`)."""
        if what == "retry":
            self._retries.labels(backend).inc()
        else:
            self._breaker.labels(backend, what).inc()

    def merged(self, deltas: int) -> None:
        """Deltas were merged into others."""
        self._merged.inc(deltas)

    def pieces(self) -> Pieces:
        """For one answer."""
        return Pieces(self._gap)

    def ended(
        self, who: tuple[str, str], outcome: str, seconds: float, queue: float, load: float, first_token: float
    ) -> None:
        """A request ended, in whatever way; `first_token` 0: there was none."""
        self._requests.labels(*who, outcome).inc()
        self._whole.labels(*who).observe(seconds)
        self._queue.labels(*who).observe(queue)
        self._load.labels(*who).observe(load)
        if first_token:
            self._first.labels(*who).observe(first_token)

    def refused(self, outcome: str) -> None:
        """A request came to no backend."""
        self._requests.labels("", "", outcome).inc()

    def finished(self, who: tuple[str, str], event: Finished) -> None:
        """An answer is complete."""
        usage, drafts = event.usage, event.speculation
        self._prompt.labels(*who).inc(usage.prompt_tokens)
        self._cached.labels(*who).inc(usage.cached_tokens)
        self._output.labels(*who).inc(usage.output_tokens)
        self._drafted.labels(*who).inc(drafts.drafted_tokens)
        self._accepted.labels(*who).inc(drafts.accepted_tokens)
        for position, (drafted, accepted) in enumerate(drafts.positions):
            self._drafted_at.labels(*who, str(position)).inc(drafted)
            self._accepted_at.labels(*who, str(position)).inc(accepted)

    def read_gauges(self) -> list[Gauge]:
        """What stands now."""
        return self._gauges()


def gauges(backends: Iterable[BackendStatus], lifecycle: Lifecycle | None, resilience: Resilience) -> list[Gauge]:
    """What stands now of backends, models and breakers."""
    statuses = list(backends)

    def of_each(name: str, text: str, value: Callable[[BackendStatus], float]) -> Gauge:
        return Gauge(name, text, ("backend",), {(status.name,): float(value(status)) for status in statuses})

    read = [
        of_each("num_requests_running", "Requests that run.", lambda status: status.active_requests),
        of_each("num_requests_waiting", "Requests that wait.", lambda status: status.queued_requests),
        of_each("backend_up", "Whether it takes requests.", lambda status: status.state is BackendState.READY),
        of_each("backend_restarts", "Restarts after a fault.", lambda status: status.restarts),
        of_each("models_loaded", "Models in memory.", lambda status: len(status.loaded_models)),
    ]
    suspect: Labelled = {(name, status.name): 1.0 for status in statuses for name in status.suspect_heads}
    read.append(Gauge("model_suspect_head", "1 for a model whose prediction head looks wrong.", WHO, suspect))
    states: Labelled = {(name,): float(BREAKER[state]) for name, state in resilience.states().items()}
    read.append(Gauge("cb_state", "Circuit breaker: 0 closed, 1 half open, 2 open.", ("backend",), states))
    if lifecycle is not None:
        read += _of_models(lifecycle)
    return read


BREAKER = {BreakerState.CLOSED: 0, BreakerState.HALF_OPEN: 1, BreakerState.OPEN: 2}


def _of_models(lifecycle: Lifecycle) -> Iterator[Gauge]:
    scheduler = lifecycle.scheduler
    models = [model for model in scheduler.models.values() if model.terms.loads]
    phases: Labelled = {(*_who(model.name), model.phase.value): 1.0 for model in models}
    yield Gauge("model_state", "1 for the state that a model is in.", (*WHO, "state"), phases)
    held: Labelled = {_who(model.name): float(model.terms.memory) for model in models if model.phase is not Phase.COLD}
    yield Gauge("model_memory_bytes", "Memory reckoned for a loaded model.", WHO, held)
    yield Gauge(
        "memory_footprint_bytes",
        "Memory of the router and its children, as measured.",
        (),
        {(): float(lifecycle.footprint())},
    )
    if scheduler.rules.budget is not None:
        yield Gauge("memory_budget_bytes", "Memory for all models.", (), {(): float(scheduler.rules.budget)})
    yield Gauge("model_loads", "Loads so far.", (), {(): float(lifecycle.loads)})
    yield Gauge("model_evictions", "Models dropped for others so far.", (), {(): float(scheduler.evictions)})


def _who(seat: str) -> tuple[str, str]:
    """Model and backend of a seat "backend/model"; only the model's name may have a slash."""
    backend, _, model = seat.partition("/")
    return model, backend


class _Now(Collector):
    """Reads the gauges on the event loop, wherever it is asked."""

    def __init__(self, metrics: Metrics, loop: asyncio.AbstractEventLoop) -> None:
        self._metrics = metrics
        self._loop = loop

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Nothing: the registry need not ask at registration, on the loop's own thread."""
        return iter(())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        async def read() -> list[Gauge]:
            return self._metrics.read_gauges()

        gauges = asyncio.run_coroutine_threadsafe(read(), self._loop).result(SNAPSHOT_TIMEOUT)
        for gauge in gauges:
            family = GaugeMetricFamily(f"{PREFIX}_{gauge.name}", gauge.help, labels=gauge.labels)
            for labels, value in gauge.values.items():
                family.add_metric(labels, value)
            yield family


class MetricsServer:
    """The page `/metrics`, on a thread of its own.

    Args:
        listen: host:port; port 0 picks a free one, which `address` tells.

    Raises:
        OSError: it cannot listen there.
    """

    def __init__(self, metrics: Metrics, listen: str) -> None:
        host, _, port = listen.rpartition(":")
        metrics.registry.register(_Now(metrics, asyncio.get_running_loop()))
        self._server: WSGIServer
        self._server, self._thread = start_http_server(int(port), host.strip("[]"), metrics.registry)
        self.address = f"{host}:{self._server.server_port}"

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
