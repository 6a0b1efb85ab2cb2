"""Whether a checkpoint keeps the promises on this machine, and what drafting brings: one report, fit to be shared."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_mtp_backend.api import (
    Delta,
    EngineOptions,
    Finished,
    FinishReason,
    GenerateParams,
    LoadOptions,
    LoadProgress,
    Replay,
    Sampling,
)
from mlx_mtp_backend.engine import Engine
from mlx_mtp_backend.errors import EngineError, ErrorReason
from mlx_mtp_backend.load import blas
from mlx_mtp_backend.models import LoadedModel, WiringReport

DEPTHS = (0, 1, 2, 3, 4)
SAMPLING = Sampling(temperature=0.6, top_p=0.95)
SEED = 1
WARM_UP_TOKENS = 8
PROMPT = "Three services report timeouts since 02:14. Explain step by step how you would find the cause."


@dataclass(frozen=True, slots=True)
class Run:
    """One seeded reply.

    Attributes:
        accepted: share of drafts kept, by draft position.
        equals_plain: whether its tokens are those of the reply without drafts.
    """

    depth: int
    tokens: int
    prefill_seconds: float
    tokens_per_second: float
    tokens_per_round: float
    accepted: tuple[float, ...]
    equals_plain: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """One promise: whether it holds here, and what shows it. `holds` None: there is nothing to hold."""

    promise: str
    holds: bool | None
    evidence: str


@dataclass(frozen=True, slots=True)
class Verification:
    """The report.

    Attributes:
        model: the folder's name; nothing else in the report tells where it lies.
        runs: plain decoding first.
    """

    model: str
    system: dict[str, str]
    loaded: LoadedModel
    runs: tuple[Run, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """Whether every promise that applies holds."""
        return all(verdict.holds is not False for verdict in self.verdicts)

    @property
    def fastest(self) -> Run:
        """The depth with the most tokens a second."""
        return max(self.runs, key=lambda run: run.tokens_per_second)

    def to_json(self) -> dict[str, Any]:
        """Plain types for json.dumps, without paths."""
        loaded = self.loaded
        files = {key: value for key, value in loaded.report.to_json().items() if key != "path"}
        return {
            "model": self.model,
            "passed": self.passed,
            "system": self.system,
            "files": files,
            "fingerprint": loaded.fingerprint,
            "load_seconds": loaded.load_seconds,
            "weight_bytes": loaded.weight_bytes,
            "kernels": loaded.kernels,
            "stock_because": loaded.stock_because,
            "kernel_checks": [dataclasses.asdict(choice) for choice in loaded.kernel_checks],
            "wiring": None if loaded.wiring is None else dataclasses.asdict(loaded.wiring),
            "runs": [dataclasses.asdict(run) for run in self.runs],
            "fastest_depth": self.fastest.depth,
            "verdicts": [dataclasses.asdict(verdict) for verdict in self.verdicts],
        }


def verify(
    path: Path,
    *,
    head_path: Path | None = None,
    tokens: int = 128,
    kernel_checks: Path | None = None,
    interpose_blas: bool = False,
    on_progress: Callable[[str], None] | None = None,
) -> Verification:
    """Loads the checkpoint in folder `path` and decodes one prompt at every depth.

    Args:
        tokens: new tokens a reply.
        kernel_checks: see EngineOptions.
        on_progress: called with what is being done.

    Raises:
        EngineError: what Engine and Engine.load raise; DEVICE_FAILURE where a reply broke off.
    """
    tell = on_progress or (lambda _: None)

    def loading(progress: LoadProgress) -> None:
        tell(f"loading: {progress.stage} {progress.fraction:.0%}")

    options = EngineOptions(kernel_checks=kernel_checks, interpose_blas=interpose_blas)
    with Engine(options) as engine:
        loaded = engine.load("model", path, LoadOptions(head_path=head_path), loading).result()
        prompt = _prompt(loaded)
        runs: list[Run] = []
        plain: tuple[int, ...] = ()
        for depth in DEPTHS if loaded.has_head else DEPTHS[:1]:
            tell(f"decoding at depth {depth}")
            _reply(engine, prompt, WARM_UP_TOKENS, depth)
            reply, end = _reply(engine, prompt, tokens, depth)
            plain = plain or reply
            runs.append(_run(depth, reply, end, plain))
    return Verification(path.resolve().name, _system(), loaded, tuple(runs), _verdicts(loaded, runs))


def _prompt(loaded: LoadedModel) -> tuple[int, ...]:
    if loaded.text is None:
        return tuple(range(1, min(33, loaded.vocab_size)))
    return tuple(loaded.text.encode(PROMPT))


def _reply(engine: Engine, prompt: tuple[int, ...], tokens: int, depth: int) -> tuple[tuple[int, ...], Finished]:
    params = GenerateParams("model", prompt, tokens, SAMPLING, SEED, depth, ignore_eos=True)
    events = list(engine.submit(params))
    end = events[-1]
    assert isinstance(end, Finished)
    if end.reason not in (FinishReason.MAX_TOKENS, FinishReason.CONTEXT_LIMIT):
        raise end.error or EngineError(ErrorReason.DEVICE_FAILURE, f"a reply ended with {end.reason}")
    return tuple(token for event in events if isinstance(event, Delta) for token in event.tokens), end


def _run(depth: int, reply: tuple[int, ...], end: Finished, plain: tuple[int, ...]) -> Run:
    counts = end.statistics
    return Run(
        depth=depth,
        tokens=len(reply),
        prefill_seconds=counts.seconds_prefill,
        tokens_per_second=len(reply) / counts.seconds_decode if counts.seconds_decode else 0.0,
        tokens_per_round=counts.tokens_per_round,
        accepted=tuple(a / d if d else 0.0 for a, d in zip(counts.accepted, counts.drafted, strict=True)),
        equals_plain=reply == plain,
    )


def _verdicts(loaded: LoadedModel, runs: list[Run]) -> tuple[Verdict, ...]:
    wiring, exact = loaded.wiring, loaded.replay is Replay.EXACT
    differing = [str(run.depth) for run in runs if not run.equals_plain]
    same = f"differ at depth {', '.join(differing)}" if differing else f"{len(runs)} depths, the same tokens"
    head = loaded.report.mtp
    ran = sum(not choice.fell_back for choice in loaded.kernel_checks)
    kernels = loaded.stock_because or f"{ran} kernels passed their checks"
    passed = ran == len(loaded.kernel_checks) if loaded.kernel_checks else None
    present = loaded.has_head or (False if head.declared else None)
    return (
        Verdict("the head's tensors are there", present, f"{head.status}: {len(head.tensors)} tensors"),
        Verdict("the head is wired right", wiring.healthy if wiring else None, _summary(wiring)),
        Verdict("kernels pass their checks", passed, kernels),
        Verdict("a row's bits do not depend on its neighbours", _asked(exact), loaded.replay_reason),
        # Where rows depend on their neighbours nothing is promised, so nothing can fail.
        Verdict("drafting changes no token", (not differing) if exact or not differing else None, same),
        Verdict("its tokenizer is there", loaded.text is not None, _text(loaded)),
    )


def _text(loaded: LoadedModel) -> str:
    if loaded.text is None:
        return "no tokenizer.json: the router does not serve it"
    return "tokenizer.json, and " + ("a chat template" if loaded.text.has_template else "no chat template")


def _summary(wiring: WiringReport | None) -> str:
    return wiring.summary() if wiring else "not checked"


def _asked(exact: bool) -> bool | None:
    """A BLAS that was interposed on purpose gives up exactness knowingly."""
    return None if blas.interposed() else exact


def _system() -> dict[str, str]:
    return {
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("mtp-router", "mlx", "mlx-lm")},
    }
