"""What rounds cost on this machine: measured once after a load, remembered by model and device."""

from __future__ import annotations

import json
import logging
from collections.abc import Generator
from pathlib import Path
from typing import Any

from mtp_kernels.store import write_json

from mlx_mtp_backend import rounds, sequence
from mlx_mtp_backend.api import LoadProgress, Rule, Sampling
from mlx_mtp_backend.depth import DepthController
from mlx_mtp_backend.drafters import HeadDrafter
from mlx_mtp_backend.families.base import Model

log = logging.getLogger(__name__)

_PROMPT_TOKENS = 64
_DEPTHS = (0, 1, 3)  # what lies between and beyond is drawn from these until it is measured
_ROUNDS = 5  # of each depth; the first two do not count
_TYPICAL = Sampling(temperature=0.6, top_p=0.95)


def calibrate(model: Model, drafter: HeadDrafter, depths: DepthController) -> Generator[LoadProgress, None, None]:
    """Times rounds of one sequence at a few depths, a round a slice; how the drafts fare is not counted."""
    prompt = tuple((7919 * i + 13) % model.vocab_size for i in range(_PROMPT_TOKENS))
    limit = _PROMPT_TOKENS + _ROUNDS * sum(1 + depth for depth in _DEPTHS) + 1
    one = sequence.start(model, prompt, sampling=_TYPICAL, seed=0, rule=Rule.COUPLING, depth=max(_DEPTHS), limit=limit)
    rounds.prefill_chunk(model, one, _PROMPT_TOKENS)
    for place, depth in enumerate(depth for depth in _DEPTHS for _ in range(_ROUNDS)):
        one.depth = depth
        behind = one.pending_rows > depth + 1 and depth > 0
        done = rounds.run_round(model, drafter, [one])
        if done.committed[0].error is not None:  # requests will meet it too, and tell
            return
        if not behind:
            depths.costs.observe(1, 1 + depth, done.seconds)
        yield LoadProgress("rounds", (place + 1) / (len(_DEPTHS) * _ROUNDS))


class DepthMemory:
    """A JSON file of what depth controllers know, by model and numerics fingerprint.

    Args:
        file: None remembers nothing. An unreadable file counts as empty.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._stored: dict[str, Any] = _read(file)

    def recall(self, path: Path, fingerprint: str, depths: DepthController) -> bool:
        """Begin from what is known of this model; False where nothing is."""
        stored = self._stored.get(_key(path, fingerprint))
        if stored is None:
            return False
        try:
            depths.restore(stored)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            log.warning("what %s holds of %s is malformed and will be measured again", self._file, path.name)
            return False
        return True

    def keep(self, path: Path, fingerprint: str, depths: DepthController) -> None:
        """Remember what is known of a model."""
        if self._file is None:
            return
        self._stored[_key(path, fingerprint)] = depths.to_json()
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
