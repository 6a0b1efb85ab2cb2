"""Thinking never shows as answer, however the text is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.backends.thinking import ThinkSplitter

CASES = [
    ("", "Hello", "Hello", ""),
    ("", "<think>hm</think>Hello", "Hello", "hm"),
    ("", "<think>\nhm\n</think>\n\nHello\n", "Hello\n", "hm\n"),
    ("<|assistant|><think>\n", "hm</think>\n\nHello", "Hello", "hm"),
    ("", "a < b <think", "a < b <think", ""),
    ("", "<think>never closed", "", "never closed"),
    ("", "<think></think>x", "x", ""),
    ("", "1<think>a</think>2<think>b</think>3", "123", "ab"),
    ("", "</think>stray", "</think>stray", ""),
    ("", "\n\nkept", "\n\nkept", ""),
]


def split(prompt: str, pieces: list[str]) -> tuple[str, str]:
    splitter = ThinkSplitter(prompt)
    parts = [*(splitter.feed(piece) for piece in pieces), splitter.end()]
    return "".join(answer for answer, _ in parts), "".join(thinking for _, thinking in parts)


@pytest.mark.parametrize(("prompt", "text", "answer", "thinking"), CASES)
def test_known_texts_whole_and_letter_by_letter(prompt: str, text: str, answer: str, thinking: str) -> None:
    assert split(prompt, [text]) == (answer, thinking)
    assert split(prompt, list(text)) == (answer, thinking)


@given(st.lists(st.sampled_from(["<think>", "</think>", "<thi", "nk>", "\n", "a", "<", "</"])), st.data())
def test_cuts_do_not_matter(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split("", pieces) == split("", [text])
