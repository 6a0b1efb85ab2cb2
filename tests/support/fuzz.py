"""How long the fuzzed tests go on: a little in every run, $FUZZ_EXAMPLES where somebody has time (`make fuzz`)."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings


def fuzzed(examples: int) -> settings:
    """Settings of a fuzzed test that tries so many examples by default."""
    return settings(
        max_examples=int(os.environ.get("FUZZ_EXAMPLES", examples)),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
