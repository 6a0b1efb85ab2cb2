"""What the llama.cpp backend answers, through the real llama.cpp."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from support.generation import GREEDY, collect, counting, entry, finished, text

from mlx_mtp_backend.decode.processors import processors_of
from router.backends.llama_cpp import LlamaCppBackend
from router.backends.mlx_answer import Prompt, generate_params
from router.domain import (
    Delta,
    DraftSource,
    ErrorReason,
    Event,
    FinishReason,
    FormatKind,
    GenerationRequest,
    Loading,
    Message,
    MessagesPrompt,
    Prefilling,
    ReasoningMode,
    Replay,
    ResponseFormat,
    Role,
    RouterError,
    Sampling,
    Started,
    Stop,
    TextPrompt,
    TokensPrompt,
)

HELLO = MessagesPrompt((Message(Role.USER, "hi"),))
THOUGHT, ANSWER = "Let me ponder", "The answer is 42."
PROMPT_TOKENS = 4  # <|user|> h i <|assistant|>
UNIFORM = Sampling(temperature=1.0, top_p=1.0)


def chat(**changes: object) -> GenerationRequest:
    return replace(GenerationRequest("m", HELLO, sampling=GREEDY), **changes)  # type: ignore[arg-type]


def babble(**changes: object) -> GenerationRequest:
    """Sixteen letters, each of six equally likely ones."""
    request = GenerationRequest("m", TextPrompt("S"), sampling=UNIFORM, stop=Stop(max_output_tokens=16))
    return replace(request, **changes)  # type: ignore[arg-type]


def thought(events: list[Event]) -> str:
    return "".join(event.reasoning_text for event in events if isinstance(event, Delta))


async def refused(backend: LlamaCppBackend, path: Path, request: GenerationRequest) -> RouterError:
    with pytest.raises(RouterError) as caught:
        await collect(backend, entry(path), request)
    return caught.value


@pytest.fixture
def backend(make_backend) -> LlamaCppBackend:  # type: ignore[no-untyped-def]
    return make_backend()  # type: ignore[no-any-return]


async def test_a_chat_streams_thoughts_apart_from_the_answer(backend: LlamaCppBackend, script_file: Path) -> None:
    events = await collect(backend, entry(script_file), chat())
    kinds = [type(event) for event in events]
    assert kinds[0] is Loading
    assert kinds.index(Prefilling) < kinds.index(Started) < kinds.index(Delta)
    assert kinds.count(Started) == 1
    assert (thought(events), text(events)) == (THOUGHT, ANSWER)
    assert len([event for event in events if isinstance(event, Delta)]) >= 8  # streamed, not sent at the end
    end = finished(events)
    assert end.reason is FinishReason.END_OF_GENERATION
    assert (end.usage.prompt_tokens, end.usage.output_tokens) == (PROMPT_TOKENS, 12)
    assert (end.seed, end.replay) == (None, Replay.BEST_EFFORT)
    assert end.numerics_fingerprint.startswith("llama.cpp b")
    assert end.prefill is not None
    assert end.prefill > 0
    assert end.decode is not None
    assert end.decode > 0
    assert end.speculation.source is DraftSource.NONE


async def test_thinking_is_switched_off_and_on_through_the_template(
    backend: LlamaCppBackend, script_file: Path
) -> None:
    off = await collect(backend, entry(script_file), chat(reasoning=ReasoningMode.OFF))
    assert (thought(off), text(off)) == ("", ANSWER)
    on = await collect(backend, entry(script_file), chat(reasoning=ReasoningMode.ON))
    assert (thought(on), text(on)) == (THOUGHT, ANSWER)


async def test_a_thought_that_is_cut_short_never_becomes_answer(backend: LlamaCppBackend, script_file: Path) -> None:
    events = await collect(backend, entry(script_file), chat(stop=Stop(max_output_tokens=3)))
    assert (thought(events), text(events)) == ("Let me", "")
    assert finished(events).reason is FinishReason.MAX_TOKENS


async def test_cached_tokens_are_told(backend: LlamaCppBackend, script_file: Path) -> None:
    model = entry(script_file)
    first, second = [finished(await collect(backend, model, chat())) for _ in range(2)]
    assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, PROMPT_TOKENS - 1)
    assert first.usage.prompt_tokens == second.usage.prompt_tokens


async def test_a_delta_never_ends_inside_a_character(backend: LlamaCppBackend, script_file: Path) -> None:
    events = await collect(backend, entry(script_file), chat(prompt=TextPrompt("U")))
    deltas = [(event.text, event.token_count) for event in events if isinstance(event, Delta)]
    assert deltas == [("é", 2), ("😀", 4), ("!!", 1)]


async def test_each_way_to_end_is_told_apart(backend: LlamaCppBackend, script_file: Path) -> None:
    model = entry(script_file)
    most = await collect(backend, model, counting(stop=Stop(max_output_tokens=3)))
    assert (text(most), finished(most).reason) == (" n0 n1 n2", FinishReason.MAX_TOKENS)

    stopped = await collect(backend, model, counting(stop=Stop(max_output_tokens=99, sequences=("zzz", "n2 n3"))))
    assert (text(stopped), finished(stopped).reason) == (" n0 n1 ", FinishReason.STOP_SEQUENCE)
    assert finished(stopped).matched_sequence == "n2 n3"

    in_chat = await collect(backend, model, chat(stop=Stop(sequences=(" 42",))))
    assert (text(in_chat), finished(in_chat).matched_sequence) == ("The answer is", " 42")

    full = await collect(backend, model, counting(prompt=TextPrompt("L" * 250)))
    assert finished(full).reason is FinishReason.CONTEXT_LIMIT
    assert finished(full).usage.prompt_tokens == 250
    assert finished(full).usage.output_tokens == 256 - 250

    ended = await collect(backend, model, chat(prompt=TextPrompt("U")))
    assert finished(ended).reason is FinishReason.END_OF_GENERATION


async def test_a_prompt_over_the_context_is_refused_with_both_numbers(
    backend: LlamaCppBackend, script_file: Path
) -> None:
    error = await refused(backend, script_file, counting(prompt=TextPrompt("L" * 300)))
    assert error.reason is ErrorReason.PROMPT_TOO_LONG
    assert error.metadata == {"prompt_tokens": "300", "context_length": "256"}


async def test_the_context_is_never_longer_than_the_model_was_made_for(
    backend: LlamaCppBackend, script_file: Path
) -> None:
    model = entry(script_file, context_length=8192)
    assert (await backend.count_tokens(model, counting())).context_length == 4096
    with pytest.raises(RouterError) as caught:
        await collect(backend, model, counting(prompt=TextPrompt("L" * 5000)))
    assert caught.value.metadata == {"prompt_tokens": "5000", "context_length": "4096"}


async def test_token_prompts_are_taken_as_they_are(backend: LlamaCppBackend, script_file: Path) -> None:
    events = await collect(
        backend, entry(script_file), counting(prompt=TokensPrompt((ord("L"),)), stop=Stop(max_output_tokens=2))
    )
    assert text(events) == " n0 n1"
    assert finished(events).usage.prompt_tokens == 1


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (counting(prompt=TokensPrompt((1, 10**6))), "token_ids"),
        (counting(sampling=replace(GREEDY, logit_bias={10**6: 1.0})), "sampling.logit_bias"),
        (chat(response_format=ResponseFormat(FormatKind.JSON_SCHEMA, "{")), "response_format.json_schema"),
        (chat(response_format=ResponseFormat(FormatKind.JSON_SCHEMA, "5")), "response_format.json_schema"),
        (chat(response_format=ResponseFormat(FormatKind.JSON_SCHEMA, '{"type": 7}')), "response_format.json_schema"),
    ],
)
async def test_what_cannot_be_followed_is_refused_by_field(
    backend: LlamaCppBackend, script_file: Path, request_: GenerationRequest, field: str
) -> None:
    error = await refused(backend, script_file, request_)
    assert error.reason is ErrorReason.INVALID_REQUEST
    assert [violation.field for violation in error.violations] == [field]


async def test_a_schema_binds_the_answer(backend: LlamaCppBackend, script_file: Path) -> None:
    schema = ResponseFormat(FormatKind.JSON_SCHEMA, '{"enum": ["yes"]}')
    request = chat(response_format=schema, reasoning=ReasoningMode.OFF)
    assert json.loads(text(await collect(backend, entry(script_file), request))) == "yes"


async def test_json_object_binds_the_answer(backend: LlamaCppBackend, script_file: Path) -> None:
    request = chat(
        sampling=replace(GREEDY, logit_bias={ord("{"): 60.0}),  # alone it would say nothing but braces
        response_format=ResponseFormat(FormatKind.JSON_OBJECT),
        reasoning=ReasoningMode.OFF,
        stop=Stop(max_output_tokens=8),
    )
    said = text(await collect(backend, entry(script_file), request))
    assert said.startswith("{")
    assert not said.startswith("{{")


async def test_a_format_for_bare_text_is_refused(backend: LlamaCppBackend, script_file: Path) -> None:
    error = await refused(backend, script_file, counting(response_format=ResponseFormat(FormatKind.JSON_OBJECT)))
    assert error.reason is ErrorReason.FIELD_NOT_IMPLEMENTED


async def test_logprobs_are_those_before_any_transform(backend: LlamaCppBackend, script_file: Path) -> None:
    # Transforms that would leave one token with probability 1.
    sampling = Sampling(temperature=0.1, top_k=1)
    events = await collect(backend, entry(script_file), babble(sampling=sampling, top_logprobs=3, seed=1))
    entries = [entry for event in events if isinstance(event, Delta) for entry in event.logprobs]
    assert len(entries) == 16
    for item in entries:
        assert item.logprob == pytest.approx(math.log(1 / 6), abs=1e-3)
        assert item.token_bytes.decode() in "abcdef"
        assert len(item.top) == 3
        assert all(chosen.logprob == pytest.approx(math.log(1 / 6), abs=1e-3) for chosen in item.top)
    assert b"".join(item.token_bytes for item in entries).decode() == text(events)


async def test_logprobs_without_alternatives(backend: LlamaCppBackend, script_file: Path) -> None:
    events = await collect(backend, entry(script_file), chat(top_logprobs=0, reasoning=ReasoningMode.OFF))
    entries = [entry for event in events if isinstance(event, Delta) for entry in event.logprobs]
    assert [item.token_bytes for item in entries] == [b"The", b" answer", b" is", b" 42", b"."]
    assert all(item.top == () for item in entries)


@pytest.mark.parametrize("seed", [0, 7, 2**31 + 5, 2**32 - 2])
async def test_a_seed_repeats(backend: LlamaCppBackend, script_file: Path, seed: int) -> None:
    model = entry(script_file)
    first, second, other = [
        await collect(backend, model, babble(seed=value)) for value in (seed, seed, (seed + 1) % (2**32 - 1))
    ]
    assert text(first) == text(second)
    assert text(first) != text(other)  # equal by chance once in 6^16
    assert finished(first).seed == seed


async def test_a_drawn_seed_is_told_and_repeats(backend: LlamaCppBackend, script_file: Path) -> None:
    model = entry(script_file)
    first, second = await collect(backend, model, babble()), await collect(backend, model, babble())
    assert finished(first).seed != finished(second).seed
    again = await collect(backend, model, babble(seed=finished(first).seed))
    assert text(again) == text(first)


async def test_temperature_comes_last(backend: LlamaCppBackend, script_file: Path) -> None:
    # Other tokens have e^-30 of a letter's probability; at temperature 10 that would be e^-3 and pass min_p.
    hot = Sampling(temperature=10.0, top_p=1.0, min_p=0.02)
    events = await collect(backend, entry(script_file), babble(sampling=hot, stop=Stop(max_output_tokens=64)))
    assert set(text(events)) <= set("abcdef")


async def test_top_p_applies_to_what_top_k_left(backend: LlamaCppBackend, script_file: Path) -> None:
    # Two of three equally likely letters reach 0.5; of all six, three would.
    sampling = Sampling(temperature=1.0, top_k=3, top_p=0.5)
    events = await collect(backend, entry(script_file), babble(sampling=sampling, stop=Stop(max_output_tokens=64)))
    assert len(set(text(events))) == 2


async def test_bias_and_penalties_reach_the_sampler(backend: LlamaCppBackend, script_file: Path) -> None:
    model = entry(script_file)
    biased = replace(UNIFORM, logit_bias={ord("b"): 40.0})
    assert set(text(await collect(backend, model, babble(sampling=biased)))) == {"b"}
    banned = {ord(letter): -40.0 for letter in "abcde"}
    assert set(text(await collect(backend, model, babble(sampling=replace(UNIFORM, logit_bias=banned))))) == {"f"}
    frequent = replace(GREEDY, frequency_penalty=1.0)
    six = text(await collect(backend, model, babble(sampling=frequent, stop=Stop(max_output_tokens=6))))
    assert sorted(six) == list("abcdef")  # each letter once, since each one said costs it the next place
    repeated = replace(GREEDY, repetition_penalty=1.5)
    six = text(await collect(backend, model, babble(sampling=repeated, stop=Stop(max_output_tokens=6))))
    assert sorted(six) == list("abcdef")


@pytest.mark.parametrize("prompt", ["S", "Sa", "Scab"])
async def test_both_lanes_penalise_alike(backend: LlamaCppBackend, script_file: Path, prompt: str) -> None:
    """What llama.cpp says is what the MLX engine's processors make of the same logits: 30 for a letter, else 0. The
    prompt counts, and a biased logit is penalised: the other way round, another letter would win."""
    sampling = replace(
        GREEDY,
        repetition_penalty=1.5,
        presence_penalty=0.7,
        frequency_penalty=0.4,
        logit_bias={ord("a"): 12.0, ord("c"): 11.0, ord("e"): -1.0},
    )
    request = counting(prompt=TextPrompt(prompt), sampling=sampling, stop=Stop(max_output_tokens=12))
    said = text(await collect(backend, entry(script_file), request))

    params = generate_params(request, "m", Prompt(tuple(ord(letter) for letter in prompt)), 100, None, None)
    processors = processors_of(params, frozenset())
    assert processors is not None
    logits, nothing, expected = mx.zeros((1, 256)), mx.zeros((0,), mx.int32), ""
    logits[:, ord("a") : ord("g")] = 30.0
    while len(expected) < len(said):
        expected += chr(int(mx.argmax(processors.apply(logits, nothing)).item()))
        processors.commit([ord(expected[-1])])
    assert said == expected
    assert len(set(said)) > 3


async def test_the_end_token_can_be_ignored(backend: LlamaCppBackend, script_file: Path) -> None:
    stop = Stop(max_output_tokens=40, ignore_end_of_generation=True)
    end = finished(await collect(backend, entry(script_file), chat(stop=stop, reasoning=ReasoningMode.OFF)))
    assert (end.reason, end.usage.output_tokens) == (FinishReason.MAX_TOKENS, 40)


async def test_a_time_budget_keeps_what_was_said(backend: LlamaCppBackend, slow_file: Path) -> None:
    model = entry(slow_file, context_length=4096)
    await collect(backend, model, counting(stop=Stop(max_output_tokens=1)))
    events = await collect(backend, model, counting(time_budget=0.4))
    end = finished(events)
    assert end.reason is FinishReason.TIME_LIMIT
    assert text(events).startswith(" n0 n1 n2")
    assert end.usage.output_tokens == len(text(events).split())
    assert end.usage.prompt_tokens == 1


async def test_a_time_budget_spent_on_loading_ends_an_empty_answer(backend: LlamaCppBackend, slow_file: Path) -> None:
    events = await collect(backend, entry(slow_file), counting(time_budget=0.001))
    assert finished(events).reason is FinishReason.TIME_LIMIT
    assert finished(events).usage.output_tokens == 0
    assert [type(event) for event in events].count(Started) == 1


async def test_count_tokens_agrees_with_generation(backend: LlamaCppBackend, script_file: Path) -> None:
    model = entry(script_file)
    for request in (chat(), chat(reasoning=ReasoningMode.OFF), counting(), counting(prompt=TokensPrompt((1, 2, 3)))):
        counted = await backend.count_tokens(model, request)
        short = replace(request, stop=Stop(max_output_tokens=1))
        assert counted.prompt_tokens == finished(await collect(backend, model, short)).usage.prompt_tokens
        assert counted.context_length == 256


@pytest.mark.skipif("SMOLLM2_GGUF" not in os.environ, reason="SMOLLM2_GGUF names no model")
async def test_a_real_model_answers(backend: LlamaCppBackend) -> None:
    model = entry(Path(os.environ["SMOLLM2_GGUF"]), context_length=1024)
    prompt = MessagesPrompt((Message(Role.USER, "What is the capital of France? Answer with one sentence."),))
    events = await collect(backend, model, GenerationRequest("m", prompt, GREEDY, Stop(max_output_tokens=40)))
    assert "Paris" in text(events)
    assert finished(events).usage.output_tokens > 3
