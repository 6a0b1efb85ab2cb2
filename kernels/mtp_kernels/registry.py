"""Which implementation of each kernel runs here, and why.

A kernel runs only after it passed two checks on this device at the shape asked for: against its reference, and eight
rows (of the matmul 16 and 32, too) in one pass against the same rows one at a time, bit for bit. One that fails, or
does not compile, is replaced by MLX's own operations, and `status` says so.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from .choice import FALLBACK, Choice
from .launch import platform
from .store import write_json
from .tuning import Tuning

log = logging.getLogger(__name__)

CHECK_ROWS = 8
TUNING_FILE = "kernel-tuning.json"
_TOLERANCE = {mx.bfloat16: 1e-2, mx.float16: 2e-3}

MLX_VERSION = version("mlx")

Run = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Attributes:
        kernel: name of its folder.
        version: digest of its source.
        shape: everything that its checks depend on besides the source, as text.
        dtype: of its activations.
        launches: implementation by platform (`cuda`, `metal`).
        reference: same signature, plain MLX operations: the definition of right.
        fallback: same signature, what runs where the kernel does not.
        probe: called with an implementation and a number of rows, runs CHECK_ROWS fixed rows (or more, where passes of
            more are launches of another kind) in passes of that many and returns all of its results, row results first.
        unproved: platforms on which no check has ever been seen to pass.
    """

    kernel: str
    version: str
    shape: str
    dtype: mx.Dtype
    launches: dict[str, Run]
    reference: Run
    fallback: Run
    probe: Callable[[Run, int], list[mx.array]]
    unproved: frozenset[str] = frozenset()

    def implementation(self, choice: Choice) -> Run:
        """What to call under a choice made for this case."""
        return self.fallback if choice.fell_back else self.launches[choice.implementation]


class Registry:
    """Chooses implementations and remembers what the checks found.

    Args:
        cache_file: JSON file of check results by kernel version, device, MLX version and shape; None keeps them for
            this process only. An unreadable file counts as empty. What tuning found lies beside it.
    """

    def __init__(self, cache_file: Path | None = None) -> None:
        self._cache_file = cache_file
        self._choices: dict[str, Choice] = {}
        self._stored: dict[str, dict[str, Any]] = _load(cache_file)

    @functools.cached_property
    def tuning(self) -> Tuning:
        """What tuning found on this device."""
        file = self._cache_file and self._cache_file.with_name(TUNING_FILE)
        return Tuning(file, f"{device_name()}:{MLX_VERSION}")

    def resolve(self, case: Case) -> Run:
        """The implementation to call for this case: a checked kernel, or the fallback."""
        return case.implementation(self.choose(case))

    def choose(self, case: Case) -> Choice:
        """What runs for this case, checked now if it has not been."""
        key = f"{case.kernel}:{case.version}:{case.dtype}:{case.shape}:{device_name()}:{MLX_VERSION}"
        choice = self._choices.get(key) or self._from_store(key) or check(case)
        self._choices[key] = choice
        self._save(key, choice)
        return choice

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Everything chosen so far."""
        return tuple(self._choices.values())

    @property
    def fallbacks(self) -> int:
        """Cases that run their fallback."""
        return sum(choice.fell_back for choice in self._choices.values())

    def stored(self) -> list[Choice]:
        """What earlier checks on this device, with this version of MLX, found."""
        here = f":{device_name()}:{MLX_VERSION}"
        return [Choice(**value) for key, value in self._stored.items() if key.endswith(here)]

    def status(self) -> dict[str, Any]:
        """What runs and why, ready for JSON."""
        return {
            "platform": platform(),
            "device": device_name(),
            "mlx": MLX_VERSION,
            "fallbacks": self.fallbacks,
            "kernels": [asdict(choice) for choice in self._choices.values()],
        }

    def _from_store(self, key: str) -> Choice | None:
        if platform() == "cpu" or key not in self._stored:
            return None
        return Choice(**self._stored[key])

    def _save(self, key: str, choice: Choice) -> None:
        """Store what was measured; failures to compile are tried again by the next process."""
        if self._cache_file is None or choice.error is None or self._stored.get(key) == asdict(choice):
            return
        self._stored[key] = asdict(choice)
        try:
            write_json(self._cache_file, self._stored)
        except OSError as error:  # a full disk is no reason not to run
            log.warning(
                "%s cannot be written, so that kernels are checked again at the next start: %s", self._cache_file, error
            )


class Selection:
    """What one model runs: the registry's choices for the cases that it asks for."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._choices: list[Choice] = []

    def resolve(self, case: Case) -> Run:
        """The implementation to call for this case: a checked kernel, or the fallback."""
        choice = self._registry.choose(case)
        self._choices.append(choice)
        return case.implementation(choice)

    def optional(self, case: Case) -> Run | None:
        """The checked kernel; None where the caller's own operations must do, which the registry's status tells."""
        choice = self._registry.choose(case)
        if choice.fell_back:
            return None
        self._choices.append(choice)
        return case.implementation(choice)

    @property
    def failed(self) -> list[Choice]:
        """Choices that fell back."""
        return [choice for choice in self._choices if choice.fell_back]

    def versions(self) -> str:
        """Kernels in use with the digests of their sources, `none` where nothing but fallbacks runs."""
        used = {f"{c.kernel}:{c.version}" for c in self._choices if not c.fell_back}
        return ",".join(sorted(used)) or "none"


def check(case: Case, rows: tuple[int, ...] = (1,)) -> Choice:
    """Runs a case's checks on this device: eight rows together against its reference and against passes of `rows`."""
    here = platform()
    if here not in case.launches:
        reason = "no GPU" if here == "cpu" else f"not built for {here}"
        return Choice(case.kernel, case.version, case.shape, FALLBACK, reason)
    try:
        error, equal = _measure(case, case.launches[here], rows)
    except (RuntimeError, ValueError) as failure:  # a kernel that does not compile or launch
        log.warning("kernel %s (%s) failed: %s", case.kernel, case.shape, failure)
        return Choice(case.kernel, case.version, case.shape, FALLBACK, f"failed: {str(failure)[:500]}")
    if not error <= _TOLERANCE[case.dtype]:
        reason = f"differs from its reference by {error:.1e}"
    elif not equal:
        reason = "rows of one pass differ from those of smaller passes"
    else:
        reason = "checked on this device"
        if here in case.unproved:
            reason += "; unproved elsewhere"
        return Choice(case.kernel, case.version, case.shape, here, reason, error, equal)
    log.warning("kernel %s (%s) %s", case.kernel, case.shape, reason)
    return Choice(case.kernel, case.version, case.shape, FALLBACK, reason, error, equal)


def device_name() -> str:
    """Name of MLX's default device."""
    return str(mx.device_info().get("device_name", "unknown"))


def relative_error(got: mx.array, want: mx.array) -> float:
    """Norm of the difference over norm of `want`; infinite when `got` holds a NaN."""
    got, want = got.astype(mx.float32), want.astype(mx.float32)
    error = mx.linalg.norm((got - want).flatten()) / (mx.linalg.norm(want.flatten()) + 1e-30)
    return cast(float, mx.where(mx.isnan(error), mx.inf, error).item())


def _measure(case: Case, run: Run, rows: tuple[int, ...]) -> tuple[float, bool]:
    together = case.probe(run, CHECK_ROWS)
    wanted = case.probe(case.reference, CHECK_ROWS)
    error = max(relative_error(got, want) for got, want in zip(together, wanted, strict=True))
    equal = True
    for count in rows:
        fewer = case.probe(run, count)
        equal = equal and all(bool(mx.array_equal(a, b).item()) for a, b in zip(together, fewer, strict=True))
    return error, equal


def _load(cache_file: Path | None) -> dict[str, dict[str, Any]]:
    if cache_file is None or not cache_file.exists():
        return {}
    try:
        stored = json.loads(cache_file.read_text(encoding="utf-8"))
        return {key: asdict(Choice(**value)) for key, value in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        log.warning("kernel checks in %s are unreadable and will be made again", cache_file)
        return {}
