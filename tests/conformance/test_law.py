"""Law: under either rule every emitted token follows the target's law, whatever the draft's law was."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp_backend.api import Rule, Sampling
from mlx_mtp_backend.decode import acceptance, noise, sampling
from mlx_mtp_backend.decode.acceptance import residual
from mlx_mtp_backend.decode.sampling import Law
from tests.conformance import laws
from tests.conformance.planting import planted

TRIALS = 300_000
LARGE = 248_320


def probabilities(law: mx.array) -> np.ndarray:
    return np.exp(np.array(law, dtype=np.float64))


def test_rejection_in_closed_form(establish):
    """min(p, q) + (mass rejected) * residual = p for every pair, and the residual is a law wherever it is used."""
    worst = 0.0
    for p, q in laws.small_pairs().values():
        target, proposal = probabilities(p), probabilities(q)
        kept = np.minimum(target, proposal)
        rest = probabilities(residual(p[None], q[None]).logp)[0]
        assert rest.sum() == pytest.approx(1, abs=1e-5)
        worst = max(worst, float(np.abs(kept + (1 - kept.sum()) * rest - target).max()))
    establish("law", "rejection, closed form, V=8", len(laws.small_pairs()), f"|error| {worst:.1e}")
    assert worst < 1e-6


def pure_law(rule: Rule, trials: int = TRIALS, seed: int = 20) -> float:
    """The worst deviation over all pairs and transforms, in standard errors."""
    worst = 0.0
    for p, q in laws.small_pairs().values():
        counts, _ = laws.emitted(rule, Law(p[None]), Law(q[None]), 8, trials, seed)
        worst = max(worst, laws.worst_z(counts, probabilities(p)))
    for logits, draft, parameters in laws.transformed_pairs().values():
        p_law, q_law = (sampling.transform(x[None], parameters) for x in (logits, draft))
        counts, _ = laws.emitted(rule, p_law, q_law, 8, trials, seed)
        worst = max(worst, laws.worst_z(counts, defined_law(logits, parameters)))
    return worst


def defined_law(logits: mx.array, sampling: Sampling) -> np.ndarray:
    """The transforms by definition: a stable full sort, in float64."""
    values = np.array(logits, dtype=np.float64)
    order = np.argsort(-values, kind="stable")[: sampling.top_k or None]
    p = np.exp(values[order])
    p /= p.sum()
    keep = (np.cumsum(p) - p < sampling.top_p) & (p >= sampling.min_p * p[0])
    law = np.zeros(values.size)
    law[order[keep]] = np.exp(values[order[keep]] / sampling.temperature)
    return law / law.sum()


@pytest.mark.parametrize("rule", Rule)
def test_the_output_law_by_many_draws(rule, establish):
    worst = pure_law(rule)
    cells = len(laws.small_pairs()) + len(laws.transformed_pairs())
    found = laws.detectable(TRIALS)
    establish("law", f"{rule.value}, {TRIALS} draws, V=8, power 0.999 at {found:.3f}", cells, f"{worst:.1f} sigma")
    assert worst < laws.Z_CUT


@pytest.mark.parametrize("rule", Rule)
def test_acceptance_is_what_the_rule_promises(rule, establish):
    """Rejection keeps exactly 1 - TV of the drafts; coupling at least (1 - TV) / (1 + TV) and at most 1 - TV."""
    slack = laws.detectable(TRIALS)
    for p, q in laws.small_pairs().values():
        overlap = float(np.minimum(probabilities(p), probabilities(q)).sum())
        _, kept = laws.emitted(rule, Law(p[None]), Law(q[None]), 8, TRIALS, 21)
        lowest = overlap if rule is Rule.REJECTION else overlap / (2 - overlap)
        assert lowest - slack <= kept <= overlap + slack
    establish("law", f"{rule.value}, share of drafts kept", len(laws.small_pairs()), f"within {slack:.3f}")


def large_pair() -> tuple[Law, Law, np.ndarray]:
    """V = 248,320: half of the mass on a tail of tokens around 2e-6 each; the draft favours other parts of it."""
    ranks = np.arange(LARGE, dtype=np.float64)
    p = np.where(ranks < 16, 0.5 / 16, 0.5 / (LARGE - 16))
    q = np.where(ranks < 16, 0.7 / 16, 0.3 * (ranks % 3 == 0))
    q[16:] *= 0.3 / q[16:].sum()
    p, q = p / p.sum(), q / q.sum()
    as_law = lambda x: Law(laws.log(x.tolist())[None])  # noqa: E731
    return as_law(p), as_law(q), p


@pytest.mark.parametrize(("rule", "draws"), [(Rule.COUPLING, 240), (Rule.REJECTION, 240)])
def test_a_large_vocabulary_keeps_its_tail(rule, draws, establish):
    p, q, law = large_pair()
    counts = np.zeros(LARGE, dtype=np.int64)
    for start in range(0, draws, 8):
        counts += laws.emitted(rule, p, q, LARGE, 8, 1000 + start)[0]
    tail, third = counts[16:].sum(), counts[16:][np.arange(LARGE - 16) % 3 == 2].sum()
    z = max(
        abs(count - draws * mass) / math.sqrt(draws * mass * (1 - mass))
        for count, mass in ((tail, law[16:].sum()), (third, law[18::3].sum()))
    )
    establish("law", f"{rule.value}, tail mass, V=248,320, {draws} draws", 2, f"{z:.1f} sigma")
    assert z < laws.Z_CUT
    assert counts[16:].max() <= 3


def test_the_race_resolves_the_tail():
    """A token of probability 1e-7 can win: capped noise (largest Gumbel value 16.6) could never let it."""
    smallest = noise.log_exponential(mx.array([0], mx.uint32)).item()
    assert -smallest > math.log(1e9)


BUGS = [
    (
        "no residual: a rejected row draws from p",
        acceptance,
        "choose(residual(target, proposal), keys",
        "choose(Law(target), keys",
        Rule.REJECTION,
    ),
    (
        "ratio inverted",
        acceptance,
        "accept * mx.exp(q_draft) < mx.exp(p_draft)",
        "accept * mx.exp(p_draft) < mx.exp(q_draft)",
        Rule.REJECTION,
    ),
    (
        "ratio with a q other than the one sampled",
        acceptance,
        "accept * mx.exp(q_draft) <",
        "accept * mx.exp(q_draft / 0.7) <",
        Rule.REJECTION,
    ),
    ("accept draw reused for the residual", acceptance, "Purpose.RESIDUAL", "Purpose.ACCEPT", Rule.REJECTION),
    ("draft's noise reused for the residual", acceptance, "Purpose.RESIDUAL", "Purpose.DRAFT", Rule.REJECTION),
    (
        "rejected drafts emitted",
        acceptance,
        "stands = accept * mx.exp(q_draft) < mx.exp(p_draft)",
        "stands = accept * mx.exp(q_draft) < 2 * mx.exp(p_draft)",
        Rule.REJECTION,
    ),
    (
        "coupled draft emitted unchecked",
        acceptance,
        "Outcome(token == drafts, token)",
        "Outcome(token >= 0, token)",
        Rule.COUPLING,
    ),
    (
        "ties fall to the highest id",
        sampling,
        "mx.arange(logits.shape[-1]).astype(mx.uint64)",
        "mx.arange(logits.shape[-1])[::-1].astype(mx.uint64)",
        Rule.COUPLING,
    ),
    (
        "top-p tie rule broken: every token equal to the last is kept",
        sampling,
        "kept = mx.where(before < sampling.top_p, kept, -math.inf)",
        "kept = mx.where(kept >= mx.min(mx.where(before < sampling.top_p, kept, 9.0), -1, keepdims=True), kept, -99.0)",
        Rule.COUPLING,
    ),
    (
        "top-p before top-k",
        sampling,
        "kept if sampling.top_k else logits, axis=-1",
        "logits, axis=-1",
        Rule.COUPLING,
    ),
    (
        "temperature before top-p",
        sampling,
        "p = mx.exp(kept - mass)",
        "p = mx.softmax(kept / sampling.temperature, axis=-1)",
        Rule.COUPLING,
    ),
    (
        "noise race without the law",
        sampling,
        "noise.log_exponential(draws) - law.logp",
        "noise.log_exponential(draws)",
        Rule.COUPLING,
    ),
]


@pytest.mark.parametrize(("bug", "module", "old", "new", "rule"), BUGS, ids=[bug[0] for bug in BUGS])
def test_a_planted_bug_is_caught(bug, module, old, new, rule, caught):
    with planted(module, old, new):
        worst = pure_law(rule, trials=20_000)
    assert worst > laws.Z_CUT
    caught(bug, f"test_the_output_law_by_many_draws ({rule.value}): {worst:.0f} sigma")
