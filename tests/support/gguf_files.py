"""Small GGUF models with known answers, for tests that run the real llama.cpp.

`write_script_model` makes a llama-architecture model whose next token depends on the last token alone: embeddings are
one-hot, attention and feed-forward add nothing, and the output matrix is the table of transitions. A script is a list
of pieces of text said after a trigger; every piece is a token of its own. `write_mtp_model` says the same through
a Qwen3.5 trunk (one gated-delta layer, one attention layer) with a multi-token-prediction block that drafts.
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
HEAD, DELTA_HEAD = 64, 32  # widths of attention and gated-delta heads
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


# Takes functions and their results, and calls in the words of Qwen's templates.
TOOL_TEMPLATE = (
    "{% if tools %}<|tools|>{% for t in tools %}{{ t | tojson }}{% endfor %}"
    'Call with <tool_call>{"name": ..., "arguments": ...}</tool_call>{% endif %}'
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% for c in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
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
    """What is said after the trigger, piece by piece; then the end token, or, with `repeat`, the first piece again."""

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
    _write_sizes(writer, context, width, layers, feed_forward)
    _write_vocabulary(writer, vocabulary, template)
    _write_ends(writer, table)
    for layer in range(layers):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", np.ones(width, np.float32))
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", np.ones(width, np.float32))
        _write_zeros(writer, layer, _attention(width, query_rows=HEAD) | _feed_forward(width, feed_forward))
    _finish(writer)
    return vocabulary


def write_mtp_model(
    path: Path,
    scripts: Mapping[str, Script],
    *,
    wrong_every: int = 0,
    template: str | None = PLAIN_TEMPLATE,
    context: int = 4096,
) -> Vocabulary:
    """Writes the model and returns its vocabulary.

    Its head reads the next token's embedding alone and drafts what the trunk will say, except after every token whose
    id is a multiple of `wrong_every`, where it drafts the end token.
    """
    vocabulary = Vocabulary()
    table = transitions(vocabulary, scripts, {})
    width, feed_forward = len(table), 64
    writer = gguf.GGUFWriter(path, "qwen35")
    _write_sizes(writer, context, width, 3, feed_forward)
    writer.add_rope_dimension_sections([8, 8, 8, 8])
    writer.add_uint32("qwen35.full_attention_interval", 2)
    writer.add_uint32("qwen35.nextn_predict_layers", 1)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_inner_size(2 * DELTA_HEAD)
    writer.add_ssm_state_size(DELTA_HEAD)
    writer.add_ssm_time_step_rank(2)
    writer.add_ssm_group_count(2)
    _write_vocabulary(writer, vocabulary, template)
    _write_ends(writer, table)
    attention = _attention(width, query_rows=2 * HEAD)  # queries and their gates
    for layer, mixer in enumerate((_delta(width), attention, attention)):
        for norm in ("attn_norm", "post_attention_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(width, np.float32))
        _write_zeros(writer, layer, mixer | _feed_forward(width, feed_forward))
        if mixer is attention:
            writer.add_tensor(f"blk.{layer}.attn_q_norm.weight", np.ones(HEAD, np.float32))
            writer.add_tensor(f"blk.{layer}.attn_k_norm.weight", np.ones(HEAD, np.float32))
    writer.add_tensor("blk.0.ssm_dt.bias", np.zeros(2, np.float32))
    writer.add_tensor("blk.0.ssm_a", np.full(2, -1, np.float32))
    writer.add_tensor("blk.0.ssm_norm.weight", np.ones(DELTA_HEAD, np.float32))
    _write_head(writer, vocabulary, table, wrong_every)
    _finish(writer)
    return vocabulary


def _write_head(writer: gguf.GGUFWriter, vocabulary: Vocabulary, table: np.ndarray, wrong_every: int) -> None:
    width = len(table)
    drafts = table.copy()
    if wrong_every:
        drafts[::wrong_every] = 0
        drafts[::wrong_every, vocabulary.ids[END.encode()]] = CERTAIN
    norm = np.full(width, width**-0.5, np.float32)
    for name in ("enorm", "hnorm", "shared_head_norm"):
        writer.add_tensor(f"blk.2.nextn.{name}.weight", norm)
    embedding_only = np.concatenate([np.eye(width, dtype=np.float32), np.zeros((width, width), np.float32)], axis=1)
    writer.add_tensor("blk.2.nextn.eh_proj.weight", embedding_only)
    writer.add_tensor("blk.2.nextn.shared_head_head.weight", np.ascontiguousarray(drafts.T))


def _write_sizes(writer: gguf.GGUFWriter, context: int, width: int, layers: int, feed_forward: int) -> None:
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_rope_dimension_count(HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(width)
    writer.add_file_type(int(gguf.LlamaFileType.ALL_F32))


def _write_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary, template: str | None) -> None:
    vocabulary.write(writer)
    if template is not None:
        writer.add_chat_template(template)


def _write_ends(writer: gguf.GGUFWriter, table: np.ndarray) -> None:
    width = len(table)
    writer.add_tensor("token_embd.weight", np.eye(width, dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.full(width, width**-0.5, np.float32))  # undoes the norm of a one-hot
    writer.add_tensor("output.weight", np.ascontiguousarray(table.T))


Shapes = dict[str, tuple[int, ...]]


def _attention(width: int, query_rows: int) -> Shapes:
    return {
        "attn_q": (query_rows, width),
        "attn_k": (HEAD, width),
        "attn_v": (HEAD, width),
        "attn_output": (width, HEAD),
    }


def _delta(width: int) -> Shapes:
    inner = 2 * DELTA_HEAD
    return {
        "attn_qkv": (3 * inner, width),
        "attn_gate": (inner, width),
        "ssm_conv1d": (3 * inner, 4),
        "ssm_beta": (2, width),
        "ssm_alpha": (2, width),
        "ssm_out": (width, inner),
    }


def _feed_forward(width: int, inner: int) -> Shapes:
    return {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}


def _write_zeros(writer: gguf.GGUFWriter, layer: int, shapes: Shapes) -> None:
    for name, shape in shapes.items():
        writer.add_tensor(f"blk.{layer}.{name}.weight", np.zeros(shape, np.float32))


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
