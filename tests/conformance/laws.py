"""Pairs of target and draft laws, and the check that a sample follows a law."""

from __future__ import annotations

import math
from statistics import NormalDist

import mlx.core as mx
import numpy as np

from mlx_mtp_backend.api import Rule, Sampling
from mlx_mtp_backend.decode import acceptance, noise, sampling
from mlx_mtp_backend.decode.acceptance import draft_purpose
from mlx_mtp_backend.decode.sampling import Law

# Family-wise error of the whole Law suite, shared by every comparison in it; seeds are fixed, so a pass stays a pass.
ALPHA = 1e-4
COMPARISONS = 4000
Z_CUT = -NormalDist().inv_cdf(ALPHA / COMPARISONS / 2)
Z_POWER = -NormalDist().inv_cdf(1e-3)


def detectable(trials: int, p: float = 0.5) -> float:
    """The error in a token's probability that `trials` draws reveal with power 0.999."""
    return (Z_CUT + Z_POWER) * math.sqrt(p * (1 - p) / trials)


def log(p: list[float]) -> mx.array:
    with np.errstate(divide="ignore"):
        return mx.array(np.log(np.array(p, dtype=np.float64)).astype(np.float32))


def small_pairs() -> dict[str, tuple[mx.array, mx.array]]:
    """V = 8, dense log-laws from equal to disjoint; token 0 carries residual mass in most."""
    p = [0.30, 0.05, 0.20, 0.02, 0.13, 0.10, 0.15, 0.05]
    far = [0.02, 0.30, 0.05, 0.25, 0.10, 0.18, 0.04, 0.06]
    return {
        "equal": (log(p), log(p)),
        "near": (log(p), log([0.26, 0.07, 0.22, 0.03, 0.12, 0.11, 0.13, 0.06])),
        "far": (log(p), log(far)),
        "draft is certain": (log(p), log([0, 0, 1, 0, 0, 0, 0, 0])),
        "target is certain": (log([0, 0, 0, 1, 0, 0, 0, 0]), log(far)),
        "draft truncated": (log(p), log([0.5, 0, 0.3, 0, 0, 0.2, 0, 0])),
        "target truncated": (log([0.6, 0, 0, 0, 0.4, 0, 0, 0]), log(far)),
        "disjoint": (log([0.5, 0, 0.2, 0, 0.3, 0, 0, 0]), log([0, 0.25, 0, 0.25, 0, 0.25, 0, 0.25])),
    }


def transformed_pairs() -> dict[str, tuple[mx.array, mx.array, Sampling]]:
    """Logits with ties at every border, to be put through the transforms."""
    logits = mx.array([1.5, 0.5, 1.5, -1.0, 0.5, 0.5, 1.0, -2.0])
    draft = mx.array([0.5, 1.5, 1.0, 0.5, 0.5, -1.0, 1.5, 0.0])
    return {
        "top-k 3 through a tie": (logits, draft, Sampling(0.7, top_k=3)),
        "top-k 4 through a tie": (logits, draft, Sampling(1.0, top_k=4)),
        "top-p 0.2 through a tie": (logits, draft, Sampling(1.0, top_p=0.2)),
        "top-p 0.75 through a tie": (logits, draft, Sampling(0.35, top_p=0.75)),
        "min-p": (logits, draft, Sampling(1.3, min_p=0.4)),
        "all": (logits, draft, Sampling(0.6, top_k=6, top_p=0.9, min_p=0.05)),
    }


def penalised(logits: np.ndarray, sampling: Sampling, history: list[int]) -> np.ndarray:
    """Bias and penalties by definition, token by token, in float32 as the engine computes."""
    one = np.float32
    changed = logits.astype(one)
    for token, bias in sampling.logit_bias:
        changed[token] += one(bias)
    for token in set(history):
        logit, penalty = changed[token], one(sampling.repetition_penalty)
        taken = one(history.count(token)) * one(sampling.frequency_penalty) + one(sampling.presence_penalty)
        changed[token] = (logit / penalty if logit > 0 else logit * penalty) - taken
    return changed


def repeat(law: Law, rows: int) -> Law:
    ids = None if law.ids is None else mx.repeat(law.ids, rows, axis=0)
    return Law(mx.repeat(law.logp, rows, axis=0), ids)


def emitted(rule: Rule, p: Law, q: Law, vocab_size: int, trials: int, seed: int) -> tuple[np.ndarray, float]:
    """Draft, judge and emit `trials` times at as many positions: counts per token, and the share of drafts kept."""
    keys, positions = noise.keys([seed] * trials), mx.arange(trials) + 5
    p, q = repeat(p, trials), repeat(q, trials)
    drafts = sampling.choose(q, keys, positions, draft_purpose(rule))
    if rule is Rule.COUPLING:
        outcome = acceptance.couple(p, drafts, keys, positions)
    else:
        outcome = acceptance.reject(p, q, drafts, vocab_size, keys, positions)
    tokens = mx.where(outcome.stands, drafts, outcome.token)
    return np.bincount(np.array(tokens), minlength=vocab_size), float(mx.mean(outcome.stands).item())


def worst_z(counts: np.ndarray, law: np.ndarray) -> float:
    """Largest deviation of the counts from the law, in standard errors; infinite where the law forbids a token."""
    trials = counts.sum()
    if counts[law <= 0].any():
        return math.inf
    keep = law > 0
    expected, observed = trials * law[keep], counts[keep]
    if (law >= 1).any():
        return 0.0 if observed.max() == trials else math.inf
    return float(np.max(np.abs(observed - expected) / np.sqrt(expected * (1 - law[keep]))))
