"""How the engine runs, and how one checkpoint is loaded."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

from mlx_mtp_backend.api.checks import require
from mlx_mtp_backend.api.params import MAX_DEPTH


class Rule(enum.StrEnum):
    """How drafts are accepted; both leave the output law at p."""

    COUPLING = "coupling"  # Gumbel-max coupling, arXiv 2408.07978; tokens depend on the seed alone
    REJECTION = "rejection"  # speculative sampling, arXiv 2211.17192; accepts more, tokens depend on the drafts


class WiringPolicy(enum.StrEnum):
    """What a failed wiring check does."""

    OFF = "off"
    WARN = "warn"
    REFUSE = "refuse"


class Norm(enum.StrEnum):
    """Which hidden feeds the head: after ("post") or before ("pre") the final norm."""

    POST = "post"
    PRE = "pre"


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load one checkpoint.

    Attributes:
        head_path: where the head's tensors lie when not in the checkpoint itself: a file, or the folder of the
            original checkpoint beside an MLX-quantised trunk.
        depth: drafts per round where a request does not say; None: as many as pay, found round by round from measured
            costs and acceptance (see decode/depth.py).
        unseeded_rule: the acceptance rule without a seed; None takes the one that promises more tokens a second.
        wiring: what a failed wiring check does.
        seed_norm, recycle_norm: which hidden seeds the head and which of its outputs it is fed again; None takes
            the family's choice.
        prefill_chunk: rows of one prefill pass; part of the numerics fingerprint.
    """

    head_path: Path | None = None
    depth: int | None = None
    unseeded_rule: Rule | None = None
    wiring: WiringPolicy = WiringPolicy.WARN
    seed_norm: Norm | None = None
    recycle_norm: Norm | None = None
    prefill_chunk: int = 256

    def __post_init__(self) -> None:
        require(self.depth is None or 0 <= self.depth <= MAX_DEPTH, "depth", f"in [0, {MAX_DEPTH}]")
        require(16 <= self.prefill_chunk <= 8192, "prefill_chunk", "in [16, 8192]")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How the engine runs.

    Attributes:
        device: "cpu", "gpu" or None for MLX's default.
        interpose_blas: put OpenBLAS (package ngsolve-openblas) in place of MLX's BLAS on a Linux CPU. Fast, but it
            breaks row invariance, so replies say BEST_EFFORT; must happen before anything imports MLX.
        max_streams: sequences decoded together.
        max_waiting: further streams accepted; beyond, submit raises QUEUE_FULL.
        stream_buffer: tokens that wait unread before a stream is paused.
        slow_reader_limit: seconds a stream may stay paused before it is cut.
        kernel_checks: JSON file that keeps what the kernels' checks found on this device; None checks at every start.
        depth_memory: JSON file that keeps what rounds cost and how drafts fared, by model and numerics fingerprint;
            None measures after every load.
        prefix_cache_bytes: memory for prompts that were seen before; None: an eighth of the machine's, at most 4 GiB.
        cpu_nice: by how much an engine in a process of its own yields to others where MLX computes on the CPU: steps
            of nice(2), from 0, not at all, to 19.
    """

    device: str | None = None
    interpose_blas: bool = False
    max_streams: int = 8
    max_waiting: int = 256
    stream_buffer: int = 1024
    slow_reader_limit: float = 30.0
    kernel_checks: Path | None = None
    depth_memory: Path | None = None
    prefix_cache_bytes: int | None = None
    cpu_nice: int = 0

    def __post_init__(self) -> None:
        require(self.device in (None, "cpu", "gpu"), "device", "cpu, gpu or None")
        require(self.max_streams >= 1, "max_streams", "at least 1")
        require(self.max_waiting >= 0, "max_waiting", "at least 0")
        require(self.stream_buffer >= 1, "stream_buffer", "at least 1")
        require(self.slow_reader_limit > 0, "slow_reader_limit", "positive")
        budget = self.prefix_cache_bytes
        require(budget is None or budget >= 0, "prefix_cache_bytes", "at least 0")
        require(0 <= self.cpu_nice <= 19, "cpu_nice", "from 0 to 19")
