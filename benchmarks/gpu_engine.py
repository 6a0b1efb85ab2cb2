"""The engine's own rounds on one NVIDIA GPU: `python benchmarks/gpu_engine.py [alone] [rejection] [streams]`.

`rounds.run_round` as the service calls it, with everything that a request pays for there: sampling, acceptance, host
reads and the depth controller. Weights are random, so acceptance is imposed: the real head runs and its drafts are
exchanged for the plain continuation, or for a wrong token where the law says so. Under coupling a reply must equal the
plain one.
"""

from __future__ import annotations

import argparse
import datetime
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
from mtp_kernels.registry import Registry  # noqa: E402

from benchmarks.gpu_models import SHAPES, build, sharpen  # noqa: E402
from benchmarks.imposed import Decks  # noqa: E402
from mlx_mtp_backend.api import Rule, Sampling  # noqa: E402
from mlx_mtp_backend.decode import rounds, sequence  # noqa: E402
from mlx_mtp_backend.decode.depth import DepthController  # noqa: E402
from mlx_mtp_backend.decode.drafters import Draft, Drafter, HeadDrafter  # noqa: E402
from mlx_mtp_backend.decode.pacing import paced_round  # noqa: E402
from mlx_mtp_backend.families.qwen3_5_fused import FusedQwen35, fused  # noqa: E402
from mlx_mtp_backend.load.calibration import calibrate  # noqa: E402

CONTEXT = 512
ACCEPTANCE = (0.85, 0.72, 0.61, 0.52, 0.44)  # of draft i and all before it
SHARPNESS = 6.0  # standard deviation of the logits: a nucleus of some ten tokens, as text has
NUCLEUS = Sampling(0.6, top_p=0.95)
SAMPLINGS = {"greedy": Sampling(0.0), "top-p": NUCLEUS, "top-k, top-p": Sampling(0.6, top_k=20, top_p=0.95)}
STREAMS = (1, 2, 4, 8)
PARTS = ["alone", "rejection", "streams"]
Row = dict[str, Any]


class ImposedDrafter:
    """The head's passes with other drafts: the known continuation, and a wrong token behind those to be kept."""

    def __init__(self, head: HeadDrafter, vocab_size: int) -> None:
        self._head, self._vocab_size = head, vocab_size
        self.known: dict[tuple[int, int], list[int]] = {}  # by seed and first token of the prompt
        self.shuffle()

    def shuffle(self) -> None:
        """The next rounds are the first of a run, which meets the law by itself."""
        self._decks = Decks(ACCEPTANCE)

    def draft(self, sequences: list[sequence.Sequence]) -> list[Draft | None]:
        paid_for = self._head.draft(sequences)
        return [
            None if head is None else self._exchanged(one, head) for one, head in zip(sequences, paid_for, strict=True)
        ]

    def _exchanged(self, one: sequence.Sequence, head: Draft) -> Draft:
        start, known = len(one.tokens), self.known[one.seed, one.tokens[0]]
        right = known[start : start + head.tokens.shape[0]]
        kept = self._decks.draw(one.seed, len(right))
        tokens = [(token + (place >= kept)) % self._vocab_size for place, token in enumerate(right)]
        return Draft(mx.depends(mx.array(tokens, mx.int32), [head.tokens]), head.law)


class Watch:
    """Counts and times what the host waits for inside rounds."""

    def __init__(self) -> None:
        self.waits = 0
        self.waited = 0.0
        evaluate = rounds.evaluate

        def timed(arrays: list[mx.array]) -> None:
            started = time.perf_counter()
            evaluate(arrays)
            self.waited += time.perf_counter() - started

        rounds.evaluate = timed
        self._count(mx, "eval")
        for module in [m for name, m in sys.modules.items() if name.startswith("mlx_mtp_backend")]:
            # What rounds reads is evaluated by then; anybody else's read is a wait of its own.
            for name in ("flags", "ints", "number") if module is not rounds else ():
                if hasattr(module, name) and not module.__name__.endswith(".host"):
                    self._count(module, name)

    def _count(self, module: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(module, name)

        def counted(*arguments: Any) -> Any:
            self.waits += 1
            return original(*arguments)

        setattr(module, name, counted)


class Bench:
    """One model, and what is needed to run sequences on it."""

    def __init__(self, model: FusedQwen35, watch: Watch) -> None:
        self.model, self.watch = model, watch
        self.head = HeadDrafter(model)
        self.imposed = ImposedDrafter(self.head, model.vocab_size)
        self.drafter: Drafter = self.imposed
        self.depths = DepthController(model.most_rows)
        for _ in calibrate(model, self.head, self.depths):
            pass

    def start(
        self, stream: int, sampling: Sampling, tokens: int, depth: int | None, rule: Rule = Rule.COUPLING
    ) -> sequence.Sequence:
        """Prefilled, its head's slots too; in short chunks, as stock products of more rows take a minute to compile."""
        prompt = tuple((7919 * i + 131 * stream + 13) % self.model.vocab_size for i in range(CONTEXT))
        one = sequence.start(
            self.model, prompt, sampling=sampling, seed=stream, rule=rule, depth=depth or 0,
            limit=CONTEXT + tokens, acceptance=self.depths.sequence() if depth is None else None,
        )  # fmt: skip
        while one.prefilling:
            rounds.prefill_chunk(self.model, one, 8)
        return one

    def run(self, streams: Sequence[sequence.Sequence], tokens: int) -> Row:
        """Rounds until every stream has so many new tokens more; they all decode to the end."""
        ends = [len(one.tokens) + tokens for one in streams]
        before = sum(len(one.tokens) for one in streams)
        self.watch.waits, self.watch.waited = 0, 0.0
        self.imposed.shuffle()
        done: list[rounds.Round] = []
        rows = 0
        mx.synchronize()
        started = time.perf_counter()
        while any(len(one.tokens) < end for one, end in zip(streams, ends, strict=True)):
            done.append(paced_round(self.model, self.drafter, self.depths, list(streams)))
            rows += sum(1 + committed.drafted for committed in done[-1].committed)
        seconds = time.perf_counter() - started
        emitted = sum(len(one.tokens) for one in streams) - before
        count = len(done)
        return {
            "tokens_per_second": emitted / seconds,
            "tokens_per_round": emitted / count / len(streams),
            "round_ms": seconds / count * 1e3,
            "median_round_ms": statistics.median(one.seconds for one in done) * 1e3,
            "build_drafts_ms": sum(one.seconds_draft for one in done) / count * 1e3,
            "build_verify_ms": (sum(one.seconds_verify for one in done) - self.watch.waited) / count * 1e3,
            "evaluate_ms": self.watch.waited / count * 1e3,
            "commit_ms": sum(one.seconds_commit for one in done) / count * 1e3,
            "host_syncs_per_round": self.watch.waits / count,
            "mean_depth": rows / count / len(streams) - 1,
        }

    def plain(self, streams: Sequence[sequence.Sequence], tokens: int) -> Row:
        """Plain decoding; what it emits is what drafters are told."""
        row = self.run(streams, tokens)
        for one in streams:
            self.imposed.known[one.seed, one.tokens[0]] = list(one.tokens)
        return row

    def replayed(self, streams: Sequence[sequence.Sequence]) -> bool:
        """Whether each is the beginning of its plain reply."""
        return all(one.tokens == self.imposed.known[one.seed, one.tokens[0]][: len(one.tokens)] for one in streams)


def alone(bench: Bench, sampling: Sampling, tokens: int, depths: Sequence[int]) -> dict[str, Row]:
    """One stream at fixed depths."""
    warm, spare = 12, 24
    one = bench.start(0, sampling, tokens + warm + spare, 0)
    bench.run([one], warm)
    first = list(one.tokens)
    rows = {"plain": bench.plain([one], tokens + spare - 8)}
    assert one.tokens[: len(first)] == first
    for depth in depths:
        one = bench.start(0, sampling, tokens + warm + spare, depth)
        bench.run([one], warm)
        rows[f"depth {depth}"] = bench.run([one], tokens - warm) | {"equal_plain": bench.replayed([one])}
        rows[f"depth {depth}"]["over_plain"] = (
            rows[f"depth {depth}"]["tokens_per_second"] / rows["plain"]["tokens_per_second"]
        )
    return rows


def rejection(bench: Bench, tokens: int, depth: int = 3) -> Row:
    """One stream under rejection with the head's own drafts and laws; what a round costs, and what it would give at the
    imposed acceptance."""
    one = bench.start(0, NUCLEUS, tokens * 4, depth, Rule.REJECTION)
    bench.drafter = bench.head
    bench.run([one], 12)
    row = bench.run([one], tokens // 3)
    bench.drafter = bench.imposed
    expected = 1 + sum(ACCEPTANCE[:depth])
    return row | {"tokens_per_second": expected / row["round_ms"] * 1e3, "tokens_per_round": expected}


def together(bench: Bench, count: int, tokens: int) -> dict[str, Any]:
    """Streams that decode together, plain, at depth 3 and at the controller's depth, which has seen such rounds before:
    so many tokens each, after some to warm up."""
    warm, spare = 48, 48
    limit = warm + tokens + spare
    plain = [bench.start(stream, NUCLEUS, limit, 0) for stream in range(count)]
    bench.run(plain, warm // 4)
    row: dict[str, Any] = {"plain": bench.plain(plain, limit - warm // 4 - 2)}
    for name, depth in (("depth 3", 3), ("auto", None)):
        streams = [bench.start(stream, NUCLEUS, limit, depth) for stream in range(count)]
        bench.run(streams, warm)
        row[name] = bench.run(streams, tokens) | {"equal_plain": bench.replayed(streams)}
    row["costs_ms"] = [
        [sequences, rows, seconds * 1e3]
        for sequences, rows, seconds in bench.depths.costs.to_json()
        if sequences == count
    ]
    row["auto_over_plain"] = row["auto"]["tokens_per_second"] / row["plain"]["tokens_per_second"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all when none is given")
    parser.add_argument("--tokens", type=int, default=120, help="of a measured reply")
    parser.add_argument("--streams", type=int, nargs="*", default=STREAMS)
    parser.add_argument("--stock-sampler", action="store_true", help="first with the stock sampler too, one stream")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    parts = args.parts or PARTS
    if not mx.cuda.is_available():
        sys.exit("benchmarks/gpu_engine.py needs an NVIDIA GPU and MLX's CUDA backend")
    registry = Registry()
    model = fused(sharpen(build(SHAPES["27b"]), SHARPNESS), registry)
    report: dict[str, Any] = {
        "device": str(mx.device_info()["device_name"]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "mlx": mx.__version__,
        "python": platform.python_version(),
        "shape": "27b",
        "context": CONTEXT,
        "acceptance": ACCEPTANCE,
        "sharpness": SHARPNESS,
        "kernels": model.kernels,
    }

    def note(name: str, value: Any) -> None:
        report[name] = value
        if args.output:
            args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {json.dumps(value)}", flush=True)

    bench = Bench(model, Watch())
    if args.stock_sampler and getattr(model, "sampler", None) is not None:
        kept, model.sampler = model.sampler, None
        note("stock sampler, top-p", alone(bench, NUCLEUS, args.tokens, (3,)))
        model.sampler = kept
    for name, sampling in SAMPLINGS.items() if "alone" in parts else ():
        note(name, alone(bench, sampling, args.tokens, (3,) if name != "top-p" else (1, 3, 4)))
    if "rejection" in parts:
        note("rejection, top-p, depth 3", rejection(bench, args.tokens))
    for count in args.streams if "streams" in parts else ():
        note(f"{count} streams", together(bench, count, args.tokens))


if __name__ == "__main__":
    main()
