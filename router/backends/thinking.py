"""Tells a model's thinking from its answer in streamed text, by the `<think>` tags that models write."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


class ThinkSplitter:
    """Splits streamed text into answer and thinking; a tag may arrive in pieces.

    Line breaks right behind a tag belong to the tag.

    Args:
        prompt: the rendered prompt; one that ends in an open tag makes the model start in thought.
    """

    def __init__(self, prompt: str) -> None:
        self._thinking = prompt.rstrip().endswith(OPEN)
        self._after_tag = self._thinking
        self._held = ""

    @property
    def thinking(self) -> bool:
        """Whether the model is in thought."""
        return self._thinking

    def feed(self, text: str) -> tuple[str, str]:
        """The next piece of text as (answer, thinking); what may be the beginning of a tag is held back."""
        answer, thinking = "", ""
        self._held += text
        while True:
            tag = CLOSE if self._thinking else OPEN
            before, found, rest = self._held.partition(tag)
            if not found:
                keep = _tag_prefix(self._held, tag)
                before, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            before = self._without_breaks(before)
            if self._thinking:
                thinking += before
            else:
                answer += before
            if not found:
                return answer, thinking
            self._held = rest
            self._thinking = not self._thinking
            self._after_tag = True

    def end(self) -> tuple[str, str]:
        """What was held back, now that no more text comes."""
        held, self._held = self._without_breaks(self._held), ""
        return ("", held) if self._thinking else (held, "")

    def _without_breaks(self, text: str) -> str:
        if self._after_tag:
            text = text.lstrip("\r\n")
            self._after_tag = not text
        return text


def _tag_prefix(text: str, tag: str) -> int:
    """Length of the longest end of `text` that is a beginning of `tag`."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-size:])), 0)
