"""Bias, penalties, excluded ends and masks against their definitions, row by row."""

import dataclasses
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mtp_backend.api import FormatKind, GenerateParams, ResponseFormat, Sampling
from mlx_mtp_backend.decode.penalties import History, penalise
from mlx_mtp_backend.decode.processors import Processors, processed, processors_of
from mlx_mtp_backend.language.text import ModelText, load_text

VOCAB = 704
ENDS = frozenset({0, 2})


@pytest.fixture(scope="module")
def text(history: Path) -> ModelText:
    loaded = load_text(history)
    assert loaded is not None
    return loaded


def by_definition(logits: np.ndarray, sampling: Sampling, before: list[int]) -> np.ndarray:
    """Token by token, as llama.cpp writes it."""
    expected = logits.astype(np.float64)
    for token in set(before):
        logit = expected[token]
        logit = logit / sampling.repetition_penalty if logit > 0 else logit * sampling.repetition_penalty
        expected[token] = logit - before.count(token) * sampling.frequency_penalty - sampling.presence_penalty
    return expected


TOKENS = st.lists(st.integers(0, 11), max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    prompt=TOKENS.filter(bool),
    reply=TOKENS,
    drafts=st.lists(st.integers(0, 11), max_size=4),
    penalties=st.sampled_from([(1.3, 0.0, 0.0), (1.0, 0.7, 0.0), (1.0, 0.0, 0.4), (0.8, -0.6, 0.3), (2.0, 1.0, -0.5)]),
    data=st.data(),
)
def test_penalties_are_those_of_the_definition(prompt, reply, drafts, penalties, data):
    sampling = Sampling(repetition_penalty=penalties[0], presence_penalty=penalties[1], frequency_penalty=penalties[2])
    rows = data.draw(st.integers(1, len(drafts) + 1))
    logits = np.round(np.random.default_rng(len(prompt)).normal(0, 3, (rows, 12)), 1).astype(np.float32)
    history = History(prompt)
    history.add(reply)
    found = penalise(mx.array(logits), sampling, history, mx.array(drafts, mx.int32))
    for row in range(rows):
        before = prompt + reply + drafts[: len(drafts) + 1 - rows + row]
        assert np.allclose(np.array(found)[row], by_definition(logits[row], sampling, before), atol=1e-5)


def test_a_long_history_is_kept_whole():
    history = History(range(3000))
    history.add([2999, 7, 7])
    ids, counts = (np.array(array) for array in history.seen)
    assert sorted(ids.tolist()) == list(range(3000))
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == dict.fromkeys(range(3000), 1) | {7: 3, 2999: 2}


EVERYTHING = Sampling(
    repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, logit_bias=((5, 2.0), (300, -3.0))
)
FORMAT = ResponseFormat(FormatKind.REGEX, "[a-z ]{3,60}")


def everything(text: ModelText, prompt: tuple[int, ...], **changes) -> Processors:
    params = GenerateParams("m", prompt, sampling=EVERYTHING, **{"min_tokens": 3} | changes)
    processors = processors_of(params, ENDS, text.compile(FORMAT))
    assert processors is not None
    return processors


def test_a_row_does_not_depend_on_the_rows_beside_it(text):
    """Row r of a verify pass has the bits of a pass of its own that follows the first r drafts, or that comes when they
    are committed."""
    prompt, drafts = (5, 9, 9, 40), text.encode("so be it")[:4]
    logits = mx.random.normal((len(drafts) + 1, VOCAB), key=mx.random.key(1)) * 4
    together = everything(text, prompt).apply(logits, mx.array(drafts, mx.int32))
    assert len(drafts) == 4
    for row in range(len(drafts) + 1):
        alone = everything(text, prompt).apply(logits[row : row + 1], mx.array(drafts[:row], mx.int32))
        later = everything(text, prompt)
        later.commit(drafts[:row])
        committed = later.apply(logits[row : row + 1], mx.zeros((0,), mx.int32))
        for other in (alone, committed):
            assert mx.array_equal(together[row : row + 1].view(mx.uint32), other.view(mx.uint32))


def test_bias_is_added_and_touches_nothing_else():
    processors = Processors(GenerateParams("m", (1,), sampling=Sampling(logit_bias=((3, 1.5), (7, -2.0)))), ENDS)
    logits = mx.zeros((2, VOCAB))
    expected = np.zeros((2, VOCAB), dtype=np.float32)
    expected[:, 3], expected[:, 7] = 1.5, -2.0
    assert np.array_equal(np.array(processors.apply(logits, mx.array([4]))), expected)
    assert not mx.any(logits).item()


def test_ends_are_excluded_until_enough_tokens():
    processors = Processors(GenerateParams("m", (1,), min_tokens=3), ENDS)

    def excluded(rows: int, drafts: list[int]) -> list[bool]:
        found = np.array(processors.apply(mx.zeros((rows, VOCAB)), mx.array(drafts, mx.int32)))
        assert np.isfinite(np.delete(found, sorted(ENDS), axis=1)).all()
        return [row.all() for row in np.isinf(found[:, sorted(ENDS)])]

    assert excluded(5, [4, 4, 4, 4]) == [True, True, True, False, False]
    assert excluded(1, [4, 4, 4]) == [False]
    processors.commit([4, 4])
    assert excluded(3, [4, 4]) == [True, False, False]
    processors.commit([4])
    assert excluded(2, [4]) == [False, False]


def allowed(processors: Processors, drafts: list[int], vocab_size: int = VOCAB) -> set[int]:
    row = processors.apply(mx.zeros((1, vocab_size)), mx.array(drafts, mx.int32))[0]
    return {token for token, logit in enumerate(row.tolist()) if logit > -math.inf}


def test_a_format_leaves_what_keeps_to_it(text):
    wanted = text.compile(ResponseFormat(FormatKind.REGEX, "(no)+"))
    processors = Processors(GenerateParams("m", (1,)), ENDS, wanted)
    for size in (VOCAB, 681, 1000):  # the model's vocabulary may be larger than the tokenizer's
        assert allowed(processors, [], size) == {
            t for t in range(681) if "nononono".startswith(text.decode([t]) or "-")
        }
    processors.commit(text.encode("n"))
    assert allowed(processors, []) == {t for t in range(681) if "onononon".startswith(text.decode([t]) or "-")}
    assert allowed(processors, text.encode("o")) >= ENDS


def test_behind_a_draft_that_breaks_the_format_all_is_free_and_nothing_is_remembered(text):
    processors = Processors(GenerateParams("m", (1,)), ENDS, text.compile(FORMAT))
    before = allowed(processors, [])
    assert len(allowed(processors, text.encode("7"))) == VOCAB
    assert allowed(processors, []) == before != set(range(VOCAB))


def test_where_only_the_end_is_left_it_is_not_excluded(text):
    params = GenerateParams("m", (1,), min_tokens=9)
    processors = Processors(params, ENDS, text.compile(ResponseFormat(FormatKind.REGEX, "ab?")))
    processors.commit(text.encode("a"))
    assert {text.decode([token]) for token in allowed(processors, [])} == {"b"}
    processors.commit(text.encode("b"))
    assert allowed(processors, []) == ENDS


def test_a_format_after_a_token_binds_only_what_follows(text):
    mark = text.encode("</think>")[0]
    wanted = dataclasses.replace(FORMAT, after=mark)
    processors = Processors(GenerateParams("m", (1,)), ENDS, text.compile(wanted))
    assert allowed(processors, []) == set(range(VOCAB)) - ENDS
    assert allowed(processors, [7, mark]) < set(range(VOCAB))
    processors.commit([7, mark])
    bound = Processors(GenerateParams("m", (1,)), ENDS, text.compile(FORMAT))
    assert allowed(processors, []) == allowed(bound, [])


def test_requests_that_ask_for_nothing_have_no_processors(text):
    assert processors_of(GenerateParams("m", (1,), sampling=Sampling(0.3, 5, 0.9, 0.1)), ENDS) is None
    logits = mx.zeros((3, VOCAB))
    assert processed(logits, []) is logits


def test_only_the_rows_of_their_sequence_are_processed():
    processors = Processors(GenerateParams("m", (1,), sampling=Sampling(logit_bias=((3, 1.0),))), ENDS)
    logits = mx.zeros((4, VOCAB), mx.float16)
    found = processed(logits, [(processors, slice(1, 3), mx.array([4]))])
    assert found.dtype == mx.float32
    assert found[:, 3].tolist() == [0, 1, 1, 0]
    assert mx.sum(found).item() == 2
