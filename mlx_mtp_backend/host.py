"""Evaluated arrays as plain Python values."""

from __future__ import annotations

from typing import Any

import mlx.core as mx


def ints(array: mx.array) -> list[int]:
    """A one-dimensional integer array."""
    values: Any = array.tolist()
    return [int(value) for value in values]


def flags(array: mx.array) -> list[bool]:
    """A one-dimensional bool array."""
    values: Any = array.tolist()
    return [bool(value) for value in values]


def table(array: mx.array) -> list[list[int]]:
    """A two-dimensional integer array, row by row."""
    values: Any = array.tolist()
    return [[int(value) for value in row] for row in values]


def number(array: mx.array) -> float:
    """A scalar."""
    value: Any = array.item()
    return float(value)
