"""The text, tokenizer and chat template of synthetic checkpoints, and the word chain that makes them readable.

The chain knows which token followed which in the passage below and nothing else. It does not read its prompt.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|im_end|>"
SPECIALS = ["<|endoftext|>", "<|im_start|>", END]
# Tokens of their own, but part of the text, as released Qwen tokenizers have them.
REASONING = ["<think>", "</think>"]

PASSAGE = """\
The checkout service slowed down when its primary database lost a disk.
Replication fell behind, and reads from the standby began to return old carts.
Every retry from the web tier added load to the same exhausted connection pool.
Within four minutes the queue of payment jobs had grown past its limit.
Most of the alerts repeat one fact seen from different hosts.
The first alert that matters came from the storage controller in rack seven.
After that, latency on the order service rose because it waits for the database.
The search cluster was not affected and its warnings are noise.
An engineer moved the primary to a healthy node and the pool drained.
Error rates fell to normal once the workers had emptied the queue.
No data was lost, but some customers saw a stale basket for a short time.
The likely cause is a failing disk, and the evidence is a burst of write errors.
Replace the disk before the next backup window and keep the standby in service.
Raise the alarm on replication lag earlier so that reads can be moved in time.
Cap the retries of the web tier, because they turned a slow minute into an outage.
Follow the incident until the nightly batch has finished without a failure.
"""

# ChatML, with the reasoning switch of the Qwen templates.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking -%}
<think>

</think>

{% endif -%}
{%- endif -%}
"""

_START = "\n"
_END_AFTER_SENTENCE = 0.12
# Logits of what never follows: 1e-10 of a certain token at temperature 1.
_NEVER = -23.0


def build_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, trained on the passage: encodes any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(REASONING),
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PASSAGE.replace("\n", " "), PASSAGE], trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in REASONING])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json, as a released checkpoint has them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": SPECIALS[0],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    eos = [tokenizer.token_to_id(END), tokenizer.token_to_id(SPECIALS[0])]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))


def chain_logits(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """log P(next | last) of the passage's chain: float32 [last, next]; what never follows is _NEVER."""
    counts = np.zeros((vocab_size, vocab_size))
    starts = np.zeros(vocab_size)
    sentences = [tokenizer.encode(line if i == 0 else " " + line).ids for i, line in enumerate(PASSAGE.splitlines())]
    for ids in sentences:
        starts[ids[0]] += 1
        for last, following in itertools.pairwise(ids):
            counts[last, following] += 1
    law = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    law[counts.sum(axis=1) == 0] = starts / starts.sum()
    for last in {ids[-1] for ids in sentences}:
        law[last] = starts / starts.sum() * (1 - _END_AFTER_SENTENCE)
        law[last, tokenizer.token_to_id(END)] = _END_AFTER_SENTENCE
    with np.errstate(divide="ignore"):
        logits: np.ndarray = np.maximum(np.log(law), _NEVER).astype(np.float32)
    return logits


def visits(logits: np.ndarray, start: int, steps: int = 400) -> np.ndarray:
    """How often the chain stands at each token when drawn at temperature 1, from `start`: [V], sums to 1."""
    law = np.exp(logits.astype(np.float64))
    law /= law.sum(axis=1, keepdims=True)
    at = np.zeros(len(law))
    at[start] = 1
    total: np.ndarray = np.zeros(len(law))
    for _ in range(steps):
        at = at @ law
        total += at
    total /= total.sum()
    return total


def start_token(tokenizer: Tokenizer) -> int:
    """The token a rendered prompt ends with."""
    return int(tokenizer.encode(_START).ids[-1])
