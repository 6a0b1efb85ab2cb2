"""`python -m mlx_mtp_backend.synthetic`: writes a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlx_mtp_backend.synthetic import HEAD_PLACES, Recipe, write


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mlx_mtp_backend.synthetic", description="Writes a small Qwen3.5 checkpoint."
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", choices=("pass-through", "history"), default="history")
    parser.add_argument("--acceptance", type=float, default=0.85, help="pass-through: share of drafts that are right")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=64, help="history: hidden size")
    parser.add_argument("--width", type=int, default=96, help="width of the MLP")
    parser.add_argument("--experts", type=int, default=0, help="routed experts of every layer; 0: dense layers")
    parser.add_argument("--top-k", type=int, default=2, help="experts that a token goes to")
    parser.add_argument("--interval", type=int, default=2, help="every how many layers one has full attention")
    parser.add_argument("--head", choices=HEAD_PLACES, default="shards", help="where the head's tensors go")
    parser.add_argument("--text-only", action="store_true", help="no multimodal wrapper")
    parser.add_argument("--tied", action="store_true", help="history: output matrix tied to the embeddings")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args())
    out = given.pop("out")
    try:
        recipe = Recipe(wrapper=not given.pop("text_only"), **given)
    except ValueError as error:
        parser.error(str(error))
    print(write(out, recipe))


if __name__ == "__main__":
    main()
