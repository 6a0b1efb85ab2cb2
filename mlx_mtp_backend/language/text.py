"""Text of a model: its tokenizer, its chat template, and text that grows token by token. No MLX here."""

from __future__ import annotations

import datetime
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from mlx_mtp_backend.api import ResponseFormat
from mlx_mtp_backend.checkpoint.untrusted import allowed_roots, read_untrusted
from mlx_mtp_backend.errors import EngineError, ErrorReason
from mlx_mtp_backend.language.grammar import Grammar, Grammars

MAX_FILE_BYTES = 200_000_000
MAX_TEXT_BYTES = 8 * 2**20  # tokenizer configs of large vocabularies reach a few megabytes


class ModelText:
    """Tokenizer and chat template of one checkpoint. Safe to use from any thread.

    Attributes:
        end_tokens: the model's own end-of-sequence ids.
        has_template: whether `render` can work.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None, named: Mapping[str, str], ends: frozenset[int]):
        self._tokenizer = tokenizer
        self._named = dict(named)
        self._template = None if template is None else _environment().from_string(template)
        self.end_tokens = ends
        self.has_template = template is not None
        self._grammars = Grammars(tokenizer, ends)

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens are recognised in the text and none are added."""
        # The batch call lets other threads run meanwhile, which `encode` does not.
        return list(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """A conversation as the model was trained to see it.

        Args:
            messages: mappings with role and content.
            variables: what else the template reads, such as enable_thinking or tools.

        Raises:
            EngineError: INVALID_PARAMS, if there is no template or it refuses the messages.
        """
        if self._template is None:
            raise EngineError(ErrorReason.INVALID_PARAMS, "this model has no chat template", field="messages")
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self._named, **variables
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            detail = f"the chat template refused the messages: {str(error)[:200]}"
            raise EngineError(ErrorReason.INVALID_PARAMS, detail, field="messages") from error

    def boundaries(
        self, messages: Sequence[Mapping[str, Any]], rendered: str, tokens: Sequence[int], **variables: Any
    ) -> tuple[int, ...]:
        """Where other prompts are likely to leave this one: behind the system message, and behind the last message.

        Args:
            messages, variables: as given to `render`, which gave `rendered`.
            tokens: `rendered`, encoded.

        Returns:
            lengths in tokens, never beyond where the texts part; none where the template refuses the other prompts.
        """
        leading = list(itertools.takewhile(lambda message: message["role"] == "system", messages))
        other_user = [*leading, {"role": "user", "content": "\N{REPLACEMENT CHARACTER}"}]
        try:
            shared = _common(rendered, self.render(other_user, **variables)) if leading else 0
            stable = _common(rendered, self.render(messages, add_generation_prompt=False, **variables))
        except EngineError:
            return ()
        system = _common(self.encode(rendered[:shared]), tokens)
        # The few characters after it are encoded, rather than the long text before it again.
        last = max(0, len(tokens) - len(self.encode(rendered[stable:])) - 1)
        return (system, last) if leading else (last,)

    def compile(self, wanted: ResponseFormat) -> Grammar:
        """What a reply in this format may say, from its beginning. Compiled formats are kept, and the first of a
        tokenizer may take a second: call it off the event loop.

        Raises:
            EngineError: INVALID_PARAMS, if the format cannot be followed.
        """
        return self._grammars.compile(wanted)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; the first call may take a second, as `compile`.

        Raises:
            EngineError: INVALID_PARAMS, if the tokenizer is of a kind that does not tell.
        """
        return self._grammars.token_bytes(token)

    def growing(self) -> GrowingText:
        return GrowingText(self._tokenizer)


def _common(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many items two sequences begin with alike."""
    pairs = zip(left, right, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


class GrowingText:
    """Text of a token stream; gives nothing while a character is incomplete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decode = DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        return self._decode.step(self._tokenizer, token) or ""


class StopScanner:
    """Finds the first stop string, and holds back text that could still become one.

    Where several stops begin, the earliest in the text wins, and of those the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._held = ""
        self.found: str | None = None

    def add(self, text: str) -> str:
        """More text; what of it may be shown. After a stop was found, nothing."""
        if self.found is not None:
            return ""
        held = self._held + text
        hits = [(index, stop) for stop in self._stops if (index := held.find(stop)) >= 0]
        if hits:
            index, self.found = min(hits, key=lambda hit: hit[0])
            self._held = ""
            return held[:index]
        keep = max((self._overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def rest(self) -> str:
        """What is still held back, when no more text will come."""
        rest, self._held = self._held, ""
        return rest

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """The longest end of `text` that begins `stop`."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def load_text(path: Path) -> ModelText | None:
    """The checkpoint's tokenizer and template; None without a tokenizer.json.

    Raises:
        EngineError: CHECKPOINT_UNREADABLE.
    """
    try:
        data = _read(path / "tokenizer.json", MAX_FILE_BYTES)
        if not data:
            return None
        tokenizer = Tokenizer.from_buffer(data)
        settings = _json(path / "tokenizer_config.json")
        ends = _end_tokens(path, tokenizer, settings)
        named = {key: token for key in ("bos_token", "eos_token") if (token := _token_text(settings.get(key)))}
        return ModelText(tokenizer, _template(path, settings), named, ends)
    except Exception as error:  # the tokenizers library raises plain Exception
        detail = f"tokenizer of {path.name}: {str(error)[:200]}"
        raise EngineError(ErrorReason.CHECKPOINT_UNREADABLE, detail) from error


def _read(path: Path, limit: int = MAX_TEXT_BYTES) -> bytes:
    """One of the checkpoint's files, nothing where it has none. Links must not lead out: callers see templates' text.

    Raises:
        RefusedFileError, OSError: as `read_untrusted`.
    """
    return read_untrusted(path, limit, allowed_roots(path.parent)) if os.path.lexists(path) else b""


def _json(path: Path) -> dict[str, Any]:
    value = json.loads(_read(path) or b"{}")
    return value if isinstance(value, dict) else {}


def _token_text(entry: Any) -> str | None:
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def _end_tokens(path: Path, tokenizer: Tokenizer, settings: dict[str, Any]) -> frozenset[int]:
    """generation_config.json wins, as it lists every id that ends a reply; the config and the tokenizer name one."""
    config = _json(path / "config.json")
    sources = (_json(path / "generation_config.json"), config, config.get("text_config") or {})
    for source in sources:
        ids = source.get("eos_token_id")
        if ids is not None:
            return frozenset(int(token) for token in (ids if isinstance(ids, list) else [ids]))
    text = _token_text(settings.get("eos_token"))
    token = tokenizer.token_to_id(text) if text else None
    return frozenset() if token is None else frozenset({token})


def _template(path: Path, settings: dict[str, Any]) -> str | None:
    if own := _read(path / "chat_template.jinja"):
        return own.decode()
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _environment() -> ImmutableSandboxedEnvironment:
    """What released templates expect of their host, in a sandbox: a template is a checkpoint's own code."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment


def _refuse(message: str) -> None:
    raise TemplateError(message)
