"""Which JSON Schemas llama.cpp may be given.

It drops keywords that it does not know, unrolls repetitions (a schema of 40 bytes can keep it busy for minutes, and
with it every other request of the child), and ignores what is no schema. All of that is refused here, by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

MAX_COST = 500  # nodes and 16-byte pieces of enum values, each as often as repetitions around it ask for
MAX_DEPTH = 32

_VALUES = {"type", "enum", "const", "required", "minItems", "maxItems", "minLength", "maxLength", "$ref"}
_INTEGER_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_SCHEMAS = {"items", "additionalProperties"}
_SCHEMA_LISTS = {"anyOf"}
_SCHEMA_MAPS = {"properties", "$defs", "definitions"}
_ANNOTATIONS = {
    *("title", "description", "default", "examples", "$schema", "$id", "$comment"),
    *("deprecated", "readOnly", "writeOnly"),
}
_KNOWN = _VALUES | _INTEGER_BOUNDS | _SCHEMAS | _SCHEMA_LISTS | _SCHEMA_MAPS | _ANNOTATIONS
# What may stand together; llama.cpp follows the first of these that it sees and drops what else is there.
_COMBINATIONS = (
    {"$ref"},
    {"anyOf"},
    {"const", "type"},
    {"enum", "type"},
    {"type", "properties", "required", "additionalProperties"},
    {"type", "items", "minItems", "maxItems"},
    {"type", "minLength", "maxLength"},
    {"type", *_INTEGER_BOUNDS},
)
_ONLY_FOR = {
    **dict.fromkeys(("properties", "required", "additionalProperties"), "object"),
    **dict.fromkeys(("items", "minItems", "maxItems"), "array"),
    **dict.fromkeys(("minLength", "maxLength"), "string"),
    **dict.fromkeys(_INTEGER_BOUNDS, "integer"),
}
_TYPES = {"object", "array", "string", "integer", "number", "boolean", "null"}
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
    known = {f"#/{key}/{name}" for key in ("$defs", "definitions") for name in schema.get(key, {})}
    if any(reference not in known for reference in _references(schema)):
        raise SchemaError("a $ref leads to none of the schema's own definitions")
    return schema


def _references(schema: Any) -> Iterator[Any]:
    if isinstance(schema, dict):
        if "$ref" in schema:
            yield schema["$ref"] if isinstance(schema["$ref"], str) else None
        for part in _parts(schema):
            yield from _references(part)


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
    used = set(schema) - _ANNOTATIONS - {"$defs", "definitions"}
    if not any(used <= combination for combination in _COMBINATIONS):
        raise SchemaError(f"llama.cpp does not enforce these together: {', '.join(sorted(used))}")
    kind = schema.get("type")
    if "type" in used and (not isinstance(kind, str) or kind not in _TYPES):
        raise SchemaError("type is not the name of one JSON type")
    for keyword in sorted(used & _ONLY_FOR.keys()):
        if kind != _ONLY_FOR[keyword]:
            raise SchemaError(f"{keyword} needs the type {_ONLY_FOR[keyword]!r}")
    _check_required(schema)
    for low, high in (("minItems", "maxItems"), ("minLength", "maxLength")):
        if low in schema and high in schema and _count(schema, low) > _count(schema, high):
            raise SchemaError(f"{low} is greater than {high}")
    _check_range(schema)


def _check_required(schema: dict[str, Any]) -> None:
    required = schema.get("required", [])
    properties = schema.get("properties", {})
    if not isinstance(required, list) or not isinstance(properties, dict):
        raise SchemaError("required is not a list, or properties is not an object")
    if any(not isinstance(name, str) or name not in properties for name in required):
        raise SchemaError("llama.cpp requires only what stands in properties")


def _check_range(schema: dict[str, Any]) -> None:
    """An empty range of integers makes llama.cpp abort."""
    bounds = {key: schema[key] for key in _INTEGER_BOUNDS & schema.keys()}
    if any(isinstance(bound, bool) or not isinstance(bound, int) or abs(bound) > 2**53 for bound in bounds.values()):
        raise SchemaError("a bound is not an integer")
    lows = [bounds[key] + step for key, step in (("minimum", 0), ("exclusiveMinimum", 1)) if key in bounds]
    highs = [bounds[key] - step for key, step in (("maximum", 0), ("exclusiveMaximum", 1)) if key in bounds]
    if lows and highs and max(lows) > min(highs):
        raise SchemaError("no integer is in the range")


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
    """An enum's share of the cost: a part for each 16 bytes of its text."""
    return sum(1 + len(json.dumps(value)) // 16 for value in values) if isinstance(values, list | tuple) else 0
