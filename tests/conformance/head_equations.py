"""The Qwen3.5 head in plain NumPy, written from its equations, with every documented way of wiring it wrong.

fc([norm(E[x_{p+1}]), norm(h_p)]), then one decoder layer of gated full attention with its own keys and values,
then a norm and the trunk's output matrix. Float64; weights as stored in the released layout. A mixture of experts has
its experts' tensors in any of their spellings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Weights = dict[str, np.ndarray]

# Each is a mistake that somebody made: it costs acceptance and raises nothing.
CONFUSIONS = [
    "pre-norm seed",
    "hidden before embedding",
    "norms not shifted",
    "final norm not shifted",
    "fusing norms swapped",
    "token at p instead of p + 1",
    "no output gate",
    "gate and query swapped",
    "query and gate interleaved by half instead of by head",
    "no query and key norm",
    "rotary over the whole head",
    "rotary base of another model",
    "rotary pairs interleaved",
    "not causal",
    "kv heads tiled instead of repeated",
    "gate and up projections swapped",
    "no final norm",
    "norm epsilon of another model",
]

# Likewise, of mixtures of experts.
MOE_CONFUSIONS = [
    "gate and up projections swapped",
    "experts' weights not renormalised",
    "experts weighted alike",
    "experts weighted by a sigmoid",
    "one expert fewer a token",
    "the worst experts instead of the best",
    "experts in another order",
    "no gate of the shared expert",
    "no shared expert",
    "no routed experts",
]


@dataclass(frozen=True)
class Head:
    """The head's forward pass.

    Args:
        weights: head tensors by their names after "mtp.", plus "embed", "lm_head".
        config: the text config.
        wrong: confusions to apply; none for the right wiring.
    """

    weights: Weights
    config: dict[str, Any]
    wrong: frozenset[str] = field(default_factory=frozenset)

    def __call__(self, tokens: np.ndarray, post: np.ndarray, pre: np.ndarray) -> np.ndarray:
        """Logits [T - 1, V] for tokens [T] and trunk hiddens [T, H] after and before the final norm."""
        w = self.weights
        hidden = (pre if "pre-norm seed" in self.wrong else post)[:-1]
        x = w["embed"][tokens[:-1] if "token at p instead of p + 1" in self.wrong else tokens[1:]]
        names = ["pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight"]
        if "fusing norms swapped" in self.wrong:
            names.reverse()
        parts = [self.norm(x, names[0]), self.norm(hidden, names[1])]
        if "hidden before embedding" in self.wrong:
            parts.reverse()
        z = np.concatenate(parts, axis=-1) @ w["fc.weight"].T
        z = z + self.attention(self.norm(z, "layers.0.input_layernorm.weight"))
        z = z + self.mlp(self.norm(z, "layers.0.post_attention_layernorm.weight"))
        return (z if "no final norm" in self.wrong else self.norm(z, "norm.weight")) @ w["lm_head"].T

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        unshifted = "norms not shifted" in self.wrong or (
            name == "norm.weight" and "final norm not shifted" in self.wrong
        )
        epsilon = 1e-1 if "norm epsilon of another model" in self.wrong else self.config["rms_norm_eps"]
        scale = self.weights[name] + (0 if unshifted else 1)
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale

    def attention(self, x: np.ndarray) -> np.ndarray:
        c, rows = self.config, len(x)
        heads, kv_heads, size = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        project = lambda name: x @ self.weights[f"layers.0.self_attn.{name}.weight"].T  # noqa: E731
        both = project("q_proj")
        if "query and gate interleaved by half instead of by head" in self.wrong:
            query, gate = both[:, : heads * size].reshape(rows, heads, size), both[:, heads * size :]
        else:
            both = both.reshape(rows, heads, 2 * size)
            query, gate = both[..., :size], both[..., size:].reshape(rows, -1)
        if "gate and query swapped" in self.wrong:
            query, gate = gate.reshape(rows, heads, size), query.reshape(rows, -1)
        key = project("k_proj").reshape(rows, kv_heads, size)
        value = project("v_proj").reshape(rows, kv_heads, size)
        if "no query and key norm" not in self.wrong:
            query = self.norm(query, "layers.0.self_attn.q_norm.weight")
            key = self.norm(key, "layers.0.self_attn.k_norm.weight")
        query, key = self.rotate(query), self.rotate(key)
        groups = heads // kv_heads
        tiled = "kv heads tiled instead of repeated" in self.wrong
        key, value = ((np.tile(a, (1, groups, 1)) if tiled else np.repeat(a, groups, axis=1)) for a in (key, value))
        scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(size)
        if "not causal" not in self.wrong:
            scores = np.where(np.tril(np.ones((rows, rows), dtype=bool)), scores, -np.inf)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out = np.einsum("hqk,khd->qhd", p / p.sum(axis=-1, keepdims=True), value).reshape(rows, -1)
        if "no output gate" not in self.wrong:
            out = out / (1 + np.exp(-gate))
        return out @ self.weights["layers.0.self_attn.o_proj.weight"].T

    def rotate(self, x: np.ndarray) -> np.ndarray:
        """Rotary embedding of the first part of each head; slot p stands at position p."""
        rope = self.config["rope_parameters"]
        share = 1.0 if "rotary over the whole head" in self.wrong else rope["partial_rotary_factor"]
        base = 1e6 if "rotary base of another model" in self.wrong else rope["rope_theta"]
        width = int(x.shape[-1] * share)
        half = width // 2
        angle = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        pairs = "rotary pairs interleaved" in self.wrong
        first = x[..., 0:width:2] if pairs else x[..., :half]
        second = x[..., 1:width:2] if pairs else x[..., half:width]
        turned = [first * cos - second * sin, second * cos + first * sin]
        rotated = np.stack(turned, axis=-1).reshape(*x.shape[:-1], width) if pairs else np.concatenate(turned, axis=-1)
        return np.concatenate([rotated, x[..., width:]], axis=-1)

    def mlp(self, x: np.ndarray) -> np.ndarray:
        if "layers.0.mlp.gate.weight" in self.weights:
            return self.mixture(x)
        return self.swiglu(x, *(self.weights[f"layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))

    def swiglu(self, x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
        if "gate and up projections swapped" in self.wrong:
            gate, up = up, gate
        activated = x @ gate.T
        return (activated / (1 + np.exp(-activated)) * (x @ up.T)) @ down.T

    def mixture(self, x: np.ndarray) -> np.ndarray:
        """The best experts of each row by a softmax over all of them, and a shared expert behind a sigmoid."""
        weights, count = self.weights, self.config["num_experts"]
        scores = x @ weights["layers.0.mlp.gate.weight"].T
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p = p / p.sum(axis=-1, keepdims=True)
        order = np.argsort(scores if "the worst experts instead of the best" in self.wrong else -scores, axis=-1)
        best = order[:, : self.config["num_experts_per_tok"] - ("one expert fewer a token" in self.wrong)]
        out = np.zeros_like(x)
        for row, chosen in enumerate(best):
            share = 1 / (1 + np.exp(-scores[row])) if "experts weighted by a sigmoid" in self.wrong else p[row]
            share = np.ones(count) if "experts weighted alike" in self.wrong else share
            total = 1 if "experts' weights not renormalised" in self.wrong else share[chosen].sum()
            for number in chosen:
                asked = (number + 1) % count if "experts in another order" in self.wrong else number
                out[row] += share[number] / total * self.swiglu(x[row], *self.expert(asked))
        if "no routed experts" in self.wrong:
            out = np.zeros_like(x)
        if "no shared expert" in self.wrong:
            return out
        names = (f"layers.0.mlp.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down"))
        shared = self.swiglu(x, *(weights[name] for name in names))
        open_by = 1 / (1 + np.exp(-(x @ weights["layers.0.mlp.shared_expert_gate.weight"].T)))
        return out + shared * (1 if "no gate of the shared expert" in self.wrong else open_by)

    def expert(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gate, up and down of one expert."""
        weights, mlp = self.weights, "layers.0.mlp."
        if f"{mlp}experts.gate_up_proj" in weights:
            gate, up = np.split(weights[f"{mlp}experts.gate_up_proj"][number], 2)
            return gate, up, weights[f"{mlp}experts.down_proj"][number]
        names = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
        if f"{mlp}switch_mlp.{names[0]}" in weights:
            gate, up, down = (weights[f"{mlp}switch_mlp.{name}"][number] for name in names)
        else:
            gate, up, down = (weights[f"{mlp}experts.{number}.{name}"] for name in names)
        return gate, up, down
