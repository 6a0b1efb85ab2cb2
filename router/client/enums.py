"""Enum values of the contract by their short lower-case names: ROLE_USER is "user"."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import EnumDescriptor


def short_names(descriptor: EnumDescriptor) -> dict[str, int]:
    """Short names of an enum and their numbers, without the unspecified zero."""
    prefix = descriptor.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return {value.name.removeprefix(prefix).lower(): value.number for value in descriptor.values if value.number}


def enum_number(enum: Any, value: int | str) -> Any:
    """The number of an enum value given by short name or by number.

    Args:
        enum: generated enum, such as `v1.Role`.
        value: short name in lower case, or a value of the enum.

    Raises:
        ValueError: the enum has no such name; the message lists those that it has.
    """
    if not isinstance(value, str):
        return value
    names = short_names(enum.DESCRIPTOR)
    if value not in names:
        raise ValueError(f"{enum.DESCRIPTOR.name} has no value {value!r}; there are: {', '.join(names)}")
    return names[value]


def enum_name(enum: Any, number: int) -> str:
    """The short name of an enum value: "unspecified" for zero, the number where the enum has grown since."""
    if number == 0:
        return "unspecified"
    by_number = {known: name for name, known in short_names(enum.DESCRIPTOR).items()}
    return by_number.get(number, str(number))
