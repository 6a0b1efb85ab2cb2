"""Replay: a seeded reply is a function of model, prompt, parameters and seed alone.

The same tokens at any depth, with good and bad drafts, beside any neighbours, across prefill chunk borders.
"""

import itertools

import pytest

from mlx_mtp_backend.api import FormatKind, GenerateParams, ResponseFormat, Rule, Sampling
from mlx_mtp_backend.cache import delta, kv
from mlx_mtp_backend.decode import penalties, processors, rounds
from mlx_mtp_backend.decode.drafters import HeadDrafter
from mlx_mtp_backend.decode.processors import processors_of
from mlx_mtp_backend.language import grammar
from mlx_mtp_backend.language.text import load_text
from tests.conformance import decode
from tests.conformance.planting import planted

# One row short of a prefill chunk, a whole one, one over; and a reply that crosses a growth step of the KV buffers.
LENGTHS = [decode.CHUNK - 1, decode.CHUNK, 2 * decode.CHUNK + 1, 250]
PROMPTS = [[(41 * i + 7 * n) % 690 for i in range(n)] for n in LENGTHS]
NEW = 14
SAMPLINGS = {
    "greedy": Sampling(0.0),
    "0.6": Sampling(0.6, top_k=20, top_p=0.95),
    "1.0": Sampling(1.0),
}
DRAFTERS = [0.0, 0.5, 0.9, 1.0, "head"]
# Everything at once. Tokens that came often are favoured, so that two rows of a pass often differ by its draft.
EVERYTHING = Sampling(
    temperature=0.8,
    top_k=30,
    top_p=0.95,
    min_p=0.01,
    repetition_penalty=1.2,
    presence_penalty=1.0,
    frequency_penalty=-2.0,
    logit_bias=((41, 4.0), (82, 4.0), (2, 9.0), (410, -5.0)),  # 2 ends a reply
)
FORMATS = {
    "free text": None,
    "JSON": ResponseFormat(
        FormatKind.JSON_SCHEMA, '{"type": "array", "items": {"enum": [true, 7, "a"]}, "minItems": 4}'
    ),
    "expression": ResponseFormat(FormatKind.REGEX, r"([a-z]+[ ,.]){2,20}"),
}


def plain(model, sampling, prompts=PROMPTS, new=NEW, processing=lambda _: None):
    """Each prompt alone, without drafts."""
    alone = {"sampling": sampling, "depth": 0, "processing": processing}
    return [
        decode.generate(model, [prompt], new, HeadDrafter(model), seed=11 + i, **alone)[0]
        for i, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def references(history_model):
    return {name: plain(history_model, sampling) for name, sampling in SAMPLINGS.items()}


def everything(text, wanted: ResponseFormat | None) -> decode.Processing:
    """Every logits processor, in this format."""

    def made(prompt):
        params = GenerateParams("history", tuple(prompt), sampling=EVERYTHING, min_tokens=6)
        return processors_of(params, text.end_tokens, text.compile(wanted) if wanted else None)

    return made


def wrong_tokens(model, references, sampling, depth, kind, processing=lambda _: None) -> int:
    """Of the prompts decoded together, how many do not give their plain tokens."""
    drafter = HeadDrafter(model) if kind == "head" else decode.scripted(model, references, kind)
    together = decode.generate(
        model, PROMPTS[: len(references)], NEW, drafter, sampling=sampling, depth=depth, processing=processing
    )
    return sum(one.tokens != reference.tokens for one, reference in zip(together, references, strict=True))


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("depth", [0, 1, 2, 4])
def test_the_same_tokens_whatever_the_drafts(history_model, references, name, depth, establish):
    kinds = DRAFTERS if depth else ["head"]  # which no one asks at depth 0
    wrong = {kind: wrong_tokens(history_model, references[name], SAMPLINGS[name], depth, kind) for kind in kinds}
    cases = len(kinds) * len(PROMPTS)
    what = f"temperature {name}, depth {depth}, {len(kinds)} drafters"
    establish("replay", what, cases, f"{sum(wrong.values())} differ")
    assert not any(wrong.values())


@pytest.fixture(scope="module")
def processed_references(history, history_model):
    """Replies to the first prompts with every processor on, in each format."""
    text = load_text(history)
    return {
        name: plain(history_model, EVERYTHING, PROMPTS[:3], processing=everything(text, wanted))
        for name, wanted in FORMATS.items()
    }


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_tokens_with_every_processor_on(history, history_model, processed_references, name, establish):
    """Penalties, bias, min_tokens and formats, drafted and not; then beside sequences that have none of them."""
    processing = everything(load_text(history), FORMATS[name])
    references = processed_references[name]
    cells = [(0, "head"), (2, 0.5), (2, 1.0), (2, "head")]
    wrong = [wrong_tokens(history_model, references, EVERYTHING, *cell, processing) for cell in cells]
    establish("replay", f"all processors, {name}, depth 0 and 2", len(cells) * len(references), f"{sum(wrong)} differ")
    assert not any(wrong)
    one, plainly = (
        decode.start(history_model, PROMPTS[2], NEW, sampling=EVERYTHING, seed=seed, rule=Rule.COUPLING, depth=2)
        for seed in (13, 4)
    )
    one.processors = processing(PROMPTS[2])
    for each in (plainly, one):
        decode.prefill(history_model, each)
    decode.finish(history_model, HeadDrafter(history_model), [plainly, one])
    assert one.tokens == references[2].tokens


def test_the_references_are_not_all_alike(references):
    """A model that always says the same would pass everything above."""
    replies = {tuple(one.tokens[-NEW:]) for runs in references.values() for one in runs}
    assert len(replies) == len(SAMPLINGS) * len(PROMPTS)


def test_acceptance_is_what_was_scripted(history_model, references, establish):
    """The matrix above is worth something only if drafts really were accepted and rejected."""
    worst = 0.0
    for kind in (0.0, 0.5, 0.9, 1.0):
        drafter = decode.scripted(history_model, references["1.0"], kind)
        runs = decode.generate(history_model, PROMPTS, NEW, drafter, sampling=Sampling(1.0), depth=1)
        kept = sum(one.accepted[0] for one in runs) / sum(one.drafted[0] for one in runs)
        worst = max(worst, abs(kept - kind))
    establish("replay", "scripted acceptance against the set one", 4, f"off by {worst:.2f}")
    assert worst < 0.25


def test_neighbours_come_and_go(history_model, references):
    """One sequence decodes while others join and leave its passes."""
    reference = references["0.6"][2]
    drafter = HeadDrafter(history_model)
    one = decode.start(history_model, PROMPTS[2], NEW, sampling=SAMPLINGS["0.6"], seed=13, rule=Rule.COUPLING, depth=3)
    others = [
        decode.start(history_model, PROMPTS[i % 2], 9, sampling=Sampling(1.0), seed=i, rule=Rule.REJECTION, depth=i)
        for i in range(4)
    ]
    decode.prefill(history_model, one)
    for turn in itertools.count():
        if len(one.tokens) == one.limit:
            break
        joined = others[: turn + 1]
        for other in joined:
            decode.prefill(history_model, other)
        running = [other for other in joined if len(other.tokens) < other.limit]
        rounds.run_round(history_model, drafter, [*running[::2], one, *running[1::2]])
    assert one.tokens == reference.tokens


def test_depth_may_change_in_mid_reply(history_model, references):
    """Rounds without drafts keep their hiddens, and the head catches up in one pass when drafting resumes."""
    reference = references["1.0"][3]
    one = decode.start(history_model, PROMPTS[3], NEW, sampling=Sampling(1.0), seed=14, rule=Rule.COUPLING, depth=4)
    decode.prefill(history_model, one)
    for depth in itertools.cycle([0, 0, 3, 1, 0, 4]):
        if len(one.tokens) == one.limit:
            break
        one.depth = depth
        rounds.run_round(history_model, HeadDrafter(history_model), [one])
        held = one.head[0].offset + one.pending_rows
        assert held == len(one.tokens) - 1
    assert one.tokens == reference.tokens


BUGS = [
    (
        "noise reused across positions",
        rounds,
        "positions += range(len(sequence.tokens), len(sequence.tokens) + depth + 1)",
        "positions += [len(sequence.tokens)] * (depth + 1)",
    ),
    (
        "row 0's history used for all rows",
        rounds,
        "p = sampling.transform(logits, parameters)",
        "p = sampling.transform(logits[mx.array([r // 5 * 5 for r in range(logits.shape[0])])], parameters)",
    ),
    (
        "one sequence's seed used for all",
        rounds,
        "seeds += [sequence.seed] * (depth + 1)",
        "seeds += [members[0][0].seed] * (depth + 1)",
    ),
    ("KV cache not rolled back", kv, "self.offset = self._mark + keep", "pass"),
    (
        "GDN state not rolled back",
        delta,
        "self.state = self._replay(tuple(rows[:, :keep] for rows in tape.recurrence), self._mark[1])",
        "pass",
    ),
    ("conv window not rolled back", delta, "self.conv = tape.conv_input[:, keep : keep + self._window]", "pass"),
    ("one accepted row too many kept", rounds, "sequence.trunk, len(tokens))", "sequence.trunk, len(tokens) + 1)"),
]


PROCESSOR_BUGS = [
    (
        "penalties of row 0 used for all rows",
        penalties,
        "(mx.arange(rows) + (length + 1 - rows))",
        "(mx.zeros(rows) + (length + 1 - rows))",
        "free text",
    ),
    ("penalties forget the reply", rounds, "sequence.processors.commit(tokens)", "pass", "free text"),
    ("min_tokens counted from the round", processors, "self._generated += len(tokens)", "pass", "free text"),
    (
        "grammar state of row 0 used for all rows",
        processors,
        "mask = _widened(grammar.mask(drafts[:length]), vocab_size)",
        "mask = _widened(grammar.mask(drafts[: len(drafts) + 1 - rows]), vocab_size)",
        "JSON",
    ),
    (
        "grammar moved on by drafts that fell",
        grammar,
        "self._here = self._place(tuple(tokens))",
        "self._here = self._place(max(self._ahead, key=len, default=tuple(tokens)))",
        "JSON",
    ),
]


@pytest.mark.parametrize(
    ("bug", "module", "old", "new", "name"), PROCESSOR_BUGS, ids=[bug[0] for bug in PROCESSOR_BUGS]
)
def test_a_planted_processor_bug_is_caught(
    bug, module, old, new, name, history, history_model, processed_references, caught
):
    with planted(module, old, new):
        processing = everything(load_text(history), FORMATS[name])
        wrong = wrong_tokens(history_model, processed_references[name], EVERYTHING, 2, 0.5, processing)
    assert wrong
    caught(bug, f"test_the_same_tokens_with_every_processor_on: {wrong} of 3 replies differ")


@pytest.mark.parametrize(("bug", "module", "old", "new"), BUGS, ids=[bug[0] for bug in BUGS])
def test_a_planted_bug_is_caught(bug, module, old, new, history, references, caught):
    with planted(module, old, new):
        wrong = wrong_tokens(decode.load(history), references["1.0"], Sampling(1.0), 4, 0.5)
    assert wrong
    caught(bug, f"test_the_same_tokens_whatever_the_drafts: {wrong} of {len(PROMPTS)} replies differ")
