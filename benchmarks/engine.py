"""Rounds and tokens a second of the MLX engine on this machine's CPU, with the stock and with an interposed BLAS.

    python benchmarks/engine.py [--json FILE]

The model is synthetic (a pass-through checkpoint whose head is right after a set share of tokens), so the acceptance is
imposed and the text means nothing; layers cost what layers of that size cost. Each BLAS runs in its own process. Plain
decoding, MTP and mlx-lm's own step are measured in turn, repetition by repetition, and compared within a repetition:
read the ratios, not the rates, and never compare rates of two runs.
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
DEPTHS = (1, 2, 3)
PROMPT = tuple(range(40, 72))
Row = dict[str, Any]


def measure(folder: Path, acceptance: float, options: argparse.Namespace) -> list[Row]:
    """One checkpoint: a row per depth, each figure the median over repetitions."""
    import mlx.core as mx
    import mlx_lm.utils

    from mlx_mtp_backend.drafters import HeadDrafter
    from mlx_mtp_backend.synthetic import Recipe, write

    path = write(
        folder / str(acceptance),
        Recipe(kind="pass-through", acceptance=acceptance, layers=options.layers, width=options.width),
    )
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
    from mlx_mtp_backend import rounds, sequence
    from mlx_mtp_backend.api import Rule, Sampling

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
    """Measure in this process and print JSON."""
    if options.child == "openblas":
        from mlx_mtp_backend import blas

        blas.interpose()
    import mlx.core as mx

    mx.set_default_device(mx.Device(mx.cpu))
    mx.disable_compile()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for acceptance in ACCEPTANCES for row in measure(Path(folder), acceptance, options)]
    print(json.dumps(rows))


def run_child(mode: str, options: argparse.Namespace) -> list[Row] | str:
    """The rows, or why there are none."""
    sizes = [f"--{name}={getattr(options, name)}" for name in ("tokens", "repetitions", "layers", "width")]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--child", mode, *sizes],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return rows


def show(mode: str, rows: list[Row] | str) -> None:
    print(f"\n{mode} BLAS")
    if isinstance(rows, str):
        print(f"  not measured: {rows}")
        return
    print("  acceptance  depth  tokens/round  rounds/s  tokens/s  MTP / plain  plain / mlx-lm")
    for row in rows:
        print(
            f"  {row['acceptance']:>10}  {row['depth']:>5}  {row['tokens_per_round']:>12.2f}"
            f"  {row['rounds_per_second']:>8.1f}  {row['tokens_per_second']:>8.1f}"
            f"  {row['mtp_over_plain']:>11.2f}  {row['plain_over_mlx_lm']:>14.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a measured reply")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=1536, help="width of the MLP; the hidden size is 704")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument("--child", choices=("stock", "openblas"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    results = {mode: run_child(mode, options) for mode in ("stock", "openblas")}
    for mode, rows in results.items():
        show(mode, rows)
    if options.json:
        about = {"machine": platform.machine(), "python": platform.python_version(), "options": vars(options)}
        options.json.write_text(json.dumps({"about": about, "results": results}, indent=1, default=str))


if __name__ == "__main__":
    main()
