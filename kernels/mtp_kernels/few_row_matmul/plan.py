"""How a launch of the CUDA few-row matmul divides its work and its shared memory; see kernel.cu and wide.cu.

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
_MAX_UNITS, _MAX_STAGES, _MAX_WIDE_STAGES = 6, 8, 6
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

    source, template, threads, shares = "kernel.cu", "Launch", THREADS, 1

    @property
    def arguments(self) -> str:
        """The template arguments that say so."""
        return f"{self.parts}, {str(self.resident).lower()}, {self.units}, {self.stages}"

    def tiles(self, pieces: int) -> int:
        """Tiles of the launch that has so many pieces of 16 output features."""
        return pieces

    def branches(self, tiles: int, inputs: int) -> int:
        """Floats that blocks leave for each other: none."""
        return 0


@dataclass(frozen=True)
class WidePlan:
    """Template arguments of a launch for more than 8 rows.

    Attributes:
        parts: of K, as in `Plan`.
        classes: accumulators of the 16 that a block has.
        columns: groups of 8 rows.
        joined: pieces of 16 features by 8 rows whose accumulators meet in shared memory at a time, 1 or 2 of each warp.
        stages: of the ring.
        scale_bytes: of one copy of scales.
        shared_bytes: what it all takes.
        swiglu: whether half of a tile's features are the gate's.
    """

    parts: int
    classes: int
    columns: int
    joined: int
    stages: int
    scale_bytes: int
    shared_bytes: int
    swiglu: bool

    source, template, threads = "wide.cu", "WideLaunch", (WARPS + 4) * 32

    @property
    def arguments(self) -> str:
        """The template arguments that say so."""
        return f"{self.parts}, {self.classes}, {self.columns}, {self.joined}, {self.stages}"

    @property
    def shares(self) -> int:
        """Of K, each with blocks of its own."""
        return self.parts * WARPS // self.classes

    def tiles(self, pieces: int) -> int:
        """Tiles of the launch that has so many pieces of 16 output features."""
        return -(-pieces // (WARPS // self.classes * (1 if self.swiglu else 2)))

    def branches(self, tiles: int, inputs: int) -> int:
        """Floats that the shares leave for each other: sums of their tiles, and of each row's squares."""
        if self.shares == 1:
            return 0
        rows, features = self.columns * TILE_ROWS, 2 * TILE_FEATURES * WARPS // self.classes
        return rows * (self.shares * tiles * features + -(-inputs // 256))


@functools.cache
def launches(rows: int, inputs: int, bits: int, group: int, *, swiglu: bool, norm: bool) -> tuple[int, ...]:
    """How many rows each launch takes, at most 32 in all."""

    def fits(count: int) -> bool:
        return wide_plan(count, inputs, bits, group, swiglu=swiglu, norm=norm) is not None

    made = []
    while rows > 0:
        taken = next((n for n in (32, 16) if rows > n // 2 and fits(n)), TILE_ROWS)
        made.append(min(rows, taken))
        rows -= taken
    return tuple(made)


@functools.cache
def wide_plan(rows: int, inputs: int, bits: int, group: int, *, swiglu: bool, norm: bool) -> WidePlan | None:
    """The plan for 9 to 32 rows; None where they do not fit."""
    made = _wide_plans(rows, inputs, bits, group, swiglu, norm)
    # The fewest shares with a ring that memory's latency needs.
    return next((p for least in (3, 2) for p in made if p.stages >= least), None)


def _wide_plans(rows: int, inputs: int, bits: int, group: int, swiglu: bool, norm: bool) -> list[WidePlan]:
    """By falling number of classes; of stages there may be too few."""
    columns = 2 if rows <= 2 * TILE_ROWS else 4
    unit, unit_bytes = 32 if bits != 4 else 64, 64 if bits == 16 else 32
    parts = -(-inputs // PART_INPUTS)
    part_units = -(-inputs // (unit * parts * WARPS)) * WARPS
    made = []
    for classes in (16, 8, 4):
        if classes * unit < 256:  # the sum of squares of 256 values is one share's
            continue
        features, staged = 2 * TILE_FEATURES * WARPS // classes, part_units * unit * classes // WARPS
        line = 0 if bits == 16 else classes * unit // group * 2
        stage = features * (classes * unit_bytes + 2 * line)
        sums = 0 if bits == 16 else staged // (64 if bits == 4 and group > 32 else 32) * 4
        squares = 4 * -(-inputs // 256) if norm and parts * WARPS == classes else 0
        scale_bytes = 16 if bits == 16 else math.gcd(16, line, inputs // group * 2)
        for joined in (2, 1):
            partials = 2 * WARPS * joined * TILE_FEATURES * TILE_ROWS * 4
            fixed = 256 + partials + columns * TILE_ROWS * (4 + sums + 2 * staged + squares)
            stages = min(_MAX_WIDE_STAGES, (SHARED_MEMORY_BYTES - fixed) // stage)
            made.append(WidePlan(parts, classes, columns, joined, stages, scale_bytes, fixed + stages * stage, swiglu))
    return made


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
