"""What callers may know of a loaded model. No MLX here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_mtp_backend.api import Replay, Rule
from mlx_mtp_backend.checkpoint import CheckpointReport
from mlx_mtp_backend.text import ModelText

if TYPE_CHECKING:
    from mtp_kernels.registry import Choice

    from mlx_mtp_backend.wiring import WiringReport


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model that serves.

    Attributes:
        text: tokenizer and chat template; None where the checkpoint has no tokenizer.
        context_length: most tokens of prompt and reply together.
        depth: drafts per round where a request does not say, 0 without a head; None: chosen round by round.
        kernels: names and versions of the custom kernels in use, "none" for stock operations.
        stock_because: why it runs on stock operations; None where kernels run.
        kernel_checks: what the kernels' checks found on this device, for every model loaded so far.
        replay, replay_reason: what a seeded reply can promise, and the evidence.
        unseeded_rule: the acceptance rule of requests without a seed.
        wiring: the head's check; None if it was off or there is nothing to check.
    """

    name: str
    path: Path
    report: CheckpointReport
    text: ModelText | None
    context_length: int
    vocab_size: int
    has_head: bool
    depth: int | None
    weight_bytes: int
    kernels: str
    stock_because: str | None
    kernel_checks: tuple[Choice, ...]
    load_seconds: float
    replay: Replay
    replay_reason: str
    fingerprint: str
    unseeded_rule: Rule
    wiring: WiringReport | None
