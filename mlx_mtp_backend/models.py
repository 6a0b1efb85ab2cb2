"""What callers may know of a loaded model. No MLX here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mtp_kernels.choice import Choice

from mlx_mtp_backend.api import Replay, Rule
from mlx_mtp_backend.checkpoint import CheckpointReport
from mlx_mtp_backend.language.text import ModelText

ENOUGH = 16  # positions that a wiring check must be told something by


@dataclass(frozen=True, slots=True)
class WiringReport:
    """The check's result.

    Attributes:
        positions: how many positions told something.
        acceptance: share of positions where the head's choice is the trunk's next choice.
        control: the same with the target one position off.
        alternatives: acceptance of each known mistake, by name.
        better: the alternative that beats the present wiring, if one does by more than noise.
        rules: share of drafts each rule would keep at temperature 0.6, top-p 0.95.
        healthy: whether the head earns trust: enough acceptance, clearly above the control.
    """

    positions: int
    acceptance: float
    control: float
    alternatives: dict[str, float]
    better: str | None
    rules: dict[Rule, float]
    healthy: bool

    @property
    def warning(self) -> str | None:
        """What somebody should look into; None where nothing is amiss."""
        return self.summary() if not self.healthy or self.better else None

    def summary(self) -> str:
        if self.positions < ENOUGH:
            return f"head untested: only {self.positions} positions of the text tell anything"
        verdict = "looks right" if self.healthy else "looks wrong"
        advice = f"; {self.better} does better ({self.alternatives[self.better]:.2f})" if self.better else ""
        return f"head {verdict}: acceptance {self.acceptance:.2f}, control {self.control:.2f}{advice}"


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
