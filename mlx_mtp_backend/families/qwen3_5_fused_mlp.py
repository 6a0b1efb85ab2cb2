"""A layer's feed-forward part through the GPU kernels: a dense MLP in two launches, a mixture of experts in three."""

from __future__ import annotations

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.qwen3_5 import DecoderLayer
from mlx_lm.models.qwen3_next import Qwen3NextSparseMoeBlock
from mtp_kernels import few_row_experts as experts_kernel
from mtp_kernels.few_row_experts.probe import case as experts_case
from mtp_kernels.few_row_matmul import Matrix
from mtp_kernels.registry import Selection

from mlx_mtp_backend.families.qwen3_5_fused_products import Unsupported, Works, matrix_of, product
from mlx_mtp_backend.host import evaluate

# Rows of a prompt that still take less time in passes of few rows than all experts take to be unpacked.
_SLICED_ROWS = 256


class FusedMLP:
    """RMSNorm, gate, up and SwiGLU in one launch, down and the residual in another."""

    def __init__(self, layer: DecoderLayer, dtype: mx.Dtype, selection: Selection) -> None:
        mlp = layer.mlp
        self.enter = product(
            selection, [mlp.gate_proj, mlp.up_proj], dtype, layer.post_attention_layernorm, swiglu=True
        )
        self.leave = product(selection, [mlp.down_proj], dtype, residual=True)

    def __call__(self, x: mx.array, works: Works) -> mx.array:
        return self.leave(self.enter(x, work=works.mlp_enter), residual=x, work=works.mlp_leave)


class FusedExperts:
    """RMSNorm and the router's logits in one launch, the experts that they choose and the shared one in two.

    Raises:
        Unsupported: the kernels do not have these formats or shapes.
    """

    def __init__(self, layer: DecoderLayer, dtype: mx.Dtype, selection: Selection) -> None:
        block: Qwen3NextSparseMoeBlock = layer.mlp
        routed, shared, norm = block.switch_mlp, block.shared_expert, layer.post_attention_layernorm
        self.experts = experts_kernel.Experts(
            **{name: stacked_matrix(routed[f"{name}_proj"]) for name in ("gate", "up", "down")},
            **{f"shared_{name}": matrix_of(shared[f"{name}_proj"]) for name in ("gate", "up", "down")},
            count=block.num_experts,
            top=block.top_k,
            normalised=block.norm_topk_prob,
        )
        if reason := experts_kernel.supported(self.experts, dtype):
            raise Unsupported(reason)
        gates = [block.gate, block.shared_expert_gate]
        self.gates = [matrix_of(gate) for gate in gates]
        alike = len({(matrix.bits, matrix.group_size) for matrix in self.gates}) == 1
        # Matrices of one format are one launch.
        launches = [gates] if alike else [[gate] for gate in gates]
        self.routers = [product(selection, some, dtype, norm, out_dtype=mx.float32) for some in launches]
        self.run = selection.resolve(experts_case(self.experts, dtype))
        self.norm, self.eps, self.most_rows = norm.weight, norm.eps, experts_kernel.most_rows(self.experts)

    def __call__(self, x: mx.array, works: Works) -> mx.array:
        parts = [self._some(x[first : first + self.most_rows]) for first in range(0, x.shape[0], self.most_rows)]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def many_rows(self, x: mx.array) -> mx.array:
        """The same for one sequence's rows [N, hidden] of a prompt."""
        if x.shape[0] <= _SLICED_ROWS:
            return self(x, Works())
        h = mx.fast.rms_norm(x, self.norm, self.eps)
        logits = experts_kernel.router_logits(h, self.gates)
        return x + experts_kernel.many_row_experts(h, logits, self.experts, evaluate)

    def _some(self, x: mx.array) -> mx.array:
        logits = [router(x) for router in self.routers]
        joined = logits[0] if len(logits) == 1 else mx.concatenate(logits, axis=-1)
        y: mx.array = self.run(x, joined, self.experts, self.norm, self.eps)
        return y


def stacked_matrix(linear: Module) -> Matrix:
    """The weights `[E, N, K]` of an mlx-lm switch layer as those of one matrix `[E * N, K]`. Raises Unsupported."""
    stacked = matrix_of(linear)
    weight = stacked.weight.reshape(-1, stacked.weight.shape[-1])
    scales, biases = (None if a is None else a.reshape(-1, a.shape[-1]) for a in (stacked.scales, stacked.biases))
    flat = Matrix(weight, scales, biases, stacked.bits, stacked.group_size)
    mx.eval(flat.arrays())
    return flat


def fused_mlp(layer: DecoderLayer, dtype: mx.Dtype, selection: Selection) -> FusedMLP | FusedExperts:
    """The layer's feed-forward part through the kernels, whichever it has. Raises Unsupported."""
    mixture = isinstance(layer.mlp, Qwen3NextSparseMoeBlock)
    return (FusedExperts if mixture else FusedMLP)(layer, dtype, selection)
