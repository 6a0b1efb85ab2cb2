"""How a launch of the CUDA few-row matmul divides its work and its shared memory; see kernel.cu.

Parts of K depend on K alone, since they are part of the order in which a row is summed. All else may follow from the
number of rows.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ..launch import SHARED_MEMORY_BYTES

TILE_ROWS = 8
TILE_FEATURES = 16
WARPS = 16
THREADS = (WARPS + 2) * 32
PART_INPUTS = 9216
"""Most inputs in a part: eight rows of them leave room for a ring."""
_KEEP = 4
_MAX_UNITS, _MAX_STAGES = 6, 8
# Least and most of a ring, measured; the second for all of a K in parts, whose tiles are long and few.
_RING_BYTES, _LONG_RING_BYTES = (0, 144 * 1024), (80 * 1024, 96 * 1024)


@dataclass(frozen=True)
class Plan:
    """Template arguments of a launch.

    Attributes:
        parts: of K.
        resident: whether all parts of the activations are in shared memory at once.
        units: of 32 bytes of a weight row (64 where dense) for each warp in a stage.
        stages: of the ring.
        scale_bytes: of one copy of scales.
        shared_bytes: what it all takes.
    """

    parts: int
    resident: bool
    units: int
    stages: int
    scale_bytes: int
    shared_bytes: int


@functools.cache
def plan(rows: int, inputs: int, bits: int, group: int, *, swiglu: bool, norm: bool) -> Plan:
    """The plan for at most 8 rows; bits 16 and group 0 are dense."""
    unit = 32 if bits != 4 else 64  # inputs
    parts = -(-inputs // PART_INPUTS)
    part_units = -(-inputs // (unit * parts * WARPS)) * WARPS
    scale_bytes = 16
    if bits != 16:
        scale_bytes = math.gcd(16, WARPS * unit // group * 2, inputs // group * 2)
    each = part_units // WARPS  # units of a warp in a part
    # Wide stages that divide a part evenly first: a copy costs the same whatever its size, and a narrow rest is slow.
    widths = sorted(range(1, _MAX_UNITS + 1), key=lambda units: (units < min(3, each), each % units != 0, -units))
    for resident in (True, False) if parts > 1 else (True,):
        least, most = _LONG_RING_BYTES if resident and parts > 1 else _RING_BYTES
        fixed = _fixed_bytes(rows, inputs, bits, group, parts, part_units * unit, resident, swiglu, norm)
        made = []
        for units in widths:
            stage = _stage_bytes(units, bits, group)
            stages = min(_MAX_STAGES, most // stage, (SHARED_MEMORY_BYTES - fixed) // stage)
            if stages >= 2 and stages * stage >= least:
                made.append(Plan(parts, resident, units, stages, scale_bytes, fixed + stages * stage))
        good = [p for p in made if p.units >= min(3, each) and each % p.units == 0]
        if made:
            return next((p for p in good if p.stages >= 3), (good or made)[0])
    raise ValueError(f"{inputs} inputs in {bits} bits do not fit into shared memory")


def _stage_bytes(units: int, bits: int, group: int) -> int:
    unit_bytes = 64 if bits == 16 else 32
    row = (units * WARPS + 1) * unit_bytes
    scales = 0 if bits == 16 else units * WARPS * unit_bytes * 8 // bits // group * 2 + 16
    return TILE_FEATURES * (row + 2 * scales)


def _fixed_bytes(
    rows: int, inputs: int, bits: int, group: int, parts: int, part: int, resident: bool, swiglu: bool, norm: bool
) -> int:
    """All but the ring's stages, in the order of kernel.cu; `part` in inputs."""
    per_tile = 2 if swiglu else 1
    fold = 64 if bits == 4 and group > 32 else 32
    reduce = 2 * WARPS * per_tile * (TILE_FEATURES * TILE_ROWS + 2) * 4
    kept = 0 if resident else _KEEP * per_tile * TILE_FEATURES * TILE_ROWS * 4
    squares = TILE_ROWS * 4 * -(-inputs // 256) if norm else 0
    staged = parts * part if resident else part
    sums = 0 if bits == 16 else staged // fold * TILE_ROWS * 4
    return 256 + reduce + kept + squares + TILE_ROWS * 4 + sums + rows * min(staged, inputs) * 2
