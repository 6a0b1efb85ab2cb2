"""What rounds cost on this machine: measured once after a load, remembered by model and device."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mtp_kernels.store import write_json

from mlx_mtp_backend import cache
from mlx_mtp_backend.api import LoadProgress, Rule, Sampling
from mlx_mtp_backend.decode import rounds, sequence
from mlx_mtp_backend.decode.depth import DepthController
from mlx_mtp_backend.decode.drafters import HeadDrafter
from mlx_mtp_backend.families.base import Model, Segment
from mlx_mtp_backend.host import evaluate

log = logging.getLogger(__name__)

_PROMPT_TOKENS = 64
_DEPTHS = (0, 1, 3)  # what lies between and beyond is drawn from these until it is measured
_TIMES = 12  # that each depth is timed at most
_HEAD_ROWS, _HEAD_RUNS = 64, 4
_TYPICAL = Sampling(temperature=0.6, top_p=0.95)


def calibrate(model: Model, drafter: HeadDrafter, depths: DepthController) -> Generator[LoadProgress, None, None]:
    """Times the head, and rounds of one sequence at a few depths until their times agree, a round a slice. How the
    drafts fare is not counted."""
    prompt = tuple((7919 * i + 13) % model.vocab_size for i in range(_PROMPT_TOKENS))
    limit = _PROMPT_TOKENS + 2 * _TIMES * sum(1 + depth for depth in _DEPTHS) + 1
    one = sequence.start(model, prompt, sampling=_TYPICAL, seed=0, rule=Rule.COUPLING, depth=max(_DEPTHS), limit=limit)
    rounds.prefill_chunk(model, one, _PROMPT_TOKENS)
    depths.costs.head_step = _head_seconds(model, one.pending[0], 1)
    depths.observe_catching_up(_HEAD_ROWS, _head_seconds(model, one.pending[0], _HEAD_ROWS))
    yield LoadProgress("rounds", 1 / (_TIMES + 1))
    # In turn, so that what else the machine does meets all of them.
    for turn, depth in itertools.product(range(_TIMES), _DEPTHS):
        one.depth, timed = depth, depths.costs.known(1, 1 + depth)
        while not timed:
            timed = depth == 0 or one.pending_rows <= depth + 1  # else the head catches up first
            done = rounds.run_round(model, drafter, [one])
            if done.committed[0].error is not None:  # requests will meet it too, and tell
                return
            if timed:
                depths.costs.observe(1, 1 + depth, done.seconds)
            yield LoadProgress("rounds", (turn + 2) / (_TIMES + 1))


def _head_seconds(model: Model, carried: mx.array, rows: int) -> float:
    """The shortest of a few passes of the head over so many rows, with the logits of the last. carried: any [1, hidden
    size]."""
    tokens, hiddens = mx.arange(rows).astype(mx.int32), mx.repeat(carried, rows, axis=0)
    evaluate([tokens, hiddens])
    times = []
    for _ in range(_HEAD_RUNS):
        caches = model.head_caches()
        cache.begin(caches)
        started = time.perf_counter()
        hidden = model.head(tokens, hiddens, [Segment(caches, rows)])
        evaluate([model.logits(hidden.normed[-1:]), *(array for layer in caches for array in layer.arrays)])
        times.append(time.perf_counter() - started)
    return min(times)


class DepthMemory:
    """A JSON file of what depth controllers know, by path and numerics fingerprint, as long as the files are the same.

    Args:
        file: None remembers nothing. An unreadable file counts as empty.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._stored: dict[str, Any] = _read(file)

    def recall(self, path: Path, files: str, fingerprint: str, depths: DepthController) -> bool:
        """Begin from what is known of this model; False where nothing is.

        Args:
            files: CheckpointReport.identity.
        """
        stored = self._stored.get(_key(path, fingerprint))
        if stored is None:
            return False
        try:
            if stored["files"] != files:
                return False
            depths.restore(stored)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            log.warning("what %s holds of %s is malformed and will be measured again", self._file, path.name)
            return False
        return True

    def keep(self, path: Path, files: str, fingerprint: str, depths: DepthController) -> None:
        """Remember what is known of a model, loaded from these files."""
        if self._file is None:
            return
        self._stored[_key(path, fingerprint)] = {"files": files} | depths.to_json()
        try:
            write_json(self._file, self._stored)
        except OSError as error:
            log.warning("%s cannot be written: %s", self._file, error)


def _key(path: Path, fingerprint: str) -> str:
    return f"{path.resolve()} {fingerprint}"


def _read(file: Path | None) -> dict[str, Any]:
    if file is None or not file.exists():
        return {}
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stored = None
    if isinstance(stored, dict):
        return stored
    log.warning("%s is unreadable; rounds will be measured again", file)
    return {}
