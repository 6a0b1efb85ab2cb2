"""From the device to plain Python values, with what the device throws made distinguishable."""

from __future__ import annotations

from typing import Any

import mlx.core as mx


class DeviceFailure(RuntimeError):
    """An evaluation failed: the caches of every sequence in that pass are lost."""


def evaluate(*arrays: Any) -> None:
    """mx.eval. Raises DeviceFailure."""
    try:
        mx.eval(*arrays)
    except RuntimeError as error:
        raise DeviceFailure(str(error)[:200]) from error


def _values(array: mx.array) -> Any:
    """Waits for the device where nobody has: a nucleus is looked at, or drafts are, while a round is built."""
    evaluate(array)
    return array.tolist()


def ints(array: mx.array) -> list[int]:
    """A one-dimensional integer array."""
    values = _values(array)
    return [int(value) for value in values]


def flags(array: mx.array) -> list[bool]:
    """A one-dimensional bool array."""
    values = _values(array)
    return [bool(value) for value in values]


def table(array: mx.array) -> list[list[int]]:
    """A two-dimensional integer array, row by row."""
    values = _values(array)
    return [[int(value) for value in row] for row in values]


def number(array: mx.array) -> float:
    """A scalar."""
    return float(_values(array))
