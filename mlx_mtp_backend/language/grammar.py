"""Response formats: compiled once, then followed token by token. No MLX here; llguidance does the work.

A row of a verify pass is masked with what the grammar allows after the drafts that the row follows. Nothing is taken
back when drafts fall: the grammar itself moves on by committed tokens only, and looks ahead in copies, which share all
that is large.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mlx_mtp_backend.api import FormatKind, ResponseFormat
from mlx_mtp_backend.errors import EngineError, ErrorReason
from mlx_mtp_backend.language.json_schema import SchemaError, enforceable

log = logging.getLogger(__name__)

MAX_KEPT = 32  # compiled formats kept for the next request with the same rule

# A compilation takes at most some 100 ms and a mask some 10 ms; more is refused. The lexer's states take 1-2 kB each.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=100_000,
    max_lexer_states=50_000,
    max_grammar_size=100_000,
    step_lexer_fuel=100_000,
    step_max_items=10_000,
    verbose_errors=False,
)
# Between JSON tokens: a space, or line breaks and an indent. Unbounded, a model can fill its answer with blanks.
_JSON_OPTIONS: Any = {"whitespace_pattern": r" |\n{1,2}[ \t]{0,20}", "lenient": False, "coerce_one_of": False}

# What llguidance says of a schema, by a part of its message, in our words.
_SCHEMA_PROBLEMS = {
    "oneOf": "oneOf is followed only where no value can fit two of its branches",
    "Unknown format": "it names a format that is not enforced",
    "Unsatisfiable": "nothing can satisfy it",
    "NoExtension": "nothing can satisfy it",
    "registry": "a $ref or $schema leads outside it",
    "too large": "it is too large",
    "Invalid type": "a type is none of JSON Schema's",
    "type must be": "a type is none of JSON Schema's",
    "Pointer": "a $ref points at nothing",
    "regex parse error": "a pattern is no regular expression that can be followed",
    "Expected ": "a keyword has a value of a kind that it cannot have",
}

Mask = NDArray[np.uint32]


class Grammars:
    """The formats of one tokenizer. Safe to use from any thread.

    Args:
        ends: ids that end a reply.
    """

    def __init__(self, tokenizer: Tokenizer, ends: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._ends = ends
        self._lock = threading.Lock()
        self._reading = threading.Lock()  # its own, so that a kept format is found at once while a vocabulary is read
        self._read: LLTokenizer | None = None
        self._kept: OrderedDict[tuple[FormatKind, str], LLMatcher] = OrderedDict()

    def compile(self, wanted: ResponseFormat) -> Grammar:
        """The grammar of a format; quick if the same rule was compiled before. Takes up to a second the first time.

        Raises:
            EngineError: INVALID_PARAMS for a rule that cannot be followed, or a model that has no end-of-sequence id.
        """
        if not self._ends:
            raise _refused("the model has no token that ends a reply")
        key = (wanted.kind, wanted.rule)
        with self._lock:
            matcher = self._kept.get(key)
        if matcher is None:
            matcher = _compiled(self._vocabulary("response_format"), wanted)
        with self._lock:
            self._kept[key] = matcher
            self._kept.move_to_end(key)
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return Grammar(matcher.deep_copy(), self._ends, wanted.after)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; none for an id that only pads the model's vocabulary.

        Raises:
            EngineError: INVALID_PARAMS for a tokenizer of a kind that llguidance does not read.
        """
        vocabulary = self._vocabulary("logprobs")
        return b"" if self._tokenizer.id_to_token(token) is None else vocabulary.decode_bytes([token])

    def _vocabulary(self, field: str) -> LLTokenizer:
        with self._reading:
            if self._read is None:
                try:
                    self._read = LLTokenizer(self._tokenizer.to_str(), eos_token=sorted(self._ends) or None)
                except ValueError as error:
                    log.info("llguidance cannot read a tokenizer: %s", error)
                    detail = "this model's tokenizer is of a kind that cannot be read token by token"
                    raise EngineError(ErrorReason.INVALID_PARAMS, detail, field=field) from None
            return self._read


def _compiled(vocabulary: LLTokenizer, wanted: ResponseFormat) -> LLMatcher:
    """A matcher at the beginning of a reply, which has at least one."""
    match wanted.kind:
        case FormatKind.JSON_SCHEMA:
            try:
                source = LLMatcher.grammar_from_json_schema(enforceable(wanted.rule), overrides=_JSON_OPTIONS)
            except SchemaError as error:
                raise _refused(f"this JSON Schema cannot be followed: {error}") from None
        case FormatKind.REGEX:
            source = LLMatcher.grammar_from_regex(wanted.rule)
        case FormatKind.LARK:
            _check_lark(wanted.rule)
            source = LLMatcher.grammar_from_lark(wanted.rule)
    matcher = LLMatcher(vocabulary, source, log_level=0, limits=_LIMITS)
    probe = matcher.deep_copy()
    nothing = not any(probe.compute_bitmask())
    if problem := probe.get_error():
        log.info("a response format was refused: %s", problem.partition("\n")[0][:300])
    if nothing or probe.is_error():
        raise _refused(_problem(wanted.kind, problem))
    return matcher


def _problem(kind: FormatKind, message: str) -> str:
    match kind:
        case FormatKind.JSON_SCHEMA:
            why = next((text for part, text in _SCHEMA_PROBLEMS.items() if part in message), "it asks for too much")
            return f"this JSON Schema cannot be followed: {why}"
        case FormatKind.REGEX:
            return "this is not a regular expression, uses look-around, or is too large to be followed"
        case FormatKind.LARK:
            return "this is not a grammar, or it is too large to be followed"


def _check_lark(rule: str) -> None:
    """Refuses what would be ignored, or checked by nobody."""
    if re.search(r"%json\b", rule):
        raise _refused("%json cannot stand in a grammar: a JSON Schema is a response format of its own")
    if re.search(r"\[[^\]]*\btemperature\s*=", rule):
        raise _refused("a rule of a grammar cannot have a temperature of its own")


def _refused(why: str) -> EngineError:
    return EngineError(ErrorReason.INVALID_PARAMS, why, field="response_format")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a reply stands in its format. `matcher` None: in free text that no mask binds."""

    matcher: LLMatcher | None
    waiting: bool = False  # for the token that the format starts after


_FREE = _Place(None)


class Grammar:
    """The format of one reply, as far as it has got.

    Args:
        matcher: at the beginning of the format; belongs to this object.
        ends: ids that end the reply.
        after: see ResponseFormat.
    """

    def __init__(self, matcher: LLMatcher, ends: frozenset[int], after: int | None) -> None:
        self._matcher = matcher
        self._ends = ends
        self._after = after
        self._here = _Place(matcher) if after is None else _Place(None, waiting=True)
        self._ahead: dict[tuple[int, ...], _Place] = {}
        self._masks: dict[tuple[int, ...], Mask | None] = {}

    def mask(self, drafts: tuple[int, ...]) -> Mask | None:
        """What may follow the committed tokens and these: bit t % 32 of word t // 32 for token t; None for all.

        After drafts that the grammar forbids anything may follow: they fall, and what follows them.

        Raises:
            EngineError: GRAMMAR_LIMIT.
        """
        if drafts not in self._masks:
            self._masks[drafts] = self._mask(self._place(drafts))
        return self._masks[drafts]

    def commit(self, tokens: list[int]) -> None:
        """Move on."""
        self._here = self._place(tuple(tokens))
        self._ahead.clear()
        self._masks.clear()

    def binds(self, drafts: tuple[int, ...]) -> bool:
        """Whether the format has begun after these drafts."""
        return not self._place(drafts).waiting

    def _place(self, drafts: tuple[int, ...]) -> _Place:
        if not drafts:
            return self._here
        if drafts not in self._ahead:
            self._ahead[drafts] = self._next(self._place(drafts[:-1]), drafts[-1])
        return self._ahead[drafts]

    def _next(self, place: _Place, token: int) -> _Place:
        if place.waiting:
            return _Place(self._matcher) if token == self._after else place
        if place.matcher is None or token in self._ends:
            return _FREE
        after = place.matcher.deep_copy()
        if after.consume_token(token) or _permits(place.matcher, token):
            return _Place(after)  # one that broke off at a token it permits is told by its mask
        return _FREE

    def _mask(self, place: _Place) -> Mask | None:
        if place.matcher is None:
            return None
        words = np.frombuffer(place.matcher.compute_bitmask(), dtype=np.uint32)
        if place.matcher.is_error():
            log.info("a grammar broke off: %s", place.matcher.get_error().partition("\n")[0][:300])
            raise EngineError(ErrorReason.GRAMMAR_LIMIT, "following the response format takes too much work")
        return words


def _permits(matcher: LLMatcher, token: int) -> bool:
    """Whether it lets the token follow, or has broken off itself."""
    words = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint32)
    if matcher.is_error():
        return True
    return token // 32 < len(words) and bool(words[token // 32] >> token % 32 & 1)
