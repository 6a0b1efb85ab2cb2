"""Rounds and tokens a second of the MLX engine on this machine's CPU, with the stock and with an interposed BLAS.

    python benchmarks/engine.py [alone] [streams] [--json FILE]

The model is synthetic (a pass-through checkpoint whose head is right after a set share of tokens), so the acceptance is
imposed and the text means nothing; layers cost what layers of that size cost. There are many small ones, so that the
head is no larger a part of the model than it may be of a released one: a step of it takes about a tenth of a plain
round. Each BLAS runs in its own process. Read the ratios, not the rates, and never compare rates of two runs.

* alone: one stream at fixed depths. Plain decoding, MTP and mlx-lm's own step are measured in turn, repetition by
  repetition, and compared within a repetition.
* streams: 1 to 8 together, at the depth that the engine chooses, over plain decoding; see streams.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

ACCEPTANCES = (0.6, 0.85, 1.0)
STREAM_ACCEPTANCES = (0.3, *ACCEPTANCES)
PARTS = ("alone", "streams")
MODES = ("stock", "openblas")
DEPTHS = (1, 2, 3)
STREAM_FIGURES = ("wall", "cpu", "work")  # see streams.py
PROMPT = tuple(range(40, 72))
Row = dict[str, Any]


def checkpoint(folder: Path, acceptance: float, options: argparse.Namespace) -> Path:
    """Made where it is not there yet."""
    from mlx_mtp_backend.synthetic import Recipe, write

    path = folder / str(acceptance)
    recipe = Recipe(kind="pass-through", acceptance=acceptance, layers=options.layers, width=options.width, interval=4)
    return path if path.exists() else write(path, recipe)


def alone(path: Path, acceptance: float, options: argparse.Namespace) -> list[Row]:
    """One checkpoint: a row per depth, each figure the median over repetitions."""
    import mlx.core as mx
    import mlx_lm.utils

    from mlx_mtp_backend.decode.drafters import HeadDrafter

    model = load(path)
    stock, _ = mlx_lm.utils.load_model(path)
    stock.set_dtype(mx.float32)
    mx.eval(stock.parameters())
    drafter = HeadDrafter(model)
    runs: dict[int, list[Row]] = {depth: [] for depth in DEPTHS}
    for repetition in range(options.repetitions + 1):
        lm_rate = options.tokens / _timed(lambda: _mlx_lm(stock, options.tokens))
        plain = _decode(model, drafter, 0, repetition, options.tokens)
        for depth in DEPTHS:
            run = _decode(model, drafter, depth, repetition, options.tokens)
            run["mtp_over_plain"] = run["tokens_per_second"] / plain["tokens_per_second"]
            run["plain_over_mlx_lm"] = plain["tokens_per_second"] / lm_rate
            run["plain_tokens_per_second"] = plain["tokens_per_second"]
            if repetition:  # the first one warms up
                runs[depth].append(run)
    return [
        {"acceptance": acceptance, "depth": depth} | {key: statistics.median(r[key] for r in rows) for key in rows[0]}
        for depth, rows in runs.items()
    ]


def load(path: Path) -> Any:
    """A checkpoint's model, in float32 on a CPU and as stored elsewhere."""
    import mlx.core as mx

    from mlx_mtp_backend.api import LoadOptions
    from mlx_mtp_backend.families import qwen3_5_load

    dtype = mx.float32 if mx.default_device().type == mx.cpu else None
    steps = qwen3_5_load.load(path, LoadOptions(), dtype)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value


def _decode(model: Any, drafter: Any, depth: int, seed: int, tokens: int) -> Row:
    """Decode one sequence; prefill is not timed."""
    from mlx_mtp_backend.api import Rule, Sampling
    from mlx_mtp_backend.decode import rounds, sequence

    one = sequence.start(
        model, PROMPT, sampling=Sampling(0.6, top_k=20, top_p=0.95), seed=seed, rule=Rule.COUPLING, depth=depth,
        limit=len(PROMPT) + tokens,
    )  # fmt: skip
    while one.prefilling:
        rounds.prefill_chunk(model, one, 256)

    def run() -> None:
        while len(one.tokens) < one.limit:
            rounds.run_round(model, drafter, [one])

    seconds = _timed(run)
    return {
        "rounds_per_second": one.rounds / seconds,
        "tokens_per_round": (one.rounds + sum(one.accepted)) / one.rounds,
        "tokens_per_second": (tokens - 1) / seconds,
        "accepted_first": one.accepted[0] / one.drafted[0] if one.drafted else 0.0,
    }


def _mlx_lm(stock: Any, tokens: int) -> None:
    """mlx-lm's own generation step, greedy, which is the cheapest it has."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    for _ in generate_step(mx.array(PROMPT), stock, max_tokens=tokens):
        pass


def _timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def child(options: argparse.Namespace) -> None:
    """Measure in this process and print JSON, a line a row."""
    if options.child == "openblas":
        from mlx_mtp_backend.load import blas

        blas.interpose()
    import mlx.core as mx

    from benchmarks import streams

    mx.set_default_device(mx.Device(mx.cpu))
    mx.disable_compile()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for acceptance in options.acceptance or STREAM_ACCEPTANCES:
            path = checkpoint(folder, acceptance, options)
            if "alone" in options.parts and acceptance in ACCEPTANCES:
                for row in alone(path, acceptance, options):
                    print(json.dumps({"part": "alone"} | row), flush=True)
            if "streams" in options.parts:
                sizes = options.stream_tokens, options.clock, options.repetitions, options.child
                for row in streams.measure(load(path), acceptance, *sizes):
                    print(json.dumps({"part": "streams"} | row), flush=True)


def run_child(mode: str, options: argparse.Namespace) -> list[Row]:
    """The rows, shown as they come; fewer where the process ends early, and then it is said why."""
    names = ("tokens", "repetitions", "layers", "width", "stream_tokens", "clock")
    sizes = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    sizes += ["--acceptance", *map(str, options.acceptance)] if options.acceptance else []
    command = [sys.executable, str(Path(__file__).resolve()), *options.parts, "--child", mode, *sizes]
    print(f"\n{mode} BLAS", flush=True)
    rows: list[Row] = []
    part = ""
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            for line in process.stdout or ():
                row = json.loads(line)
                if row["part"] != part:
                    part = row["part"]
                    print(HEADINGS[part])
                print(show_alone(row) if part == "alone" else show_streams(row), flush=True)
                rows.append(row)
        if process.returncode:
            errors.seek(0)
            print(f"  not measured: {(errors.read().strip().splitlines() or ['no reason given'])[-1]}")
    return rows


HEADINGS = {
    "alone": "  acceptance  depth  tokens/round  rounds/s  tokens/s  MTP / plain  plain / mlx-lm",
    "streams": "  acceptance  streams  mean depth  auto / plain (and 95 % of draws)",
}


def show_alone(row: Row) -> str:
    return (
        f"  {row['acceptance']:>10}  {row['depth']:>5}  {row['tokens_per_round']:>12.2f}"
        f"  {row['rounds_per_second']:>8.1f}  {row['tokens_per_second']:>8.1f}"
        f"  {row['mtp_over_plain']:>11.2f}  {row['plain_over_mlx_lm']:>14.2f}"
    )


def show_streams(row: Row) -> str:
    figures = ((name, row[name]) for name in STREAM_FIGURES if name in row)
    told = [f"{name} {r['auto_over_plain']:.3f} ({r['low']:.3f} to {r['high']:.3f})" for name, r in figures]
    return f"  {row['acceptance']:>10}  {row['streams']:>7}  {row['mean_depth']:>10.2f}  {'  '.join(told)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="alone, streams; both by default")
    parser.add_argument("--blas", choices=MODES, nargs="*", default=MODES)
    parser.add_argument("--acceptance", type=float, nargs="*", help="only these")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a reply that decodes alone")
    parser.add_argument("--stream-tokens", type=int, default=40, help="new tokens of each of 8 streams")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="of the controller, see streams.py")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=192, help="width of the MLP; the hidden size is 704")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument("--child", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.parts = options.parts or list(PARTS)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}")
    if options.child:
        child(options)
        return
    results = {mode: run_child(mode, options) for mode in options.blas}
    for mode, rows in results.items():
        for name in STREAM_FIGURES:
            cells = [row[name]["auto_over_plain"] for row in rows if name in row]
            if cells:
                print(f"{mode} BLAS, worst cell of auto over plain by {name}: {min(cells):.3f}")
    if options.json:
        about = {"machine": platform.machine(), "python": platform.python_version(), "options": vars(options)}
        options.json.write_text(json.dumps({"about": about, "results": results}, indent=1, default=str))


if __name__ == "__main__":
    main()
