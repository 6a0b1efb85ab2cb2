"""What a reply's bits depend on, and whether rows depend on their neighbours on this device."""

from __future__ import annotations

import platform
from collections.abc import Generator
from importlib.metadata import version

import mlx.core as mx

from mlx_mtp_backend import cache
from mlx_mtp_backend.api import LoadProgress, Replay
from mlx_mtp_backend.families.base import Model, Segment
from mlx_mtp_backend.load import blas

_PREFIX_ROWS = 19
_VERIFY_ROWS = 8


def fingerprint(model: Model, dtype: mx.Dtype | None, prefill_chunk: int) -> str:
    """Everything besides model files, prompt, parameters and seed that can change a bit of a reply."""
    device = mx.default_device()
    name = mx.device_info(device).get("device_name") or mx.device_info(device).get("architecture")
    parts = {
        "mlx": version("mlx"),
        "mlx-lm": version("mlx-lm"),
        "device": f"{'gpu' if device.type == mx.gpu else 'cpu'}/{platform.machine()}/{name}",
        "blas": "openblas" if blas.interposed() else "stock",
        "dtype": "stored" if dtype is None else str(dtype).removeprefix("mlx.core."),
        "chunk": prefill_chunk,
        "kernels": model.kernels,
        "noise": "philox4x32-10",
    }
    return " ".join(f"{key}={str(value).replace(' ', '_')}" for key, value in parts.items())


def replay_class(model: Model) -> Generator[LoadProgress, None, tuple[Replay, str]]:
    """What a seeded reply can promise here, and the evidence.

    EXACT needs rows that do not depend on how many share their pass; that is tried, not assumed.
    """
    if blas.interposed():
        return Replay.BEST_EFFORT, "an interposed BLAS makes a row's bits depend on the rows beside it"
    if not (yield from rows_are_invariant(model)):
        return Replay.BEST_EFFORT, "a row's bits depend on the rows beside it on this device"
    return Replay.EXACT, f"1 row and {_VERIFY_ROWS} rows gave the same bits at load"


def rows_are_invariant(model: Model) -> Generator[LoadProgress, None, bool]:
    """Whether a verify pass of eight rows, beside another sequence, equals eight passes of one row, bit for bit.

    A pass a slice. Numbers are compared as bits: a NaN equals itself, and 0.0 is not -0.0.
    """
    tokens = [(7919 * i + 13) % model.vocab_size for i in range(_PREFIX_ROWS + _VERIFY_ROWS)]
    prefix, rows = mx.array(tokens[:_PREFIX_ROWS], mx.int32), mx.array(tokens[_PREFIX_ROWS:], mx.int32)
    together, alone, neighbour = (model.trunk_caches() for _ in range(3))
    for caches in (together, alone, neighbour):
        _run(model, prefix, [Segment(caches, _PREFIX_ROWS)])
    segments = [Segment(neighbour, 3), Segment(together, _VERIFY_ROWS)]
    multi = _run(model, mx.concatenate([prefix[:3], rows]), segments)[3:]
    same = True
    for row in range(_VERIFY_ROWS):
        yield LoadProgress("rows", (row + 1) / _VERIFY_ROWS)
        single = _run(model, rows[row : row + 1], [Segment(alone, 1)])
        same &= mx.array_equal(_pattern(single), _pattern(multi[row : row + 1])).item() is True
    return same


def _pattern(logits: mx.array) -> mx.array:
    return logits.astype(mx.float32).view(mx.uint32)


def _run(model: Model, tokens: mx.array, segments: list[Segment]) -> mx.array:
    for segment in segments:
        cache.begin(segment.caches)
    logits = model.logits(model.trunk(tokens, segments).normed)
    mx.eval(logits)
    for segment in segments:
        cache.commit(segment.caches, segment.rows)
    return logits
