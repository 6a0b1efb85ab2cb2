"""The engine on this machine: many streams, a long chat's second turn, a long prompt beside short replies.

    python benchmarks/serving.py [streams] [turn] [gap] [--json FILE]

Synthetic checkpoints on MLX's default device, stock BLAS: the text means nothing, layers cost what layers of that size
cost. Everything is compared within one run, plain and drafting in turn; read ratios, not rates.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import mlx.core as mx  # noqa: E402

from benchmarks.engine import load  # noqa: E402
from mlx_mtp_backend import (  # noqa: E402
    Delta,
    Engine,
    EngineOptions,
    Finished,
    GenerateParams,
    LoadOptions,
    Sampling,
    WiringPolicy,
    rounds,
    sequence,
)
from mlx_mtp_backend.api import Rule  # noqa: E402
from mlx_mtp_backend.depth import DepthController  # noqa: E402
from mlx_mtp_backend.drafters import HeadDrafter  # noqa: E402
from mlx_mtp_backend.pacing import paced_round  # noqa: E402
from mlx_mtp_backend.stream import Stream  # noqa: E402
from mlx_mtp_backend.synthetic import Recipe, write  # noqa: E402

STREAMS = (1, 2, 4, 8)
ACCEPTANCES = (0.3, 0.6, 0.85, 1.0)
SAMPLING = Sampling(0.6, top_k=20, top_p=0.95)
Row = dict[str, Any]


def params(prompt: tuple[int, ...], tokens: int, *, depth: int | None, seed: int | None = 1) -> GenerateParams:
    return GenerateParams("model", prompt, tokens, SAMPLING, seed, depth, ignore_eos=True)


def finish(stream: Stream) -> tuple[tuple[int, ...], Finished]:
    events = list(stream)
    end = events[-1]
    assert isinstance(end, Finished)
    return tuple(token for event in events if isinstance(event, Delta) for token in event.tokens), end


def decode(model: Any, streams: int, tokens: int, seed: int, depths: DepthController | None) -> tuple[float, list[int]]:
    """Tokens a second of so many streams together, prompts not timed, and the depths of their rounds.

    Args:
        depths: chooses them; None decodes plainly.
    """
    running = []
    for n in range(streams):
        one = sequence.start(
            model,
            tuple(range(40 + 5 * n, 72 + 5 * n)),
            sampling=SAMPLING,
            seed=seed + n,
            rule=Rule.COUPLING,
            depth=0,
            limit=32 + tokens,
            acceptance=depths.sequence() if depths else None,
        )
        while one.prefilling:
            rounds.prefill_chunk(model, one, 256)
        running.append(one)
    drafter, controller, left = HeadDrafter(model), depths or DepthController(), running
    started = time.perf_counter()
    while left:
        paced_round(model, drafter, controller, left)
        left = [one for one in left if len(one.tokens) < one.limit]
    seconds = time.perf_counter() - started
    used = [depth for one in running for depth, count in enumerate(one.depths) for _ in range(count)]
    return streams * (tokens - 1) / seconds, used


def many_streams(folder: Path, options: argparse.Namespace) -> list[Row]:
    """Depths chosen round by round over plain decoding, for each acceptance and number of streams."""
    if mx.default_device().type == mx.cpu:
        mx.disable_compile()  # as the engine does there
    rows = []
    for acceptance in ACCEPTANCES:
        recipe = Recipe(kind="pass-through", acceptance=acceptance, layers=options.layers, width=options.width)
        model, depths = load(write(folder / f"accept-{acceptance}", recipe)), DepthController()
        for streams in STREAMS:
            decode(model, streams, options.tokens, 0, depths)  # learns what rounds of so many cost
            ratios, chosen = [], []
            for repetition in range(options.repetitions):
                plain, _ = decode(model, streams, options.tokens, repetition, None)
                auto, used = decode(model, streams, options.tokens, repetition, depths)
                again, _ = decode(model, streams, options.tokens, repetition, None)
                ratios.append(2 * auto / (plain + again))
                chosen += used
            row = {
                "acceptance": acceptance,
                "streams": streams,
                "auto_over_plain": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "mean_depth": statistics.mean(chosen),
            }
            rows.append(row)
            print(
                f"  {acceptance:>10}  {streams:>7}  {row['mean_depth']:>10.2f}  {row['auto_over_plain']:>12.2f}"
                f"  ({row['lowest']:.2f} to {row['highest']:.2f})",
                flush=True,
            )
    return rows


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
    parser.add_argument("parts", nargs="*", choices=[[], "streams", "turn", "gap"], help="all of them by default")
    parser.add_argument("--tokens", type=int, default=96, help="new tokens of a measured reply")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024, help="width of the MLP; the hidden size is 704")
    parser.add_argument("--prompt", type=int, default=8000, help="tokens of the first turn")
    parser.add_argument("--long-prompt", type=int, default=30_000)
    parser.add_argument("--json", type=Path, help="write everything measured here")
    options = parser.parse_args()
    parts = options.parts or ["streams", "turn", "gap"]
    results: dict[str, Any] = {"machine": platform.machine(), "options": vars(options)}
    with tempfile.TemporaryDirectory() as folder:
        if "streams" in parts:
            print("  acceptance  streams  mean depth  auto / plain")
            results["streams"] = many_streams(Path(folder), options)
            print(f"  worst cell: {min(row['auto_over_plain'] for row in results['streams']):.2f}")
        for part, measure in (("turn", second_turn), ("gap", longest_gap)):
            if part in parts:
                results[part] = measure(Path(folder), options)
                for key, value in results[part].items():
                    print(f"  {key}: {value}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1, default=str))


if __name__ == "__main__":
    main()
