"""Defaults of a channel: deadline, keepalive, message sizes and retries. Each can be overridden by its name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT_TARGET = "127.0.0.1:50061"
DEFAULT_DEADLINE = 600.0  # seconds; the server's own default

_SERVICES = "mtp_router.generate.v1"
# Repeating any of these is safe: generation keeps no state, loading and unloading only reach a state.
RETRIED_METHODS = (
    "GenerateService/Generate",
    "GenerateService/StreamGenerate",
    "GenerateService/CountTokens",
    "ModelService/ListModels",
    "ModelService/GetModel",
    "AdminService/PreloadModel",
    "AdminService/UnloadModel",
    "AdminService/ListBackends",
    "AdminService/RefreshModels",
)

MIB = 2**20
DEFAULT_OPTIONS: dict[str, int | str] = {
    # A silent prefill can last minutes: ping through it, no oftener than servers allow, and only while calls run.
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 20_000,
    "grpc.keepalive_permit_without_calls": 0,
    "grpc.http2.max_pings_without_data": 0,
    # A whole answer with 20 log-probabilities a token passes gRPC's default of 4 MiB.
    "grpc.max_receive_message_length": 64 * MIB,
    # A request longer than this buffer (256 KiB by default) would not be retried.
    "grpc.per_rpc_retry_buffer_size": 8 * MIB,
    # The router is an internal service: a proxy meant for the web would break even 127.0.0.1.
    "grpc.enable_http_proxy": 0,
}


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Retries of UNAVAILABLE, and of a server's CANCELLED, by the channel, and only until the first message of an
    answer (gRPC proposal A6).

    Attributes:
        attempts: most attempts, the first one included; 2 to 5 (gRPC goes no higher).
        initial_backoff: seconds before the first retry, give or take a fifth.
        max_backoff: longest wait between attempts, seconds.
        multiplier: of the wait from one retry to the next.
        max_tokens: retries pause while failures have used up half of these tokens, so that a fleet of clients does not
            keep a struggling server down (1 to 1000).
        token_ratio: tokens that a success gives back.
    """

    attempts: int = 5
    initial_backoff: float = 0.2
    max_backoff: float = 2.0
    multiplier: float = 2.0
    max_tokens: int = 20
    token_ratio: float = 0.1

    def __post_init__(self) -> None:
        # gRPC core ignores an invalid service config with no more than a log line.
        if not 2 <= self.attempts <= 5:
            raise ValueError("attempts must be 2 to 5; retry=None switches retries off")
        if min(self.initial_backoff, self.max_backoff, self.multiplier, self.token_ratio) <= 0:
            raise ValueError("initial_backoff, max_backoff, multiplier and token_ratio must be above 0")
        if not 1 <= self.max_tokens <= 1000:
            raise ValueError("max_tokens must be 1 to 1000")

    def service_config(self) -> dict[str, Any]:
        """The gRPC service config that asks for these retries, by method."""
        names = [dict(zip(("service", "method"), name.split("/"), strict=True)) for name in RETRIED_METHODS]
        return {
            "methodConfig": [
                {
                    "name": [{**name, "service": f"{_SERVICES}.{name['service']}"} for name in names],
                    "retryPolicy": {
                        "maxAttempts": self.attempts,
                        "initialBackoff": f"{self.initial_backoff:.9f}s",
                        "maxBackoff": f"{self.max_backoff:.9f}s",
                        "backoffMultiplier": self.multiplier,
                        # The second comes from a server that shuts down before it has looked at the call.
                        "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
                    },
                }
            ],
            "retryThrottling": {"maxTokens": self.max_tokens, "tokenRatio": self.token_ratio},
        }


DEFAULT_RETRY = RetryPolicy()


def channel_options(
    retry: RetryPolicy | None, overrides: Mapping[str, int | str | None] | None
) -> list[tuple[str, int | str]]:
    """Options for a gRPC channel.

    Args:
        retry: None switches retries off.
        overrides: gRPC core options by name that replace or extend the defaults; None takes a default away.
    """
    options: dict[str, int | str | None] = {**DEFAULT_OPTIONS, "grpc.enable_retries": int(retry is not None)}
    if retry is not None:
        options["grpc.service_config"] = json.dumps(retry.service_config())
    options.update(overrides or {})
    return [(name, value) for name, value in options.items() if value is not None]
