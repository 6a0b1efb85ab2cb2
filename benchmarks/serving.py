"""The engine on this machine: a long chat's second turn, a long prompt beside short replies.

    python benchmarks/serving.py [turn] [gap] [--json FILE]

Synthetic checkpoints on MLX's default device, stock BLAS: the text means nothing, layers cost what layers of that size
cost. Everything is compared within one run; read ratios, not rates. Streams that decode together: benchmarks/engine.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]


from mlx_mtp_backend import (  # noqa: E402
    Delta,
    Engine,
    EngineOptions,
    Finished,
    GenerateParams,
    LoadOptions,
    Sampling,
    WiringPolicy,
)
from mlx_mtp_backend.stream import Stream  # noqa: E402
from mlx_mtp_backend.synthetic import Recipe, write  # noqa: E402

SAMPLING = Sampling(0.6, top_k=20, top_p=0.95)
Row = dict[str, Any]


def params(prompt: tuple[int, ...], tokens: int, *, depth: int | None, seed: int | None = 1) -> GenerateParams:
    return GenerateParams("model", prompt, tokens, SAMPLING, seed, depth, ignore_eos=True)


def finish(stream: Stream) -> tuple[tuple[int, ...], Finished]:
    events = list(stream)
    end = events[-1]
    assert isinstance(end, Finished)
    return tuple(token for event in events if isinstance(event, Delta) for token in event.tokens), end


def second_turn(folder: Path, options: argparse.Namespace) -> Row:
    """Time to the first token of a chat's second turn over that of its first, on a hybrid model."""
    path = write(folder / "history", Recipe(kind="history", context=1 << 16))
    prompt = tuple((41 * i + 7) % 690 for i in range(options.prompt))
    with Engine() as engine, Engine(EngineOptions(prefix_cache_bytes=0)) as cold:
        for one in (engine, cold):
            one.load("model", path, LoadOptions(wiring=WiringPolicy.OFF)).result()
        reply, first = finish(engine.submit(params(prompt, 64, depth=None)))
        turn = (*prompt, *reply, *(tuple(range(100, 160))))
        warm_reply, second = finish(engine.submit(params(turn, 64, depth=None)))
        cold_reply, anew = finish(cold.submit(params(turn, 64, depth=None)))
    return {
        "prompt_tokens": [first.statistics.prompt_tokens, second.statistics.prompt_tokens],
        "cached_tokens": second.statistics.cached_tokens,
        "first_seconds": first.statistics.seconds_prefill,
        "second_seconds": second.statistics.seconds_prefill,
        "second_cold_seconds": anew.statistics.seconds_prefill,
        "second_over_first": second.statistics.seconds_prefill / first.statistics.seconds_prefill,
        "same_tokens_as_cold": warm_reply == cold_reply,
    }


def longest_gap(folder: Path, options: argparse.Namespace) -> Row:
    """The longest silence of four decoding streams while a long prompt is read, in prefill chunks of that time."""
    path = write(folder / "gap", Recipe(kind="history", context=1 << 16))
    prompt = tuple((41 * i + 7) % 690 for i in range(options.long_prompt))
    chunk = LoadOptions().prefill_chunk
    with Engine(EngineOptions(stream_buffer=1 << 20)) as engine:
        engine.load("model", path, LoadOptions(wiring=WiringPolicy.OFF)).result()
        streams = [engine.submit(params(tuple(range(n, n + 30)), 4000, depth=None, seed=n)) for n in range(1, 5)]
        heard: list[list[float]] = [[] for _ in streams]
        long: Stream | None = None
        end: Finished | None = None
        while end is None:
            for stream, times in zip(streams, heard, strict=True):
                if any(isinstance(event, Delta) for event in stream.read()):
                    times.append(time.perf_counter())
            if long is None and all(len(times) > 50 for times in heard):
                long, began = engine.submit(params(prompt, 4, depth=None)), time.perf_counter()
            if long is not None:
                end = next((event for event in long.read() if isinstance(event, Finished)), None)
            time.sleep(0.0005)
        ended = time.perf_counter()
        for stream in streams:
            stream.cancel()
    during = [[t for t in times if began <= t <= ended] for times in heard]
    gap = max(after - before for times in during for before, after in itertools.pairwise(times))
    chunks = -(-len(prompt) // chunk)
    # One round goes by between two chunks; the last chunks, over the longest context, take longest.
    return {
        "prompt_tokens": len(prompt),
        "chunks": chunks,
        "prefill_seconds": end.statistics.seconds_prefill,
        "rounds_heard": min(len(times) for times in during),
        "longest_gap_seconds": gap,
        "gap_in_mean_chunks": gap / (end.statistics.seconds_prefill / chunks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], "turn", "gap"], help="all of them by default")
    parser.add_argument("--prompt", type=int, default=8000, help="tokens of the first turn")
    parser.add_argument("--long-prompt", type=int, default=30_000)
    parser.add_argument("--json", type=Path, help="write everything measured here")
    options = parser.parse_args()
    parts = options.parts or ["turn", "gap"]
    results: dict[str, Any] = {"machine": platform.machine(), "options": vars(options)}
    with tempfile.TemporaryDirectory() as folder:
        for part, measure in (("turn", second_turn), ("gap", longest_gap)):
            if part in parts:
                results[part] = measure(Path(folder), options)
                for key, value in results[part].items():
                    print(f"  {key}: {value}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1, default=str))


if __name__ == "__main__":
    main()
