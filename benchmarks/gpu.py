"""GPU benchmark of the Qwen3.5 step: `python benchmarks/gpu.py [27b] [35b-a3b] [4b] [--output FILE]`; offline, one
NVIDIA GPU.

Every figure is taken in this one run; ratios compare runs of this process on the same weights. Acceptance is imposed
(see gpu_rounds); tokens of the MTP runs are compared with the plain run's. Random weights send rows to experts almost
evenly: rows of a pass share as few as they ever will.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from mlx_mtp_backend.load.device import prepare_mlx  # noqa: E402

prepare_mlx()

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mtp_kernels.few_row_matmul import Matrix, counters, few_row_matmul  # noqa: E402
from mtp_kernels.registry import Registry  # noqa: E402

from benchmarks import gpu_rounds  # noqa: E402
from benchmarks.gpu_breakdown import breakdown, launches  # noqa: E402
from benchmarks.gpu_models import SHAPES, Shape, build, weight_bytes  # noqa: E402
from benchmarks.gpu_warm import Compiling, operations  # noqa: E402
from mlx_mtp_backend.cache import LayerCache, begin, commit  # noqa: E402
from mlx_mtp_backend.families.base import Segment  # noqa: E402
from mlx_mtp_backend.families.qwen3_5 import Qwen35  # noqa: E402
from mlx_mtp_backend.families.qwen3_5_fused import FusedQwen35, fused  # noqa: E402
from mlx_mtp_backend.families.qwen3_5_fused_cache import FusedDeltaCache, FusedKVCache  # noqa: E402

CONTEXT, LONG_CONTEXT = 512, 16_384
ACCEPTANCE = (0.85, 0.72, 0.61, 0.52, 0.44)  # of draft i and all before it; the first three are the reference law
ROUNDS, PREFILL = 48, 4096
COMPARED_WITH_EXPERTS = 1024  # tokens of the prompt that mlx-lm gets too: off Metal it runs the recurrence row by row
QUEUED_CHAINS = 40  # so many that the time in which the host builds the first graph, about 1 ms, does not count
LEAD = 2  # passes that are queued when the host waits for one
STARTED = time.perf_counter()


def median_seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median wall time of `run`, which evaluates what it builds; two warm-up calls."""
    run(), run()
    times = []
    for _ in range(repeats):
        mx.synchronize()
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read plus written each second by a device copy of 2 GiB (negation, which MLX cannot elide)."""
    source = mx.random.uniform(shape=(1 << 30,)).astype(mx.bfloat16)
    mx.eval(source)
    return 2 * source.nbytes / median_seconds(lambda: mx.eval(-source))


def qmm4_speedup() -> dict[str, float]:
    """Microseconds a call of four rows, K = 5120, N = 17408, 4 bits, stock and ours.

    Each is a chain over eight weight copies (401 MB, more than the cache holds) in which a call reads the first values
    that the one before it wrote: MLX runs calls that do not depend on each other side by side.
    """
    matrices = []
    for _ in range(8):
        weight = mx.random.normal((17408, 5120), scale=5120**-0.5).astype(mx.bfloat16)
        packed = mx.quantize(weight, group_size=64, bits=4)
        mx.eval(packed)
        matrices.append(Matrix(*packed, 4, 64))

    def ours(x: mx.array, m: Matrix, work: mx.array) -> mx.array:
        return few_row_matmul(x, [m], work=work)

    def stock(x: mx.array, m: Matrix, _: mx.array) -> mx.array:
        return mx.quantized_matmul(x, m.weight, m.scales, m.biases, True, 64, 4)

    def seconds(call: Callable[[mx.array, Matrix, mx.array], mx.array]) -> float:
        def chain(x: mx.array) -> mx.array:
            for index, work in enumerate(counters(80)):
                x = call(x, matrices[index % 8], work).reshape(-1)[: 4 * 5120].reshape(4, 5120)
            return x

        compiled = mx.compile(chain)

        def queued() -> None:
            x = mx.random.normal((4, 5120)).astype(mx.bfloat16)
            for _ in range(QUEUED_CHAINS):
                x = compiled(x)
                mx.async_eval(x)
            mx.eval(x)

        return median_seconds(queued) / (QUEUED_CHAINS * 80)

    return {"ours_us": seconds(ours) * 1e6, "stock_us": seconds(stock) * 1e6}


def stock_contents(trunk: Sequence[LayerCache]) -> tuple[list[tuple[mx.array, ...]], list[tuple[mx.array, ...]]]:
    """Of a prefilled sequence: recurrent state and window by layer, keys and values by layer."""
    delta, kv = trunk
    assert isinstance(delta, FusedDeltaCache)
    assert isinstance(kv, FusedKVCache)
    snapshot, rows = delta.snapshot(), kv.rows(0, kv.offset)
    return list(zip(snapshot[::2], snapshot[1::2], strict=True)), list(zip(rows[::2], rows[1::2], strict=True))


def stock_step(model: Qwen35, sequence: gpu_rounds.Prefilled, steps: int = 64) -> float:
    """Seconds of mlx-lm's greedy step from a prefilled sequence, steps queued ahead."""
    cache = model.text.make_cache()
    states, rows = (iter(own) for own in stock_contents(sequence.trunk))
    for layer, stock in zip(cache, model.text.model.layers, strict=True):
        if stock.is_linear:
            layer[1], layer[0] = next(states)
        else:
            layer.update_and_fetch(*next(rows))
    tokens = [sequence.following]
    for count in (4, steps):
        mx.synchronize()
        started = time.perf_counter()
        for _ in range(count):
            tokens.append(mx.argmax(model.text(tokens[-1][None], cache=cache)[:, -1], axis=-1))
            mx.async_eval(tokens[-1])
            mx.eval(tokens[:-LEAD])
        mx.eval(tokens)
    return (time.perf_counter() - started) / steps


def stock_prefill(model: Qwen35, prompt: mx.array) -> float:
    """Seconds of mlx-lm for the prompt, in its chunks of 2,048, last logits included."""
    cache = model.text.make_cache()
    mx.synchronize()
    started = time.perf_counter()
    for first in range(0, prompt.shape[0], 2048):
        logits = model.text(prompt[None, first : first + 2048], cache=cache)
        mx.eval(logits[:, -1], [c.state for c in cache])
    return time.perf_counter() - started


def our_prefill(model: FusedQwen35, prompt: mx.array) -> float:
    """Seconds for the prompt in chunks of 2,048, last logits included; the second of two runs."""
    for _ in range(2):
        caches = model.trunk_caches()
        mx.synchronize()
        started = time.perf_counter()
        for first in range(0, prompt.shape[0], 2048):
            part = prompt[first : first + 2048]
            begin(caches)
            hidden = model.trunk(part, [Segment(caches, part.shape[0])])
            commit(caches, part.shape[0])
            mx.eval(model.logits(hidden.normed[-1:]), [c.arrays for c in caches])
    return time.perf_counter() - started


def rows_bit_equal(model: FusedQwen35, prompt: mx.array) -> bool:
    """Whether eight rows in one pass have the logits, bit for bit, of eight passes of one row."""
    together, alone = gpu_rounds.prefill(model, prompt), gpu_rounds.prefill(model, prompt)
    rows = prompt[:8]
    begin(together.trunk)
    wanted = model.logits(model.trunk(rows, [Segment(together.trunk, 8)]).normed)
    single = []
    for index in range(8):
        begin(alone.trunk)
        single.append(model.logits(model.trunk(rows[index : index + 1], [Segment(alone.trunk, 1)]).normed))
        commit(alone.trunk, 1)
    return bool(mx.array_equal(wanted, mx.concatenate(single)).item())


def verify_seconds(model: FusedQwen35, prompt: mx.array, rows: int, steps: int = 64) -> float:
    """Seconds of one pass of `rows` rows with logits and argmax, of which one row is kept, passes queued ahead."""
    sequence = gpu_rounds.prefill(model, prompt)
    queued = [mx.broadcast_to(sequence.following, (rows,))]

    def passes() -> None:
        for _ in range(steps):
            begin(sequence.trunk)
            hidden = model.trunk(queued[-1], [Segment(sequence.trunk, rows)])
            commit(sequence.trunk, 1)
            queued.append(mx.argmax(model.logits(hidden.normed), axis=-1).astype(mx.int32))
            mx.async_eval(queued[-1])
            mx.eval(queued.pop(0) if len(queued) > LEAD else [])
        mx.eval(queued)

    return median_seconds(passes, repeats=3) / steps


def head_seconds(model: FusedQwen35, prompt: mx.array, steps: int = 32) -> float:
    """Seconds of one head step with logits and argmax, steps queued ahead."""
    sequence = gpu_rounds.prefill(model, prompt)
    token, carried = sequence.following, sequence.carried

    def passes() -> None:
        nonlocal token, carried
        for _ in range(steps):
            begin(sequence.head)
            hidden = model.head(token, carried, [Segment(sequence.head, 1)])
            commit(sequence.head, 1)
            before, carried = token, hidden.carried
            token = mx.argmax(model.logits(hidden.normed), axis=-1).astype(mx.int32)
            mx.async_eval(token)
            mx.eval(before)
        mx.eval(token)

    return median_seconds(passes, repeats=3) / steps


def mtp(model: FusedQwen35, prompt: mx.array) -> dict[str, Any]:
    """Plain and MTP rates at each depth, on one continuation."""
    gpu_rounds.plain(model, gpu_rounds.prefill(model, prompt), 4)
    runs = [gpu_rounds.plain(model, gpu_rounds.prefill(model, prompt), ROUNDS * 5) for _ in range(2)]
    seconds, continuation = min(runs)
    rates: dict[str, Any] = {"plain_tokens_per_second": ROUNDS * 5 / seconds, "depth": {}}
    for depth in (3, 1, 2, 4):
        law = ACCEPTANCE[:depth]
        gpu_rounds.run(model, gpu_rounds.prefill(model, prompt), continuation, law, 24)  # until every tail has moved
        result = gpu_rounds.run(model, gpu_rounds.prefill(model, prompt), continuation, law, ROUNDS)
        rates["depth"][depth] = {
            "tokens_per_second": result.tokens_per_second,
            "tokens_per_round": result.tokens / result.rounds,
            "round_ms": result.seconds / result.rounds * 1e3,
            "host_waits_ms": result.waited / result.rounds * 1e3,
            "host_syncs": result.syncs / result.rounds,
            "equal_plain": result.equal_plain,
        }
    return rates


def long_context(model: FusedQwen35, prompt: mx.array) -> dict[str, Any]:
    """Plain and MTP rates at depth 3 after a long prompt, in the same way as after the short one."""
    steps, law = ROUNDS * 4 + 24, ACCEPTANCE[:3]
    sequence = gpu_rounds.prefill(model, prompt, 2048)
    seconds, continuation = gpu_rounds.plain(model, gpu_rounds.copied(model, sequence), steps)
    gpu_rounds.run(model, gpu_rounds.copied(model, sequence), continuation, law, 24)
    result = gpu_rounds.run(model, gpu_rounds.copied(model, sequence), continuation, law, ROUNDS)
    return {
        "context": prompt.shape[0],
        "plain_step_ms": seconds / steps * 1e3,
        "mtp_tokens_per_second": result.tokens_per_second,
        "round_ms": result.seconds / result.rounds * 1e3,
        "equal_plain": result.equal_plain,
    }


def growth(model: FusedQwen35, prompt: mx.array, steps: int = 400) -> dict[str, float]:
    """Milliseconds of plain steps, each waited for, while the caches outgrow their buffers twice or so."""
    sequence = gpu_rounds.prefill(model, prompt)
    token, times = sequence.following, []
    for _ in range(steps):
        started = time.perf_counter()
        begin(sequence.trunk)
        hidden = model.trunk(token, [Segment(sequence.trunk, 1)])
        commit(sequence.trunk, 1)
        token = mx.argmax(model.logits(hidden.normed), axis=-1).astype(mx.int32)
        mx.eval(token)
        times.append((time.perf_counter() - started) * 1e3)
    return {"median": statistics.median(times), "longest": max(times[8:])}


def say(text: str) -> None:
    """Prints it with the seconds since the start."""
    print(f"[{time.perf_counter() - STARTED:4.0f} s] {text}", flush=True)


def prepare(shape: Shape, registry: Registry, report: dict[str, Any]) -> tuple[Qwen35, FusedQwen35]:
    """A model's weights, and the model through the checked kernels."""
    stock = build(shape)
    started = time.perf_counter()
    model = fused(stock, registry)
    report |= {"weights_read_bytes": weight_bytes(stock), "checks_seconds": time.perf_counter() - started}
    say(f"{shape.name} checked in {report['checks_seconds']:.0f} s, kernels {model.kernels}")
    return stock, model


def measure(shape: Shape, stock: Qwen35, model: FusedQwen35, report: dict[str, Any], save: Callable[[], None]) -> None:
    """All measurements of one shape into `report`, saved as they come."""
    held = sum(a.nbytes for m in (stock.text, stock.mtp) for _, a in tree_flatten(m.parameters()))
    long_prompt = mx.random.randint(0, 248_000, (LONG_CONTEXT,), key=mx.random.key(7)).astype(mx.int32)
    prompt = long_prompt[:PREFILL]
    short = prompt[:CONTEXT]
    mx.clear_cache()
    mx.reset_peak_memory()

    def note(name: str, value: Any) -> None:
        report[name] = value
        save()
        say(f"{shape.name} {name}: {value}")

    note("rows_bit_equal", rows_bit_equal(model, short))
    note("mtp", mtp(model, short))
    note("step_ms", {rows: verify_seconds(model, short, rows) * 1e3 for rows in (1, 2, 4, 6, 8)})
    note("head_step_ms", head_seconds(model, short) * 1e3)
    note("decode_peak_over_weights", mx.get_peak_memory() / held)
    note("growth_step_ms", growth(model, short))
    note("mlx_lm_step_ms", stock_step(stock, gpu_rounds.prefill(model, short)) * 1e3)
    mx.reset_peak_memory()
    note("prefill_seconds", our_prefill(model, prompt))
    note("prefill_peak_over_weights", mx.get_peak_memory() / held)
    note("long", long_context(model, long_prompt))
    note("launches", launches(model, gpu_rounds.prefill(model, short)))
    note("breakdown_us", breakdown(model, gpu_rounds.prefill(model, short)))
    note("compared_prefill", compared_prefill(stock, model, shape, prompt, report["prefill_seconds"]))


def compared_prefill(
    stock: Qwen35, model: FusedQwen35, shape: Shape, prompt: mx.array, ours: float
) -> dict[str, float]:
    """Seconds of mlx-lm and of ours for as many tokens; `ours` is what the whole prompt took."""
    if shape.experts:
        prompt = prompt[:COMPARED_WITH_EXPERTS]
        ours = our_prefill(model, prompt)
    return {"tokens": prompt.shape[0], "ours": ours, "mlx_lm": stock_prefill(stock, prompt)}


def figures(report: dict[str, Any], bandwidth: float) -> dict[str, float]:
    """The ratios that the project holds itself to."""
    step, rates = report["step_ms"], report["mtp"]
    at_three = rates["depth"][3]["tokens_per_second"]
    return {
        "plain_over_mlx_lm": step[1] / report["mlx_lm_step_ms"],
        "verify4_over_plain": step[4] / step[1],
        "bandwidth_share": report["weights_read_bytes"] / (step[1] * 1e-3) / bandwidth,
        "plain_tokens_per_second": rates["plain_tokens_per_second"],
        "mtp_tokens_per_second": at_three,
        "mtp_over_plain": at_three / rates["plain_tokens_per_second"],
        "best_depth": max(rates["depth"], key=lambda depth: rates["depth"][depth]["tokens_per_second"]),
        "prefill_over_mlx_lm": report["compared_prefill"]["mlx_lm"] / report["compared_prefill"]["ours"],
        "memory_over_weights": report["decode_peak_over_weights"],
        "plain_16k_over_512": report["long"]["plain_step_ms"] * 1e-3 * rates["plain_tokens_per_second"],
        "mtp_over_plain_16k": report["long"]["mtp_tokens_per_second"] * report["long"]["plain_step_ms"] * 1e-3,
        "host_syncs_per_round": rates["depth"][3]["host_syncs"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", help=f"of {', '.join(SHAPES)}; all when none is given")
    parser.add_argument("--output", type=Path, help="JSON file; default benchmarks/results/<device>-<date>.json")
    args = parser.parse_args()
    if unknown := set(args.shapes) - SHAPES.keys():
        parser.error(f"unknown shape {', '.join(sorted(unknown))}; known: {', '.join(SHAPES)}")
    if not mx.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs an NVIDIA GPU and MLX's CUDA backend")
    device = str(mx.device_info()["device_name"])
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    output = args.output or ROOT / "benchmarks/results" / f"{device.replace(' ', '-').lower()}-{today}.json"
    names = args.shapes or list(SHAPES)
    registry, compiling = Registry(), Compiling([part for name in names for part in operations(SHAPES[name])])
    result: dict[str, Any] = {
        "device": device,
        "date": today,
        "mlx": mx.__version__,
        "python": platform.python_version(),
        "figures": {},
        "shapes": {},
    }
    output.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        result["kernels"] = registry.status()
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for name in names:
        report: dict[str, Any] = {}
        result["shapes"][name] = report
        models = prepare(SHAPES[name], registry, report)
        if name == names[0]:  # nothing is timed beside compilers
            compiling.finish()
            result["copy_bandwidth_bytes_per_second"], result["qmm4"] = copy_bandwidth(), qmm4_speedup()
            result["figures"]["qmm4_speedup"] = result["qmm4"]["stock_us"] / result["qmm4"]["ours_us"]
            say(f"qmm4: {result['qmm4']}")
        measure(SHAPES[name], *models, report, save)
        report["figures"] = figures(report, result["copy_bandwidth_bytes_per_second"])
        if name == "27b":
            result["figures"] |= report["figures"]
        save()
        say(f"{name} figures: {json.dumps(report['figures'])}")
        del models
        gc.collect()  # a model and its compiled passes refer to each other
        mx.clear_cache()
    print(json.dumps(result["figures"], indent=1))


if __name__ == "__main__":
    main()
