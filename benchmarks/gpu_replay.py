"""Replay through the engine on this GPU: `python benchmarks/gpu_replay.py`; exits 1 on a failure.

A small checkpoint whose logits depend on every token is loaded as the service would load it. Each seeded request is
answered plainly, alone, and then at every depth, all at once, and eight times at depth 4; the tokens must be the same.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from mtp_kernels.launch import platform  # noqa: E402

from mlx_mtp_backend.api import Delta, Finished, FinishReason, GenerateParams, Replay, Sampling  # noqa: E402
from mlx_mtp_backend.engine import Engine  # noqa: E402
from mlx_mtp_backend.stream import Stream  # noqa: E402
from mlx_mtp_backend.synthetic import Recipe, write  # noqa: E402

# What runs together: every depth, some deeper than a pass takes rows of one sequence; and more rows than a pass takes.
CROWDS = ((1, 2, 3, 4, 8, 16), (4,) * 8)
SAMPLINGS = {"greedy": Sampling(0.0), "0.6, top-p 0.95": Sampling(0.6, top_p=0.95), "1.0": Sampling(1.0)}
PROMPTS = [tuple((41 * i + 7 * n) % 690 for i in range(n)) for n in (3, 40, 300)]
NEW = 96


def tokens(stream: Stream) -> tuple[int, ...]:
    """The whole reply. Raises RuntimeError where it did not run to its length."""
    events = list(stream)
    end = events[-1]
    if not isinstance(end, Finished) or end.reason is not FinishReason.MAX_TOKENS:
        raise RuntimeError(f"a reply ended with {end}")
    return tuple(token for event in events if isinstance(event, Delta) for token in event.tokens)


def differing(engine: Engine, sampling: Sampling) -> tuple[int, int]:
    """Replies that are not their plain ones, and replies compared."""
    wrong = 0
    for seed, prompt in enumerate(PROMPTS):

        def ask(depth: int, prompt: tuple[int, ...] = prompt, seed: int = seed) -> Stream:
            params = GenerateParams("model", prompt, NEW, sampling, seed, depth, ignore_eos=True)
            return engine.submit(params)

        plain = tokens(ask(0))
        for crowd in CROWDS:
            together = [ask(depth) for depth in crowd]
            wrong += sum(tokens(stream) != plain for stream in together)
    return wrong, len(PROMPTS) * sum(len(crowd) for crowd in CROWDS)


def main() -> None:
    if platform() == "cpu":
        sys.exit("benchmarks/gpu_replay.py needs a GPU that MLX runs on")
    failed = False
    with tempfile.TemporaryDirectory() as folder, Engine() as engine:
        recipe = Recipe(kind="history", hidden=256, width=384, head_dim=256, linear_dim=128)
        model = engine.load("model", write(Path(folder), recipe)).result()
        print(f"kernels: {model.kernels}; {model.stock_because or 'none fell back'}")
        print(f"replay: {model.replay} ({model.replay_reason})")
        print(f"fingerprint: {model.fingerprint}", flush=True)
        failed |= model.stock_because is not None or model.replay is not Replay.EXACT
        for name, sampling in SAMPLINGS.items():
            wrong, compared = differing(engine, sampling)
            print(f"temperature {name}: {wrong} of {compared} replies differ from plain decoding", flush=True)
            failed |= wrong > 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
