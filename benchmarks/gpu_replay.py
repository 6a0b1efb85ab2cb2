"""Replay through the engine on this GPU: `python benchmarks/gpu_replay.py`; exits 1 on a failure.

Small checkpoints whose logits depend on every token, a dense one and one of experts, are loaded as the service would
load them. Each seeded request is answered plainly, alone, and then at every depth, all at once, and eight times at
depth 4; the tokens must be the same. So must the dense one's after a prompt of 16,384 tokens, which only the depths
together are asked to answer.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from mtp_kernels.launch import platform  # noqa: E402

from mlx_mtp_backend.api import Delta, Finished, FinishReason, GenerateParams, Replay, Sampling  # noqa: E402
from mlx_mtp_backend.engine import Engine  # noqa: E402
from mlx_mtp_backend.stream import Stream  # noqa: E402
from mlx_mtp_backend.synthetic import Recipe, write  # noqa: E402

# What runs together: every depth, some deeper than a pass takes rows of one sequence; and more rows than a pass takes.
DEPTHS, MANY = (1, 2, 3, 4, 8, 16), (4,) * 8
SAMPLINGS = {"greedy": Sampling(0.0), "0.6, top-p 0.95": Sampling(0.6, top_p=0.95), "1.0": Sampling(1.0)}
Prompt = tuple[int, ...]
# A sampling, a remark on the prompts, these, and who asks about each of them together.
Asked = tuple[str, str, Sequence[Prompt], Sequence[Sequence[int]]]
PROMPTS: list[Prompt] = [tuple((41 * i + 7 * n) % 690 for i in range(n)) for n in (3, 40, 300)]
LONG_PROMPT: Prompt = tuple((41 * i + i // 690) % 690 for i in range(16_384))
NEW = 64


def tokens(stream: Stream) -> tuple[int, ...]:
    """The whole reply. Raises RuntimeError where it did not run to its length."""
    events = list(stream)
    end = events[-1]
    if not isinstance(end, Finished) or end.reason is not FinishReason.MAX_TOKENS:
        raise RuntimeError(f"a reply ended with {end}")
    return tuple(token for event in events if isinstance(event, Delta) for token in event.tokens)


def differing(
    engine: Engine, sampling: Sampling, prompts: Sequence[Prompt], crowds: Sequence[Sequence[int]]
) -> tuple[int, int]:
    """Replies that are not their plain ones, and replies compared."""
    wrong = 0
    for seed, prompt in enumerate(prompts):

        def ask(depth: int, prompt: Prompt = prompt, seed: int = seed) -> Stream:
            params = GenerateParams("model", prompt, NEW, sampling, seed, depth, ignore_eos=True)
            return engine.submit(params)

        plain = tokens(ask(0))
        for crowd in crowds:
            together = [ask(depth) for depth in crowd]
            wrong += sum(tokens(stream) != plain for stream in together)
    return wrong, len(prompts) * sum(len(crowd) for crowd in crowds)


def replayed(recipe: Recipe, asked: Sequence[Asked], started: float) -> bool:
    """Whether all replies of such a checkpoint through the kernels were their plain ones; prints what was found."""
    kind = f"{recipe.experts} experts" if recipe.experts else "dense"
    with tempfile.TemporaryDirectory() as folder, Engine() as engine:
        model = engine.load("model", write(Path(folder), recipe)).result()
        print(f"{kind}: kernels: {model.kernels}; {model.stock_because or 'none fell back'}")
        print(f"{kind}: replay: {model.replay} ({model.replay_reason})")
        print(f"{kind}: fingerprint: {model.fingerprint}")
        print(f"{kind}: loaded after {time.perf_counter() - started:.0f} s", flush=True)
        failed = model.stock_because is not None or model.replay is not Replay.EXACT
        for name, where, prompts, crowds in asked:
            wrong, compared = differing(engine, SAMPLINGS[name], prompts, crowds)
            elapsed = time.perf_counter() - started
            told = f"{wrong} of {compared} replies{where} differ from plain decoding"
            print(f"{kind}: temperature {name}: {told} ({elapsed:.0f} s)", flush=True)
            failed |= wrong > 0
    return not failed


def main() -> None:
    if platform() == "cpu":
        sys.exit("benchmarks/gpu_replay.py needs a GPU that MLX runs on")
    started = time.perf_counter()
    dense = Recipe(kind="history", hidden=256, width=384, head_dim=256, linear_dim=128, context=1 << 15)
    short = ("", PROMPTS, (DEPTHS, MANY))
    good = replayed(
        dense,
        [(name, *rest) for name in SAMPLINGS for rest in (short, (" after 16,384 tokens", [LONG_PROMPT], (DEPTHS,)))],
        started,
    )
    # A routed expert is a third as wide.
    good &= replayed(replace(dense, width=768, experts=8), [("0.6, top-p 0.95", *short)], started)
    sys.exit(not good)


if __name__ == "__main__":
    main()
