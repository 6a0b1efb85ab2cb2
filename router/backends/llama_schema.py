"""Which JSON Schemas llama.cpp may be given.

It drops keywords that it does not know, unrolls repetitions (a schema of 40 bytes can keep it busy for minutes, and
with it every other request of the child), and ignores what is no schema. All of that is refused here, by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

MAX_COST = 2000  # nodes and enum values, each as often as repetitions around it ask for
MAX_DEPTH = 32

_VALUES = {"type", "enum", "const", "required", "minItems", "maxItems", "minLength", "maxLength", "pattern", "$ref"}
_INTEGER_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_SCHEMAS = {"items", "additionalProperties"}
_SCHEMA_LISTS = {"anyOf", "oneOf", "allOf", "prefixItems"}
_SCHEMA_MAPS = {"properties", "$defs", "definitions"}
_ANNOTATIONS = {
    *("title", "description", "default", "examples", "format", "$schema", "$id", "$comment"),
    *("deprecated", "readOnly", "writeOnly"),
}
_KNOWN = _VALUES | _INTEGER_BOUNDS | _SCHEMAS | _SCHEMA_LISTS | _SCHEMA_MAPS | _ANNOTATIONS
_REPETITIONS = ("minItems", "maxItems")
_LENGTHS = ("minLength", "maxLength")


class SchemaError(ValueError):
    """The schema cannot be followed; the message says why and quotes at most its keywords."""


def checked_schema(text: str) -> dict[str, Any]:
    """The schema, parsed. Raises SchemaError."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        raise SchemaError("the schema is not JSON") from None
    if not isinstance(schema, dict):
        raise SchemaError("the schema is not an object")
    if _cost(schema, MAX_DEPTH) > MAX_COST:
        raise SchemaError(f"the schema is too large: unrolled it has over {MAX_COST} parts")
    return schema


def _cost(schema: Any, depth: int) -> int:
    """Parts of the unrolled schema, cut off above MAX_COST."""
    if isinstance(schema, bool):
        return 1
    if not isinstance(schema, dict):
        raise SchemaError("a part of the schema is neither an object nor a boolean")
    if not depth:
        raise SchemaError(f"the schema nests over {MAX_DEPTH} deep")
    _check_keywords(schema)
    own = 1 + _size(schema.get("enum", ())) + max(_count(schema, key) for key in _LENGTHS)
    repetitions = max(1, *(_count(schema, key) for key in _REPETITIONS))
    inner = 0
    for part in _parts(schema):
        inner += _cost(part, depth - 1)
        if inner > MAX_COST:
            break
    return min(own + repetitions * max(1, inner), MAX_COST + 1)


def _check_keywords(schema: dict[str, Any]) -> None:
    unknown = sorted(set(schema) - _KNOWN)
    if unknown:
        raise SchemaError(f"llama.cpp does not enforce the keyword {unknown[0][:40]!r}")
    if _INTEGER_BOUNDS & schema.keys() and schema.get("type") != "integer":
        raise SchemaError("llama.cpp enforces bounds on integers only")
    pattern = schema.get("pattern")
    if pattern is not None and not _is_plain(pattern):
        raise SchemaError("llama.cpp enforces only patterns of the form ^...$ without look-around")


def _is_plain(pattern: Any) -> bool:
    if not isinstance(pattern, str) or "(?" in pattern or not (pattern.startswith("^") and pattern.endswith("$")):
        return False
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _parts(schema: dict[str, Any]) -> Iterator[Any]:
    for key in _SCHEMAS & schema.keys():
        yield schema[key]
    for key in _SCHEMA_LISTS & schema.keys():
        yield from schema[key] if isinstance(schema[key], list) else [None]
    for key in _SCHEMA_MAPS & schema.keys():
        yield from schema[key].values() if isinstance(schema[key], dict) else [None]


def _count(schema: dict[str, Any], key: str) -> int:
    value = schema.get(key, 0)
    if not isinstance(value, int) or value < 0:
        raise SchemaError(f"{key} is not a count")
    return min(value, MAX_COST + 1)


def _size(values: Any) -> int:
    return len(values) if isinstance(values, list | tuple) else 0
