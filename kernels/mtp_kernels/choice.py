"""What runs for one kernel at one shape, as callers may know it. No MLX here."""

from __future__ import annotations

from dataclasses import dataclass

FALLBACK = "fallback"


@dataclass(frozen=True)
class Choice:
    """What runs for one case.

    Attributes:
        implementation: a platform, or `fallback`.
        reason: why.
        error: relative error against the reference (norm of the difference over norm); None when not measured.
        rows_equal: whether rows of one pass had the bits of one row at a time; None when not measured.
    """

    kernel: str
    version: str
    shape: str
    implementation: str
    reason: str
    error: float | None = None
    rows_equal: bool | None = None

    @property
    def fell_back(self) -> bool:
        """Whether MLX's own operations run instead of the kernel."""
        return self.implementation == FALLBACK
