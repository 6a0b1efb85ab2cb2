"""Every field of a request does something: one check per field, which fails where the field is ignored."""

import dataclasses
import json
import math
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlx_mtp_backend import (
    BaseEngine,
    Delta,
    Engine,
    EngineError,
    EngineOptions,
    EngineProcess,
    ErrorReason,
    Finished,
    FinishReason,
    FormatKind,
    GenerateParams,
    LoadOptions,
    ResponseFormat,
    Sampling,
    TokenLogprob,
    WiringPolicy,
)

PROMPT = tuple(range(3, 23))
NEW = 16


@dataclasses.dataclass
class Reply:
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    end: Finished


class Asker:
    """Asks one engine; every check starts from the same request."""

    def __init__(self, engine: BaseEngine) -> None:
        self.engine = engine
        self.text = engine.models()["history"].text
        self.plain = self()

    def __call__(self, sampling: dict | None = None, **changes) -> Reply:
        defaults = {"prompt": PROMPT, "max_tokens": NEW, "seed": 5, "ignore_eos": True}
        chosen = Sampling(**{"temperature": 0.9} | (sampling or {}))
        params = GenerateParams(**{"model": "history", "sampling": chosen} | defaults | changes)
        events = list(self.engine.submit(params))
        deltas = [event for event in events if isinstance(event, Delta)]
        return Reply(
            tuple(token for delta in deltas for token in delta.tokens),
            "".join(delta.text for delta in deltas),
            tuple(entry for delta in deltas for entry in delta.logprobs),
            events[-1],
        )


@pytest.fixture(scope="module", params=[Engine, EngineProcess], ids=["thread", "process"])
def ask(request: pytest.FixtureRequest, history: Path, pass_through: Path):
    with asking(request.param, history, pass_through) as asker:
        yield asker


@pytest.fixture(scope="module")
def near(history: Path, pass_through: Path):
    """Asks an engine on a thread of this process, into which faults can be planted."""
    with asking(Engine, history, pass_through) as asker:
        yield asker


@contextmanager
def asking(kind, history: Path, pass_through: Path):
    quiet = LoadOptions(depth=2, wiring=WiringPolicy.OFF, prefill_chunk=16)
    with kind(EngineOptions(device="cpu")) as engine:
        for name, path in (("history", history), ("chain", pass_through)):
            engine.load(name, path, quiet).result(timeout=60)
        yield Asker(engine)


def temperature(ask: Asker) -> None:
    cold, hot = ask({"temperature": 0.0}), ask({"temperature": 3.0})
    assert len({cold.tokens, hot.tokens, ask.plain.tokens}) == 3


def top_k(ask: Asker) -> None:
    assert ask({"top_k": 1}).tokens == ask({"temperature": 0.0}).tokens != ask.plain.tokens


def top_p(ask: Asker) -> None:
    assert ask({"top_p": 1e-6}).tokens == ask({"temperature": 0.0}).tokens


def min_p(ask: Asker) -> None:
    assert ask({"min_p": 0.999}).tokens == ask({"temperature": 0.0}).tokens


def repetition_penalty(ask: Asker) -> None:
    assert not set(ask({"repetition_penalty": 100.0}).tokens) & set(PROMPT)
    assert set(ask({"repetition_penalty": 0.01}).tokens) <= set(PROMPT)


def presence_penalty(ask: Asker) -> None:
    reply = ask({"presence_penalty": 100.0}).tokens
    assert len(set(reply) - set(PROMPT)) == NEW
    assert set(ask({"presence_penalty": -100.0}).tokens) <= set(PROMPT)


def frequency_penalty(ask: Asker) -> None:
    assert len(set(ask({"frequency_penalty": 100.0}).tokens) - set(PROMPT)) == NEW
    # What came most often wins, and then wins all the more.
    assert set(ask({"frequency_penalty": -50.0}, prompt=(*PROMPT, 9)).tokens) == {9}


def logit_bias(ask: Asker) -> None:
    assert set(ask({"logit_bias": ((77, 100.0),)}).tokens) == {77}
    without = ask.plain.tokens[3]
    assert without not in ask({"logit_bias": ((without, -100.0),)}).tokens


def model(ask: Asker) -> None:
    assert ask(model="chain").tokens != ask.plain.tokens


def prompt(ask: Asker) -> None:
    assert ask(prompt=PROMPT[1:]).tokens != ask.plain.tokens


def max_tokens(ask: Asker) -> None:
    reply = ask(max_tokens=5)
    assert reply.tokens == ask.plain.tokens[:5]
    assert reply.end.reason is FinishReason.MAX_TOKENS


def sampling(ask: Asker) -> None:
    """Each of its fields has a check of its own."""
    assert {field.name for field in dataclasses.fields(Sampling)} <= CHECKS.keys()


def seed(ask: Asker) -> None:
    assert ask(seed=6).tokens != ask.plain.tokens == ask().tokens


def depth(ask: Asker) -> None:
    replies = {depth: ask(depth=depth) for depth in (0, 1, 4)}
    assert {reply.tokens for reply in replies.values()} == {ask.plain.tokens}
    assert [len(reply.end.statistics.drafted) for reply in replies.values()] == [0, 1, 4]


def boundaries(ask: Asker) -> None:
    """Two prompts that part behind the boundary: the second starts from the last whole chunk within it."""
    shared, cached = tuple(range(100, 140)), []
    for name in (shared, shared[::-1]):
        ask(prompt=name + PROMPT, **({"boundaries": (len(name),)} if name is shared else {}))
        cached.append(ask(prompt=name + PROMPT[::-1]).end.statistics.cached_tokens)
    assert cached == [32, 0]


def stop_tokens(ask: Asker) -> None:
    stop = ask.plain.tokens[4]
    reply = ask(stop_tokens=frozenset({stop}))
    assert reply.tokens == ask.plain.tokens[: ask.plain.tokens.index(stop)]
    assert (reply.end.reason, reply.end.stop) == (FinishReason.STOP_TOKEN, stop)


def ignore_eos(ask: Asker) -> None:
    favoured = {"logit_bias": ((2, 12.0),)}
    through, stopped = ask(favoured), ask(favoured, ignore_eos=False)
    assert 2 in through.tokens
    assert (stopped.end.reason, stopped.end.stop) == (FinishReason.STOP_TOKEN, 2)


def stop_strings(ask: Asker) -> None:
    stop = ask.plain.text[6:9]
    reply = ask(stop_strings=(stop,))
    assert reply.text == ask.plain.text[: ask.plain.text.index(stop)]
    assert (reply.end.reason, reply.end.stop) == (FinishReason.STOP_STRING, stop)


def time_limit(ask: Asker) -> None:
    reply = ask(time_limit=0.05, max_tokens=4000)
    assert reply.end.reason is FinishReason.TIME_LIMIT


def min_tokens(ask: Asker) -> None:
    favoured = {"logit_bias": ((2, 100.0), (0, 99.0))}
    assert ask(favoured, ignore_eos=False).tokens == ()
    for count in (1, 6):
        reply = ask(favoured, ignore_eos=False, min_tokens=count)
        assert len(reply.tokens) == count
        assert reply.end.reason is FinishReason.STOP_TOKEN
    own = ask({"logit_bias": ((55, 100.0),)}, stop_tokens=frozenset({55}), min_tokens=4)
    assert len(own.tokens) == 4


def response_format(ask: Asker) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 999}, "s": {"enum": ["ab", "cd"]}},
        "required": ["n", "s"],
        "additionalProperties": False,
    }
    rule = ResponseFormat(FormatKind.JSON_SCHEMA, json.dumps(schema))
    for changes in ({}, {"depth": 0}, {"seed": None}):
        reply = ask(response_format=rule, ignore_eos=False, max_tokens=400, **changes)
        value = json.loads(reply.text)
        assert value.keys() == {"n", "s"}
        assert value["n"] <= 999
        assert value["s"] in ("ab", "cd")
        assert reply.end.reason is FinishReason.STOP_TOKEN
    late = ResponseFormat(FormatKind.REGEX, "yes", after=ask.plain.tokens[2])
    reply = ask(response_format=late, ignore_eos=False)
    place = reply.tokens.index(late.after)
    assert place > 0
    assert ask.text.decode(reply.tokens[place + 1 :]) == "yes"


def logprobs(ask: Asker) -> None:
    assert ask.plain.logprobs == ()
    told = ask(logprobs=3)
    assert told.tokens == ask.plain.tokens
    assert [entry.token for entry in told.logprobs] == list(told.tokens)
    assert all(
        len(entry.top) == 3 and entry.top == tuple(sorted(entry.top, key=lambda t: -t[1])) for entry in told.logprobs
    )
    assert ask(logprobs=3, depth=0).logprobs == told.logprobs
    # Of the model's own law, whatever the request does to it.
    forced = ask({"logit_bias": ((77, 100.0),), "top_k": 1}, logprobs=0).logprobs[0]
    assert (forced.token, forced.top) == (77, ())
    assert forced.logprob < told.logprobs[0].top[0][1] < 0


CHECKS: dict[str, Callable[[Asker], None]] = {
    check.__name__: check
    for check in (
        *(temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias),
        *(
            model,
            prompt,
            max_tokens,
            sampling,
            seed,
            depth,
            boundaries,
            stop_tokens,
            ignore_eos,
            stop_strings,
            time_limit,
        ),
        *(min_tokens, response_format, logprobs),
    )
}
FIELDS = [field.name for kind in (GenerateParams, Sampling) for field in dataclasses.fields(kind)]


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_is_not_ignored(field, ask):
    CHECKS[field](ask)


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": {"logit_bias": ((77, 100.0),)}},
        # Each token once, in order: the penalty of a draft decides what the next draft is.
        {"sampling": {"presence_penalty": 100.0, "logit_bias": tuple((100 + i, 100.0 - 12 * i) for i in range(9))}},
        {"response_format": ResponseFormat(FormatKind.REGEX, "(0123456789){4}"), "ignore_eos": False},
    ],
)
def test_drafts_go_through_the_same_processors(ask, changes):
    """Where the processors leave one token, every draft is that token; a drafter that does not know them would fail."""
    for seed in (5, None):
        statistics = ask(seed=seed, max_tokens=NEW // 2, **changes).end.statistics
        assert sum(statistics.drafted) > 3
        assert statistics.accepted == statistics.drafted


def test_logprobs_are_those_of_the_models_law(ask):
    """Token by token the same as those of a request for one token, under rejection too, where drafts fall."""
    free = ask(seed=None, logprobs=20)
    for place, entry in enumerate(free.logprobs):
        [alone] = ask(prompt=PROMPT + free.tokens[:place], max_tokens=1, logprobs=20).logprobs
        assert [token for token, _ in entry.top] == [token for token, _ in alone.top]
        assert [value for _, value in entry.top] == pytest.approx([value for _, value in alone.top], abs=1e-4)
        assert 0 < sum(math.exp(value) for _, value in entry.top) < 1
        assert entry.logprob == dict(entry.top).get(entry.token, entry.logprob) <= entry.top[0][1]


def test_logprobs_stay_with_their_tokens_where_a_stop_cuts_a_round(ask):
    whole = ask(logprobs=1, max_tokens=40)
    for cut in range(3, 9):
        for stop in ({"stop_tokens": frozenset({whole.tokens[cut]})}, {"stop_strings": (whole.text[cut : cut + 2],)}):
            reply = ask(logprobs=1, max_tokens=40, depth=4, **stop)
            assert reply.logprobs == whole.logprobs[: len(reply.tokens)]


BAD = {
    "repetition_penalty": [0.0, math.nan, 101.0],
    "presence_penalty": [math.nan, 100.5],
    "frequency_penalty": [math.inf, -100.5],
    "logit_bias": [((1, math.nan),), ((1, 101.0),), ((1, 1.0), (1, 2.0)), tuple((i, 1.0) for i in range(1025))],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_bad_sampling_is_named(field, value):
    with pytest.raises(EngineError) as caught:
        Sampling(**{field: value})
    assert (caught.value.reason, caught.value.field) == (ErrorReason.INVALID_PARAMS, field)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("min_tokens", {"min_tokens": 17, "max_tokens": 16}),
        ("min_tokens", {"min_tokens": -1}),
        ("logprobs", {"logprobs": 21}),
        ("logprobs", {"logprobs": -1}),
        ("ignore_eos", {"response_format": ResponseFormat(FormatKind.REGEX, "a")}),
        ("response_format", {"response_format": ResponseFormat(FormatKind.REGEX, "("), "ignore_eos": False}),
    ],
)
def test_bad_requests_are_named(ask, field, changes):
    with pytest.raises(EngineError) as caught:
        if (error := ask(**changes).end.error) is not None:  # a format is compiled in the engine's process
            raise error
    assert (caught.value.reason, caught.value.field) == (ErrorReason.INVALID_PARAMS, field)


@pytest.mark.parametrize("field", ["stop_tokens", "logit_bias"])
def test_tokens_outside_the_vocabulary_are_refused(ask, field):
    with pytest.raises(EngineError) as caught:
        ask({"logit_bias": ((704, 1.0),)}) if field == "logit_bias" else ask(stop_tokens=frozenset({704}))
    assert (caught.value.reason, caught.value.field) == (ErrorReason.TOKEN_OUT_OF_RANGE, field)


@pytest.mark.parametrize("rule", ["", "x" * 70_000])
def test_a_rule_has_a_size(rule):
    with pytest.raises(EngineError) as caught:
        ResponseFormat(FormatKind.REGEX, rule)
    assert caught.value.field == "response_format"


def test_a_grammar_that_breaks_off_ends_its_own_stream_only(near, monkeypatch):
    from mlx_mtp_backend.language import grammar

    monkeypatch.setattr(grammar, "_LIMITS", grammar.LLParserLimits(max_lexer_states=40, verbose_errors=False))
    letters = {"logit_bias": tuple((token, 30.0) for token in near.text.encode("ab"))}
    costly = ResponseFormat(FormatKind.REGEX, "(a|b)*a(a|b){15}c")
    beside = near.engine.submit(GenerateParams("history", PROMPT, NEW, Sampling(0.9), 5, ignore_eos=True))
    broken = near(letters, response_format=costly, ignore_eos=False, max_tokens=60)
    assert broken.end.error is not None
    assert broken.end.error.reason is ErrorReason.GRAMMAR_LIMIT
    assert tuple(t for event in beside if isinstance(event, Delta) for t in event.tokens) == near.plain.tokens
