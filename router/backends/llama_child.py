"""The process that runs llama.cpp: a script of its own, so that an abort in native code ends only this process.

It reads one line of JSON from stdin (the fields of `ChildConfig`), loads the model, serves llama-server's HTTP routes
on a free loopback port, and prints one line of JSON on stdout: {"address", "devices", "system"} or {"error"}. It ends
when stdin ends, which also happens when the parent dies of SIGKILL. Run by path, it imports nothing of this package.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ChildConfig:
    """What a child is started with. `draft_depth` 0: no drafting; `gpu_layers` -1: as many as fit."""

    model_path: str
    api_key: str
    context_length: int
    parallel: int
    batch_tokens: int
    threads: int
    gpu_layers: int
    draft_depth: int


def main() -> None:
    """Serves until the parent goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which drains first
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # native code may print, and stdout carries only the report
    config = ChildConfig(**json.loads(sys.stdin.readline()))
    _die_with_parent()
    try:
        _server, report = _serve(config)  # the server lives as long as the name
    except Exception as error:  # noqa: BLE001 - whatever went wrong, the parent must hear of it
        print(f"loading failed: {error}", file=sys.stderr, flush=True)
        print(json.dumps({"error": type(error).__name__}), file=reports, flush=True)
        os._exit(1)
    print(json.dumps(report), file=reports, flush=True)
    while os.read(0, 4096):
        pass
    os._exit(0)  # without tearing the server down: a running decode would hold that up


def _die_with_parent() -> None:
    """Lets the kernel end this process at the end of stdin: loading holds the interpreter's lock for minutes."""
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([0], [], [], 0)[0]:  # it ended before the signal was armed
        os._exit(0)


def _serve(config: ChildConfig) -> tuple[Any, dict[str, Any]]:
    import xllamacpp

    server = xllamacpp.Server(_parameters(xllamacpp, config))
    devices = [device["name"] for device in xllamacpp.get_device_info()]
    report = {"address": server.listening_address, "devices": devices, "system": xllamacpp.get_system_info()}
    return server, report


def _parameters(xllamacpp: Any, config: ChildConfig) -> Any:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = config.model_path
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    parameters.api_keys = [config.api_key]
    parameters.n_threads_http = config.parallel + 4  # streams hold one each; the rest answer health and token counts
    parameters.endpoint_slots = True
    parameters.ui = False
    parameters.offline = True
    # Slots have equal shares of the context: every request gets the whole length that was promised.
    parameters.n_ctx = config.context_length * config.parallel
    parameters.n_parallel = config.parallel
    parameters.kv_unified = False
    parameters.ctx_shift = False
    parameters.fit_params = config.gpu_layers < 0  # what is set stays as it is, so this fits the layers alone
    parameters.n_batch = parameters.n_ubatch = config.batch_tokens
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = config.threads
    parameters.n_gpu_layers = config.gpu_layers
    parameters.cache_ram_mib = 0  # the default keeps up to 8 GiB of prompts that no slot holds any more
    parameters.prefill_assistant = False  # a conversation that ends with the assistant gets a new turn
    if config.draft_depth:
        parameters.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        parameters.speculative.draft.n_max = config.draft_depth
    return parameters


if __name__ == "__main__":
    main()
