"""What the header of a GGUF file says of the model: keys of the metadata by architecture, and names of tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_NUMBER = 2**32  # no size in the metadata reaches this

Value = int | float | bool | str | tuple["Value", ...]

# Values of general.file_type: code, name.
_FILE_TYPE_TABLE = (
    "0 F32,1 F16,2 Q4_0,3 Q4_1,7 Q8_0,8 Q5_0,9 Q5_1,10 Q2_K,11 Q3_K_S,12 Q3_K_M,13 Q3_K_L,14 Q4_K_S,15 Q4_K_M,"
    "16 Q5_K_S,17 Q5_K_M,18 Q6_K,19 IQ2_XXS,20 IQ2_XS,21 Q2_K_S,22 IQ3_XS,23 IQ3_XXS,24 IQ1_S,25 IQ4_NL,26 IQ3_S,"
    "27 IQ3_M,28 IQ2_S,29 IQ2_M,30 IQ4_XS,31 IQ1_M,32 BF16,36 TQ1_0,37 TQ2_0,38 MXFP4,39 NVFP4,40 Q1_0"
)
_FILE_TYPES = {int(code): name for code, name in (row.split() for row in _FILE_TYPE_TABLE.split(","))}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One entry of the tensor table. `shape` has the fastest dimension first; `offset` counts from the file's start."""

    shape: tuple[int, ...]
    type: str
    offset: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says of itself. Long strings and arrays are left out of `metadata`."""

    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]
    file_bytes: int

    @property
    def architecture(self) -> str:
        """`general.architecture`, such as "llama" or "qwen35"."""
        return self._text("general.architecture")

    @property
    def quantization(self) -> str:
        """The file type as quantizers name it, else the type of most tensors; "" for a file with neither."""
        code = self._integer("general.file_type")
        if code is not None and code in _FILE_TYPES:
            return _FILE_TYPES[code]
        types = Counter(tensor.type for tensor in self.tensors.values())
        return types.most_common(1)[0][0] if types else ""

    @property
    def context_length(self) -> int | None:
        """Tokens of context that the model was made for."""
        return self._integer(f"{self.architecture}.context_length") or None

    @property
    def cache_bytes(self) -> int | None:
        """Bytes that a token of context takes in llama.cpp's caches (see `gguf_cache_bytes`)."""
        return gguf_cache_bytes(self.metadata)

    @property
    def chat_template(self) -> str:
        """The Jinja template, "" where there is none."""
        return self._text("tokenizer.chat_template")

    @property
    def mtp_layers(self) -> int:
        """Multi-token-prediction blocks that the metadata declares."""
        return self._integer(f"{self.architecture}.nextn_predict_layers") or 0

    @property
    def mtp_tensor(self) -> str | None:
        """Name of the first block's input projection of a prediction head, None where the file holds none."""
        names = (name for name in self.tensors if name.startswith("blk.") and name.endswith(".nextn.eh_proj.weight"))
        return min(names, key=lambda name: (len(name), name), default=None)

    def _text(self, key: str) -> str:
        value = self.metadata.get(key)
        return value if isinstance(value, str) else ""

    def _integer(self, key: str) -> int | None:
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def gguf_cache_bytes(metadata: Mapping[str, Any]) -> int | None:
    """Bytes that a token of context takes in keys and values of 16 bits; None where the metadata does not tell.

    Layers whose state does not grow with the context are left out; a sliding window counts as if it held everything.
    """
    architecture = metadata.get("general.architecture")

    def number(key: str) -> int | None:
        value = metadata.get(f"{architecture}.{key}")
        return value if type(value) is int and 0 < value < MAX_NUMBER else None

    layers, heads = number("block_count"), number("attention.head_count")
    if layers is None:
        return None
    if interval := number("full_attention_interval"):  # the blocks of a prediction head have attention too
        head = number("nextn_predict_layers") or 0
        layers = (layers - head) // interval + head
    if rank := number("attention.kv_lora_rank"):  # multi-head latent attention keeps one compressed row
        return layers * (rank + (number("rope.dimension_count") or 0)) * 2
    embedding, kept = number("embedding_length"), metadata.get(f"{architecture}.attention.head_count_kv", heads)
    size = embedding // heads if embedding and heads else None
    key, value = number("attention.key_length") or size, number("attention.value_length") or size
    counts = kept if isinstance(kept, tuple | list) else (kept,)
    if key is None or value is None or not all(type(count) is int and 0 <= count < MAX_NUMBER for count in counts):
        return None
    pairs = sum(counts) * (1 if isinstance(kept, tuple | list) else layers)  # one number, or one for every layer
    return pairs * (key + value) * 2
