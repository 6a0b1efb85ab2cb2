"""Is the head wired right? A wrong norm, order or alignment costs acceptance and never raises, so it is measured.

Teacher-forced: one trunk pass over a short text gives its choice after every prefix; one head pass over the same text
must agree with it one position later. The control asks for the choice two positions later instead, where agreement
can only be chance; positions where the trunk chooses the same token twice tell nothing and are left out.
"""

from __future__ import annotations

from collections.abc import Generator

import mlx.core as mx

from mlx_mtp_backend import cache
from mlx_mtp_backend.api import LoadProgress, Rule, Sampling
from mlx_mtp_backend.decode import acceptance, noise, sampling
from mlx_mtp_backend.families.base import Model, Segment
from mlx_mtp_backend.host import ints, number
from mlx_mtp_backend.models import ENOUGH, WiringReport

# Half prose, half code, as heads accept far more of the second.
TEXT = '''\
The pump stopped at six in the morning. By seven the basin was full, and the night shift had already called twice. \
When the engineer arrived she checked the valve, then the breaker, and found that the breaker had tripped.

def mean(values):
    """Return the arithmetic mean of a list of numbers."""
    if not values:
        raise ValueError("values must not be empty")
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

for name in ["alpha", "beta", "gamma"]:
    print(name, mean([1.0, 2.0, 3.0]))
'''
MAX_TOKENS = 192
HEALTHY = 0.25
MARGIN = 2.0
BETTER = 0.02
_ROWS_AT_ONCE = 64
_TYPICAL = Sampling(temperature=0.6, top_p=0.95)


def check(model: Model, tokens: list[int]) -> Generator[LoadProgress, None, WiringReport]:
    """Measure the present wiring and its known alternatives, one pass a slice.

    Args:
        tokens: the text, at least 8 tokens; at most MAX_TOKENS are used.
    """
    tokens = tokens[:MAX_TOKENS]
    others = model.alternatives()
    trunk, head = teacher_forced(model, tokens)
    yield LoadProgress("wiring", 0.0)
    told, agreement, control = _agreement(trunk, head)
    rules = {rule: _kept(rule, trunk[1:], head[:-1]) for rule in Rule}
    alternatives = {}
    for done, (name, other) in enumerate(others.items(), 1):
        yield LoadProgress("wiring", done / (len(others) + 1))
        alternatives[name] = _agreement(*teacher_forced(other, tokens))[1]
    yield LoadProgress("wiring", 1.0)
    best = max(alternatives, key=lambda name: alternatives[name])
    better = best if alternatives[best] > agreement + BETTER else None
    healthy = told >= ENOUGH and agreement >= HEALTHY and agreement > MARGIN * control
    return WiringReport(told, agreement, control, alternatives, better, rules, healthy)


def teacher_forced(model: Model, tokens: list[int]) -> tuple[mx.array, mx.array]:
    """Logits of trunk and head over the text.

    Returns:
        trunk [T, V], whose row p predicts token p + 1, and head [T - 1, V], whose row p predicts token p + 2.
    """
    caches, head_caches = model.trunk_caches(), model.head_caches()
    row = mx.array(tokens, mx.int32)
    cache.begin(caches)
    hidden = model.trunk(row, [Segment(caches, len(tokens))])
    cache.begin(head_caches)
    drafted = model.head(row[1:], hidden.carried[:-1], [Segment(head_caches, len(tokens) - 1)])
    return _logits(model, hidden.normed), _logits(model, drafted.normed)


def _logits(model: Model, normed: mx.array) -> mx.array:
    """Some rows at a time: a whole text's logits of a large vocabulary are only ever needed as half floats."""
    parts = []
    for start in range(0, normed.shape[0], _ROWS_AT_ONCE):
        part = model.logits(normed[start : start + _ROWS_AT_ONCE])
        mx.eval(part)
        parts.append(part)
    return mx.concatenate(parts)


def _agreement(trunk: mx.array, head: mx.array) -> tuple[int, float, float]:
    """How many positions tell something, and the head's agreement there with the next choice and the one after."""
    chosen, drafted = ints(mx.argmax(trunk, axis=-1)), ints(mx.argmax(head, axis=-1))
    told = [p for p in range(len(chosen) - 2) if chosen[p + 1] != chosen[p + 2]]
    right = sum(drafted[p] == chosen[p + 1] for p in told)
    late = sum(drafted[p] == chosen[p + 2] for p in told)
    return len(told), right / max(len(told), 1), late / max(len(told), 1)


def _kept(rule: Rule, target: mx.array, draft: mx.array) -> float:
    """Drafts each rule keeps, by drawing once at every position."""
    count = min(target.shape[0], draft.shape[0])
    positions = mx.arange(count)
    p, q = sampling.transform(target[:count], _TYPICAL), sampling.transform(draft[:count], _TYPICAL)
    keys = noise.keys([0] * count)
    drafts = sampling.choose(q, keys, positions, acceptance.draft_purpose(rule))
    if rule is Rule.COUPLING:
        outcome = acceptance.couple(p, drafts, keys, positions)
    else:
        outcome = acceptance.reject(p, q, drafts, target.shape[-1], keys, positions)
    return number(mx.mean(outcome.stands.astype(mx.float32)))
