"""The few-row experts on Metal; unproved on a Mac, and run only after the registry's checks."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .. import few_row_matmul
from ..few_row_matmul import Matrix
from ..launch import METAL_TYPES, metal_launch, source_text
from .reference import Experts

_SIMDGROUPS = 8
_THREADS = _SIMDGROUPS * 32
_ENTER_FEATURES, _LEAVE_FEATURES = 2, 4
_PLACE = """
  const int lane = int(thread_index_in_simdgroup), simdgroup = int(simdgroup_index_in_threadgroup);
  const int thread_id = int(thread_position_in_threadgroup.x), group = int(threadgroup_position_in_grid.x);
"""
_ROUTE = """
  threadgroup int chosen[ROWS * TOP];
  threadgroup uint sets[E];
  for (int row = simdgroup; row < ROWS; row += SIMDGROUPS) {
    experts::normed<T, HIDDEN>(x + row * HIDDEN, norm_weight, EPS, lane, h + row * HIDDEN);
    experts::choose<E, TOP, NORMALISED>(logits + row * (E + 1), lane, chosen + row * TOP, weights + row * (TOP + 1));
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  experts::list_experts<E, TOP, ROWS, SLOTS, THREADS>(chosen, sets, thread_id, slots, pairs);
"""
_ENTER = """
  const int tile = group * SIMDGROUPS + simdgroup, own = tile - SHARED_TILES;
  if (own < 0) {
    experts::enter<T, SHARED_BITS, SHARED_GROUP, HIDDEN, 1, false>(
        h, shared_gate, shared_up, size_t(tile * 2), pairs, 0, ROWS, SHARED_WIDTH, tile * 2, lane, shared);
  } else {
    const experts::Slot slot = experts::slot_of(slots, own / TILES);
    const int first = own % TILES * 2;
    experts::enter<T, BITS, GROUP, HIDDEN, TOP, true>(
        h, gate, up, size_t(slot.expert) * WIDTH + first, pairs, slot.start, slot.count, WIDTH, first, lane, activated);
  }
"""
_LEAVE = """
  threadgroup float made[ROWS * (TOP + 1) * 4];
  const int first = group * 4;
  if (simdgroup == 0)
    experts::leave<T, SHARED_BITS, SHARED_GROUP, SHARED_WIDTH, false>(
        shared, shared_down, size_t(first), pairs, 0, ROWS, lane, made + ROWS * TOP * 4);
  for (int i = simdgroup; i < SLOTS; i += SIMDGROUPS) {
    const experts::Slot slot = experts::slot_of(slots, i);
    experts::leave<T, BITS, GROUP, WIDTH, true>(
        activated, down, size_t(slot.expert) * HIDDEN + first, pairs, slot.start, slot.count, lane, made);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = thread_id; i < ROWS * 4; i += THREADS) {
    const int row = i / 4, f = i % 4, at = row * HIDDEN + first + f;
    float sum = 0.0f;
    for (int s = 0; s < TOP; ++s) sum = fma(weights[row * (TOP + 1) + s], made[(row * TOP + s) * 4 + f], sum);
    sum = fma(weights[row * (TOP + 1) + TOP], made[(ROWS * TOP + row) * 4 + f], sum);
    y[at] = T(float(x[at]) + sum);
  }
"""


def launch(x: mx.array, logits: mx.array, experts: Experts, norm_weight: mx.array, eps: float) -> mx.array:
    """Three launches; arguments are checked by the caller."""
    rows, pairs, kind = x.shape[0], x.shape[0] * experts.top, x.dtype
    slots = min(pairs, experts.count)
    constants = _constants(x, experts, eps)
    h, slots_made, pairs_made, weights = metal_launch(
        "experts_route",
        _header(),
        constants + _PLACE + _ROUTE,
        ("x", "logits", "norm_weight"),
        ("h", "slots", "pairs", "weights"),
    )(
        inputs=[x, logits, norm_weight],
        output_shapes=[x.shape, (slots, 4), (pairs,), (rows, experts.top + 1)],
        output_dtypes=[kind, mx.int32, mx.int32, mx.float32],
        grid=(_THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
    )
    matrices = {"gate": experts.gate, "up": experts.up}
    matrices |= {"shared_gate": experts.shared_gate, "shared_up": experts.shared_up}
    names, arrays, text = _named(matrices)
    # Widths are multiples of 128, so no simdgroup is without a tile.
    tiles = (experts.shared_width + slots * experts.width) // _ENTER_FEATURES
    activated, shared = metal_launch(
        "experts_enter",
        _header(),
        constants + _formats(experts.gate, experts.shared_gate) + text + _PLACE + _ENTER,
        ("h", "slots", "pairs", *names),
        ("activated", "shared"),
    )(
        inputs=[h, slots_made, pairs_made, *arrays],
        output_shapes=[(pairs, experts.width), (rows, experts.shared_width)],
        output_dtypes=[kind, kind],
        grid=(tiles // _SIMDGROUPS * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
    )
    names, arrays, text = _named({"down": experts.down, "shared_down": experts.shared_down})
    (y,) = metal_launch(
        "experts_leave",
        _header(),
        constants + _formats(experts.down, experts.shared_down) + text + _PLACE + _LEAVE,
        ("x", "activated", "shared", "slots", "pairs", "weights", *names),
        ("y",),
    )(
        inputs=[x, activated, shared, slots_made, pairs_made, weights, *arrays],
        output_shapes=[x.shape],
        output_dtypes=[kind],
        grid=(experts.hidden // _LEAVE_FEATURES * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
    )
    return y


def _header() -> str:
    """The few-row matmul's functions, then those of the experts."""
    return source_text(few_row_matmul.__file__, "kernel.metal") + source_text(__file__, "kernel.metal")


def _constants(x: mx.array, experts: Experts, eps: float) -> str:
    rows = x.shape[0]
    return f"""
  using T = {METAL_TYPES[x.dtype]};
  constexpr int ROWS = {rows}, E = {experts.count}, TOP = {experts.top};
  constexpr int SLOTS = {min(rows * experts.top, experts.count)};
  constexpr int HIDDEN = {experts.hidden}, WIDTH = {experts.width}, SHARED_WIDTH = {experts.shared_width};
  constexpr int TILES = WIDTH / 2, SHARED_TILES = SHARED_WIDTH / 2, SIMDGROUPS = {_SIMDGROUPS}, THREADS = {_THREADS};
  constexpr bool NORMALISED = {str(experts.normalised).lower()};
  constexpr float EPS = {eps!r}f;
"""


def _formats(routed: Matrix, shared: Matrix) -> str:
    sizes = [f"{m.bits}, {name}GROUP = {m.group_size or 32}" for name, m in (("", routed), ("SHARED_", shared))]
    return f"  constexpr int BITS = {sizes[0]}, SHARED_BITS = {sizes[1]};\n"


def _named(matrices: dict[str, Matrix]) -> tuple[Sequence[str], list[mx.array], str]:
    """Inputs for matrices, and statements that gather each matrix under its name."""
    names: list[str] = []
    arrays: list[mx.array] = []
    text = ""
    for name, m in matrices.items():
        own = [f"{name}_{part}" for part in ("w", "s", "b")][: len(m.arrays())]
        names, arrays = names + own, arrays + m.arrays()
        given = ", ".join(own)
        if m.scales is None:  # two values make a word
            given = f"reinterpret_cast<const device uint*>({own[0]}), {own[0]}, {own[0]}"
        text += f"  const auto {name} = few_row::matrix({given});\n"
    return names, arrays, text
