"""Says why settings could not be read, in the words of the settings file."""

from __future__ import annotations

from difflib import get_close_matches

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from router.settings.backends import KINDS
from router.settings.load import Settings
from router.settings.table import Table


def describe_problem(error: OSError | ValueError) -> str:
    """Why `load_settings` failed, without the values that stand in the settings: some are secrets."""
    if isinstance(error, ValidationError):
        problems: dict[str, list[str]] = {}
        for item in error.errors():
            problems.setdefault(_place(item["loc"]), []).append(_in_words(item))
        return "invalid settings: " + "; ".join(f"{place}: {', or '.join(why)}" for place, why in problems.items())
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"cannot read the settings: {where}{error.strerror or error}"
    return f"invalid settings: {error}"


def _place(loc: tuple[int | str, ...]) -> str:
    """Where it stands in the file: tables and keys, without pydantic's names for the members of a union."""
    table, rest = loc[:2], list(loc[2:])
    if table[:1] == ("backends",) and rest and rest[0] in KINDS:
        del rest[0]
    keys = (part for part in rest if isinstance(part, int) or part.isidentifier())
    return ".".join(map(str, (*table, *keys))) or "settings"


def _in_words(item: ErrorDetails) -> str:
    """What is wrong with one setting, in the words of the file where pydantic's are those of Python."""
    if item["loc"][-1:] == ("[key]",):
        return "this name cannot be used: letters and digits, then also . _ : / and -, at most 128 of them"
    match item["type"]:
        case "extra_forbidden":
            name, known = str(item["loc"][-1]), _setting_names()
            if name in known:
                return "there is no such setting in this table"
            near = get_close_matches(name, known, n=1)
            return "there is no such setting" + (f"; is {near[0]!r} meant?" if near else "")
        case "union_tag_not_found" | "union_tag_invalid":
            return f"kind must be one of {', '.join(KINDS)}"
        case "tuple_type":
            return "must be a list"
        case "dict_type" | "model_type" | "model_attributes_type":
            return "must be a table"
        case "path_type":
            return "must be a path"
        case _:
            return item["msg"].removeprefix("Value error, ")


def _setting_names() -> list[str]:
    """The names of all settings, in whatever table."""
    tables: list[type[BaseModel]] = [Settings, Table]
    names: set[str] = set()
    while tables:
        table = tables.pop()
        names |= table.model_fields.keys()
        tables += table.__subclasses__()
    return sorted(names)
