"""Small GGUF models with known answers, for tests that run the real llama.cpp.

`write_script_model` makes a llama-architecture model whose next token depends on the last token alone: embeddings are
one-hot, attention and feed-forward add nothing, and the output matrix is the table of transitions. A script is a list
of pieces of text said after a trigger; every piece is a token of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np

END = "<|end|>"
CONTROL = (END, "<|user|>", "<|assistant|>", "<|system|>")
USER_DEFINED = ("<think>", "</think>")
CERTAIN = 30.0  # logit of the scripted token; all others have 0

# Like Qwen3's: past thoughts are rendered back, and an empty thought in the prompt keeps the model from thinking.
THINKING_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' and message.reasoning_content %}"
    "<think>{{ message.reasoning_content }}</think>\n{% endif %}"
    "{{ message.content }}{% if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
PLAIN_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level(data: bytes) -> str:
    """Bytes in the printable alphabet of GPT-2's byte-level tokenizers."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return "".join(letters[byte] for byte in data)


@dataclass
class Vocabulary:
    """A byte-level vocabulary: the 256 bytes, control tokens, and whatever pieces are added."""

    tokens: list[str] = field(default_factory=lambda: [byte_level(bytes([byte])) for byte in range(256)])
    types: list[int] = field(default_factory=lambda: [int(gguf.TokenType.NORMAL)] * 256)
    ids: dict[bytes, int] = field(default_factory=lambda: {bytes([byte]): byte for byte in range(256)})

    def __post_init__(self) -> None:
        for text in CONTROL:
            self._add(text.encode(), text, gguf.TokenType.CONTROL)
        for text in USER_DEFINED:
            self._add(text.encode(), text, gguf.TokenType.USER_DEFINED)

    def add(self, piece: str | bytes) -> int:
        """Id of the token for this piece, added if it is new."""
        data = piece.encode() if isinstance(piece, str) else piece
        return self.ids[data] if data in self.ids else self._add(data, byte_level(data), gguf.TokenType.NORMAL)

    def _add(self, data: bytes, token: str, kind: gguf.TokenType) -> int:
        self.ids[data] = len(self.tokens)
        self.tokens.append(token)
        self.types.append(int(kind))
        return self.ids[data]

    def pad(self, multiple: int) -> None:
        """Fills up with unused tokens to a multiple of `multiple`."""
        while len(self.tokens) % multiple:
            self.add(f"<unused{len(self.tokens)}>")

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Adds the tokenizer's keys."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges([f"{byte_level(b'q')} {byte_level(b'z')}"])
        writer.add_eos_token_id(self.ids[END.encode()])
        writer.add_pad_token_id(self.ids[END.encode()])
        writer.add_add_bos_token(False)


@dataclass(frozen=True)
class Script:
    """What is said after the trigger, piece by piece; then the end token, or `repeat` starts over at the first piece."""

    pieces: Sequence[str | bytes]
    repeat: bool = False


def transitions(
    vocabulary: Vocabulary, scripts: Mapping[str, Script], choices: Mapping[str, Sequence[str]]
) -> np.ndarray:
    """Logits of the next token (columns) after each token (rows); after a token without a script the end token.

    `choices` makes the next token after a trigger any of some tokens, all as likely.
    """
    steps: dict[int, list[int]] = {}

    def step(last: int, following: list[int]) -> None:
        if steps.setdefault(last, following) != following:
            raise ValueError(f"two scripts continue {vocabulary.tokens[last]!r} in two ways")

    end = vocabulary.ids[END.encode()]
    for trigger, script in scripts.items():
        ids = [vocabulary.add(trigger), *(vocabulary.add(piece) for piece in script.pieces)]
        for last, following in zip(ids, [*ids[1:], ids[1] if script.repeat else end], strict=True):
            step(last, [following])
    for trigger, options in choices.items():
        step(vocabulary.add(trigger), [vocabulary.add(option) for option in options])
    vocabulary.pad(64)
    table = np.zeros((len(vocabulary.tokens),) * 2, np.float32)
    for last in range(len(table)):
        table[last, steps.get(last, [end])] = CERTAIN
    return table


def write_script_model(
    path: Path,
    scripts: Mapping[str, Script],
    *,
    choices: Mapping[str, Sequence[str]] | None = None,
    template: str | None = PLAIN_TEMPLATE,
    context: int = 4096,
    layers: int = 1,
    feed_forward: int = 64,
) -> Vocabulary:
    """Writes the model and returns its vocabulary. `layers` and `feed_forward` only make it slower."""
    vocabulary = Vocabulary()
    table = transitions(vocabulary, scripts, choices or {})
    width = len(table)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(64)
    writer.add_value_length(64)
    writer.add_rope_dimension_count(64)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(width)
    writer.add_file_type(int(gguf.LlamaFileType.ALL_F32))
    vocabulary.write(writer)
    if template is not None:
        writer.add_chat_template(template)
    writer.add_tensor("token_embd.weight", np.eye(width, dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.full(width, width**-0.5, np.float32))
    writer.add_tensor("output.weight", np.ascontiguousarray(table.T))
    shapes = {
        "attn_q": (64, width),
        "attn_k": (64, width),
        "attn_v": (64, width),
        "attn_output": (width, 64),
        "ffn_gate": (feed_forward, width),
        "ffn_up": (feed_forward, width),
        "ffn_down": (width, feed_forward),
    }
    for layer in range(layers):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", np.ones(width, np.float32))
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", np.ones(width, np.float32))
        for name, shape in shapes.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.zeros(shape, np.float32))
    _finish(writer)
    return vocabulary


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
