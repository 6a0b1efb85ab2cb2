"""One request on the MLX thread: its sequence, its text, and what it tells its stream."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from mlx_mtp_backend.api import (
    Delta,
    Finished,
    FinishReason,
    GenerateParams,
    Replay,
    Rule,
    Started,
    Statistics,
    TokenLogprob,
)
from mlx_mtp_backend.decode import sequence as sequences
from mlx_mtp_backend.decode.prefix import PrefixStore
from mlx_mtp_backend.decode.processors import processors_of
from mlx_mtp_backend.decode.rounds import Round
from mlx_mtp_backend.decode.sequence import Sequence
from mlx_mtp_backend.errors import EngineError
from mlx_mtp_backend.language.grammar import Grammar
from mlx_mtp_backend.language.text import GrowingText, StopScanner
from mlx_mtp_backend.load.loading import Resident
from mlx_mtp_backend.stream import Stream


@dataclass(slots=True, eq=False)
class Job:
    """A request from submission to its Finished event. Times are of time.monotonic()."""

    params: GenerateParams
    stream: Stream
    submitted: float
    grammar: Grammar | None = None
    resident: Resident | None = None
    sequence: Sequence | None = None
    growing: GrowingText | None = None
    scanner: StopScanner = field(default_factory=lambda: StopScanner(()))
    stop_tokens: frozenset[int] = frozenset()
    emitted: int = 0
    started: float | None = None
    prefilled: float | None = None
    seconds_draft: float = 0.0
    seconds_verify: float = 0.0
    seconds_commit: float = 0.0
    paused: float | None = None

    def start(self, resident: Resident, prefixes: PrefixStore) -> None:
        """Leave the queue: make the sequence, with what is cached of its prompt, and say what the reply can promise."""
        params, info = self.params, resident.info
        depth = info.depth if params.depth is None else params.depth
        adaptive = depth is None
        seed = int.from_bytes(os.urandom(8), "little") if params.seed is None else params.seed
        # Without drafts or without chance both rules are the same draw, and coupling is the cheaper one.
        same = depth == 0 or params.sampling.greedy
        rule = Rule.COUPLING if params.seed is not None or same else info.unseeded_rule
        limit = min(len(params.prompt) + params.max_tokens, info.context_length)
        self.resident = resident
        self.sequence = sequences.start(
            resident.model,
            params.prompt,
            sampling=params.sampling,
            seed=seed,
            rule=rule,
            depth=depth or 0,
            limit=limit,
            acceptance=resident.depths.sequence() if adaptive else None,
            boundaries=params.boundaries,
        )
        prefixes.adopt(info.name, self.sequence, resident.options.prefill_chunk)
        if info.text is not None:
            self.growing = info.text.growing()
            self.scanner = StopScanner(params.stop_strings)
        own_ends = info.text.end_tokens if info.text is not None and not params.ignore_eos else frozenset()
        self.stop_tokens = params.stop_tokens | own_ends
        self.sequence.processors = processors_of(params, self.stop_tokens, self.grammar)
        self.sequence.logprobs = params.logprobs
        self.started = time.monotonic()
        replay, reason = self._replay(rule, resident)
        cached = self.sequence.cached
        self.stream.put(Started(len(params.prompt), seed, rule, depth, cached, replay, reason, info.fingerprint))

    def _replay(self, rule: Rule, resident: Resident) -> tuple[Replay, str]:
        if rule is Rule.REJECTION and not self.params.sampling.greedy:
            return Replay.NONE, "under rejection the tokens depend on the drafts; give a seed for coupling"
        return resident.info.replay, resident.info.replay_reason

    def timed(self, done: Round) -> None:
        """Count the time of a round that the sequence took part in."""
        self.seconds_draft += done.seconds_draft
        self.seconds_verify += done.seconds_verify
        self.seconds_commit += done.seconds_commit

    def emit(self, tokens: list[int], logprobs: tuple[TokenLogprob, ...] = ()) -> bool:
        """Pass on newly committed tokens, up to whatever ends the reply.

        Args:
            logprobs: one per token, or none at all.

        Returns:
            whether it ended.
        """
        assert self.sequence is not None
        kept: list[int] = []
        text = ""
        reason: FinishReason | None = None
        stop: str | int | None = None
        for token in tokens:
            if token in self.stop_tokens:
                reason, stop = FinishReason.STOP_TOKEN, token
                break
            kept.append(token)
            text += self._shown(token)
            if self.scanner.found is not None:
                reason, stop = FinishReason.STOP_STRING, self.scanner.found
                break
        self.emitted += len(kept)
        if reason is None and len(self.sequence.tokens) >= self.sequence.limit:
            whole = self.emitted >= self.params.max_tokens
            reason = FinishReason.MAX_TOKENS if whole else FinishReason.CONTEXT_LIMIT
        if kept or text:
            self.stream.put(Delta(tuple(kept), text, logprobs[: len(kept)]))
        if reason is not None:
            self.finish(reason, stop=stop)
        return reason is not None

    def _shown(self, token: int) -> str:
        return "" if self.growing is None else self.scanner.add(self.growing.add(token))

    def finish(self, reason: FinishReason, *, stop: str | int | None = None, error: EngineError | None = None) -> None:
        """The last event. Text held back for a stop string that did not come is shown first."""
        if rest := self.scanner.rest():
            self.stream.put(Delta((), rest))
        self.stream.put(Finished(reason, self._statistics(), stop, error))

    def _statistics(self) -> Statistics:
        now = time.monotonic()
        started = self.started or now
        prefilled = self.prefilled or now
        run = self.sequence
        return Statistics(
            prompt_tokens=len(self.params.prompt),
            completion_tokens=self.emitted,
            rounds=run.rounds if run else 0,
            drafted=tuple(run.drafted) if run else (),
            accepted=tuple(run.accepted) if run else (),
            seconds_queued=started - self.submitted,
            seconds_prefill=max(0.0, prefilled - started) if self.started else 0.0,
            seconds_decode=now - prefilled if self.prefilled else 0.0,
            depths=tuple(run.depths) if run else (),
            cached_tokens=run.cached if run else 0,
            seconds_draft=self.seconds_draft,
            seconds_verify=self.seconds_verify,
            seconds_commit=self.seconds_commit,
        )

    def cut(self, now: float, slow_reader_limit: float) -> FinishReason | None:
        """Why the request must end now though its reply has not, if so. Also notes when its reader fell behind."""
        full = self.stream.full
        self.paused = (self.paused or now) if full else None
        if self.stream.cancelled:
            return FinishReason.CANCELLED
        if self.params.time_limit is not None and now - self.submitted >= self.params.time_limit:
            return FinishReason.TIME_LIMIT
        if self.paused is not None and now - self.paused >= slow_reader_limit:
            return FinishReason.SLOW_READER
        return None

    def next_look(self, slow_reader_limit: float) -> float | None:
        """The time at which `cut` may change its mind by itself."""
        times = []
        if self.params.time_limit is not None:
            times.append(self.submitted + self.params.time_limit)
        if self.paused is not None:
            times.append(self.paused + slow_reader_limit)
        return min(times, default=None)
