"""What a request does to its logits before the sampler: bias, penalties, excluded ends, response format.

A row's logits change by that row's history alone: the committed tokens and the drafts that the row follows. Everything
here is per sequence and touches few columns; sequences that ask for nothing have no processors and cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_mtp_backend.api import GenerateParams
from mlx_mtp_backend.decode.penalties import History, penalise
from mlx_mtp_backend.host import evaluate, ints
from mlx_mtp_backend.language.grammar import Grammar, Mask

_WORD = 32


class Processors:
    """The logits processors of one sequence, with the state that follows its committed tokens.

    Args:
        ends: ids that end the reply.
        grammar: the response format; its state belongs to this object.
    """

    def __init__(self, params: GenerateParams, ends: frozenset[int], grammar: Grammar | None = None) -> None:
        self._sampling = params.sampling
        self._history = History(params.prompt) if params.sampling.penalises else None
        self._ends = sorted(ends)
        self._forced = params.min_tokens if ends else 0  # tokens before which the reply must not end
        self._grammar = grammar
        self._generated = 0
        self.looks_ahead = grammar is not None

    def apply(self, logits: mx.array, drafts: mx.array) -> mx.array:
        """Processed logits, float32 [R, V].

        Args:
            logits: float32 [R, V]; the last row follows all drafts, each row before it one draft less.
            drafts: int32 [E], E >= R - 1; evaluated where `looks_ahead`.

        Raises:
            EngineError: GRAMMAR_LIMIT.
        """
        if self._sampling.logit_bias:
            ids, biases = zip(*self._sampling.logit_bias, strict=True)
            logits = logits.at[:, mx.array(ids)].add(mx.array(biases, mx.float32))
        if self._history is not None:
            logits = penalise(logits, self._sampling, self._history, drafts)
        if self._grammar is not None:
            masks = self._masks(self._grammar, logits.shape[0], tuple(ints(drafts)), logits.shape[-1])
            return _masked(logits, mx.array(masks))
        bound = min(self._forced - self._generated - (drafts.shape[0] + 1 - logits.shape[0]), logits.shape[0])
        return logits.at[:bound, mx.array(self._ends)].add(-math.inf) if bound > 0 else logits

    def _masks(self, grammar: Grammar, rows: int, drafts: tuple[int, ...], vocab_size: int) -> Mask:
        """uint32 [rows, words]."""
        masks = []
        for length in range(len(drafts) + 1 - rows, len(drafts) + 1):
            mask = _widened(grammar.mask(drafts[:length]), vocab_size)
            if self._generated + length < self._forced or not grammar.binds(drafts[:length]):
                mask = _without(mask, self._ends)
            masks.append(mask)
        return np.stack(masks)

    def commit(self, tokens: list[int]) -> None:
        """Follow newly committed tokens."""
        self._generated += len(tokens)
        if self._history is not None:
            self._history.add(tokens)
        if self._grammar is not None:
            self._grammar.commit(tokens)


def processors_of(params: GenerateParams, ends: frozenset[int], grammar: Grammar | None = None) -> Processors | None:
    """A request's processors; None where it asks for nothing that they do."""
    sampling = params.sampling
    asks = sampling.logit_bias or sampling.penalises or params.min_tokens or grammar
    return Processors(params, ends, grammar) if asks else None


def processed(logits: mx.array, parts: Sequence[tuple[Processors, slice, mx.array | None]]) -> mx.array:
    """The logits of a pass, with the rows of these sequences through their processors.

    Args:
        logits: [N, V].
        parts: processors, rows and drafts (None for none) of each sequence that has any, in the order of the rows.
    """
    if not parts:
        return logits
    awaited = [drafts for processors, _, drafts in parts if processors.looks_ahead and drafts is not None]
    if awaited:
        mx.async_eval(logits)  # type: ignore[no-untyped-call]  # the pass runs while the masks are computed
        evaluate(awaited)
    logits = logits.astype(mx.float32)
    done, end = [], 0
    for processors, rows, drafts in parts:
        follows = mx.zeros((0,), mx.int32) if drafts is None else drafts
        done += [logits[end : rows.start], processors.apply(logits[rows], follows)]
        end = rows.stop
    return mx.concatenate([*done, logits[end:]])


def _masked(logits: mx.array, masks: mx.array) -> mx.array:
    """-inf where a token's bit is not set. masks: uint32 [R, words], bit t % 32 of word t // 32 for token t."""
    bits = (masks[..., None] >> mx.arange(_WORD, dtype=mx.uint32)) & 1
    allowed = bits.astype(mx.bool_).reshape(logits.shape[0], -1)[:, : logits.shape[-1]]
    return mx.where(allowed, logits, -math.inf)


def _widened(mask: Mask | None, vocab_size: int) -> Mask:
    """The mask over the model's whole vocabulary; ids without a token in the tokenizer are not allowed."""
    words = -(-vocab_size // _WORD)
    if mask is None:
        return np.full(words, 0xFFFFFFFF, dtype=np.uint32)
    return np.pad(mask[:words], (0, max(0, words - len(mask))))


def _without(mask: Mask, ends: list[int]) -> Mask:
    """The mask less the ends, unless nothing else is left."""
    less = mask.copy()
    for end in ends:
        less[end // _WORD] &= np.uint32(0xFFFFFFFF ^ (1 << end % _WORD))
    return less if less.any() else mask
