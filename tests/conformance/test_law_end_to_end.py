"""Law, through the whole round: the joint law of two tokens that one or two rounds emit, on a real small model."""

import re

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp_backend import cache
from mlx_mtp_backend.api import FormatKind, GenerateParams, ResponseFormat, Rule, Sampling
from mlx_mtp_backend.decode import acceptance, noise, penalties, processors, rounds, sampling
from mlx_mtp_backend.decode.drafters import HeadDrafter, ScriptedDrafter
from mlx_mtp_backend.decode.processors import processors_of
from mlx_mtp_backend.families.base import Segment
from mlx_mtp_backend.language.text import load_text
from mlx_mtp_backend.synthetic import Recipe, write
from tests.conformance import decode, laws
from tests.conformance.planting import planted

PROMPT = [(59 * i + 3) % 690 for i in range(12)]
SAMPLINGS = {
    "top-k 3": Sampling(1.2, top_k=3),
    "top-p 0.5": Sampling(0.8, top_k=8, top_p=0.5),
    "all tokens": Sampling(1.0),
    # The bias brings tokens of the prompt and others among the first three, where the penalties can be seen.
    "penalties and bias": Sampling(
        0.9,
        top_k=3,
        repetition_penalty=1.2,
        presence_penalty=1.5,
        frequency_penalty=-4.0,  # favours repetition, so that it can be seen within two tokens
        logit_bias=((PROMPT[2], 12.0), (PROMPT[7], 11.0), (101, 11.0), (202, 11.0)),
    ),
    "format": Sampling(1.0, top_k=4),
}
FORMAT = re.compile("[a-h][a-h ]{0,3}")
SEEDS = 400
AT_ONCE = 100
FEW = 64
CLASSES = 4


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """History-dependent, one Gated DeltaNet and one attention layer."""
    return write(tmp_path_factory.mktemp("small"), Recipe(layers=2, hidden=32, width=48, seed=1))


@pytest.fixture(scope="module")
def model(small):
    return decode.load(small)


@pytest.fixture(scope="module")
def text(small):
    return load_text(small)


@pytest.fixture(scope="module")
def joints(model, text):
    start = ready(model, SAMPLINGS["top-k 3"], Rule.COUPLING, 0).tokens
    return {name: joint_law(model, start, name, text) for name in SAMPLINGS}


def ready(model, parameters, rule, depth):
    """A sequence just past its prefill, to be forked under many seeds; its first token is the same each time."""
    one = decode.start(model, PROMPT, 12, sampling=Sampling(0.0), seed=0, rule=rule, depth=depth)
    decode.prefill(model, one)
    one.sampling = parameters
    return one


def processing(name: str, text) -> decode.Processing:
    parameters = SAMPLINGS[name]
    wanted = ResponseFormat(FormatKind.REGEX, FORMAT.pattern) if name == "format" else None

    def made(tokens):
        params = GenerateParams("small", tuple(tokens), sampling=parameters)
        return processors_of(params, text.end_tokens, text.compile(wanted) if wanted else None)

    return made


def joint_law(model, start: list[int], name: str, text) -> np.ndarray:
    """p(first) p(second | first), from plain passes and the processors' definitions: [V, V]."""
    caches = model.trunk_caches()
    parameters = SAMPLINGS[name]

    def after(tokens: list[int], reply: list[int], keep: int) -> np.ndarray:
        cache.begin(caches)
        hidden = model.trunk(mx.array(tokens), [Segment(caches, len(tokens))])
        logits = laws.penalised(np.array(model.logits(hidden.normed[-1:]))[0], parameters, start + reply)
        if name == "format":
            logits[~in_format(text, reply, model.vocab_size)] = -np.inf
        law = sampling.transform(mx.array(logits)[None], parameters).dense(model.vocab_size)
        cache.commit(caches, keep)
        return np.exp(np.array(law, dtype=np.float64))[0]

    first = after(start, [], len(start))
    joint = np.zeros((model.vocab_size, model.vocab_size))
    for token in np.flatnonzero(first):
        joint[token] = first[token] * after([int(token)], [int(token)], 0)
    return joint / joint.sum()


def in_format(text, reply: list[int], vocab_size: int) -> np.ndarray:
    """Which tokens keep the reply a beginning of what FORMAT matches: any whole match's beginnings but "" match too."""
    so_far = text.decode(reply)
    longer = [so_far + text.decode([token]) for token in range(vocab_size)]
    allowed = np.array([len(s) > len(so_far) and FORMAT.fullmatch(s) is not None for s in longer])
    allowed[list(text.end_tokens)] = bool(so_far)
    return allowed


def partitions(joint: np.ndarray) -> list[np.ndarray]:
    """Few enough cells to count: the pairs of a small law, else the pairs of token classes, and whether the second
    token repeats the first."""
    if np.count_nonzero(joint) <= FEW:
        return [joint.ravel()]
    member = np.arange(len(joint))[:, None] % CLASSES == np.arange(CLASSES)
    repeated = np.trace(joint)
    return [(member.T @ joint @ member).ravel(), np.array([repeated, joint.sum() - repeated])]


def worst_deviation(model, text, joint, name, rule, depth, kind, seeds=SEEDS) -> float:
    base = ready(model, SAMPLINGS[name], rule, depth)
    # A guess that is often right and never certain: the likeliest first token, at every position.
    guess = int(joint.sum(axis=1).argmax())
    scripted = ScriptedDrafter(lambda one, position: guess, model.vocab_size, (0.6,))
    drafter = HeadDrafter(model) if kind == "head" else scripted
    counts = np.zeros_like(joint)
    begin = len(base.tokens)
    for batch in range(0, seeds, AT_ONCE):
        forks = [decode.fork(base, seed * 0x9E3779B97F4A7C15 % 2**64) for seed in range(batch, batch + AT_ONCE)]
        for one in forks:
            one.processors = processing(name, text)(one.tokens)
        while short := [one for one in forks if len(one.tokens) < begin + 2]:
            rounds.run_round(model, drafter, short)
        for one in forks:
            counts[tuple(one.tokens[begin : begin + 2])] += 1
    if np.count_nonzero(joint) <= FEW:
        return laws.worst_z(counts.ravel(), joint.ravel())
    return max(laws.worst_z(seen, law) for seen, law in zip(partitions(counts), partitions(joint), strict=True))


CELLS = [
    (name, depth, rule, kind)
    for name in SAMPLINGS
    for depth in (0, 1, 2, 3)
    for rule in Rule
    for kind in ("guess", "head")
    # Without drafts neither the drafter nor the rule matters; one sampling is tried in full.
    if (depth > 0 or (rule is Rule.COUPLING and kind == "guess"))
    and (name == "top-k 3" or (kind == "guess" and depth < 3))
    and (name not in ("penalties and bias", "format") or depth == 2)
]


@pytest.mark.parametrize(("name", "depth", "rule", "kind"), CELLS)
def test_two_tokens_follow_their_joint_law(model, text, joints, name, depth, rule, kind, establish):
    worst = worst_deviation(model, text, joints[name], name, rule, depth, kind)
    what = f"two tokens, {rule.value}, depth {depth}, {kind}, {name}; power 0.999 at {laws.detectable(SEEDS):.2f}"
    establish("law", what, SEEDS, f"{worst:.1f} sigma")
    assert worst < laws.Z_CUT


POSITIONS = (
    noise,
    "position = mx.broadcast_to(positions.astype(mx.uint32), shape)",
    "position = mx.zeros(shape, mx.uint32)",
)
ROW_0 = (
    rounds,
    "logits = model.logits(hidden.normed)\n    outcome",
    "logits = model.logits(mx.concatenate([mx.repeat(hidden.normed[s.start : s.start + 1], s.stop - s.start, axis=0)"
    " for s in split_rows(segments)]))\n    outcome",
)
UNCHECKED = (
    acceptance,
    "while accepted < len(drafts) and stands[accepted]:",
    "while accepted < len(drafts) and (accepted == 0 or stands[accepted]):",
)
RESIDUAL = (acceptance, "choose(residual(target, proposal), keys", "choose(Law(target), keys")
ROW_0_COUNTS = (penalties, "(mx.arange(rows) + (length + 1 - rows))", "(mx.zeros(rows) + (length + 1 - rows))")
ROW_0_GRAMMAR = (
    processors,
    "mask = _widened(grammar.mask(drafts[:length]), vocab_size)",
    "mask = _widened(grammar.mask(drafts[: len(drafts) + 1 - rows]), vocab_size)",
)
BIAS_LAST = (
    rounds,
    "p = sampling.transform(logits, parameters)",
    "ids, biases = (mx.array(x) for x in zip(*parameters.logit_bias))\n"
    "    p = sampling.transform(logits.at[:, ids].add(-biases), parameters).dense(logits.shape[-1])\n"
    "    p = p.at[:, ids].add(biases / parameters.temperature)\n"
    "    p = Law(p - mx.logsumexp(p, axis=-1, keepdims=True))",
)
BUGS = [
    ("penalties of row 0 used for all rows", ROW_0_COUNTS, Rule.REJECTION, "penalties and bias"),
    ("bias after top-k", BIAS_LAST, Rule.COUPLING, "penalties and bias"),
    ("grammar state of row 0 used for all rows", ROW_0_GRAMMAR, Rule.COUPLING, "format"),
    ("noise reused across positions", POSITIONS, Rule.COUPLING, "all tokens"),
    ("noise reused across positions", POSITIONS, Rule.REJECTION, "all tokens"),
    ("row 0's history used for all rows", ROW_0, Rule.COUPLING, "top-k 3"),
    ("row 0's history used for all rows", ROW_0, Rule.REJECTION, "top-k 3"),
    ("first draft emitted unchecked", UNCHECKED, Rule.REJECTION, "top-k 3"),
    ("no residual: a rejected row draws from p", RESIDUAL, Rule.REJECTION, "top-k 3"),
]


@pytest.mark.parametrize(("bug", "planting", "rule", "name"), BUGS, ids=[f"{bug[0]}, {bug[2].value}" for bug in BUGS])
def test_a_planted_bug_is_caught(bug, planting, rule, name, small, text, joints, caught):
    seeds = 2 * SEEDS if planting is RESIDUAL else SEEDS
    with planted(*planting):
        worst = worst_deviation(decode.load(small), text, joints[name], name, rule, 2, "guess", seeds)
    assert worst > laws.Z_CUT
    caught(bug, f"test_two_tokens_follow_their_joint_law ({rule.value}): {worst:.0f} sigma")
