"""Which JSON Schemas bind a reply: those whose every keyword the grammar enforces.

llguidance refuses most keywords that it cannot follow, but takes unknown ones for comments. Here nothing passes unless
it is enforced or says nothing about the value. Semantics: draft 2020-12.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

MAX_DEPTH = 64  # schemas within schemas
MAX_MULTIPLE = 100_000  # product of a schema's multipleOf values: the automaton that counts them grows with it

_NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_SCHEMAS = {"items", "additionalProperties"}
_SCHEMA_LISTS = {"anyOf", "oneOf", "allOf", "prefixItems"}
_SCHEMA_MAPS = {"properties", "patternProperties", "$defs", "definitions"}
_VALUES = {
    *("type", "enum", "const", "$ref", "$anchor", "$id", "required", "minItems", "maxItems"),
    *("minProperties", "maxProperties", "minLength", "maxLength", "pattern", "format"),
}
_ANNOTATIONS = {
    *("title", "description", "default", "examples", "$schema", "$comment"),
    *("deprecated", "readOnly", "writeOnly"),
}
_KNOWN = _NUMBERS | _SCHEMAS | _SCHEMA_LISTS | _SCHEMA_MAPS | _VALUES | _ANNOTATIONS


class SchemaError(ValueError):
    """The schema cannot be enforced; the message says why and quotes at most a keyword."""


def enforceable(text: str) -> str:
    """The schema `text`, written again without what JSON does not allow.

    Raises:
        SchemaError: it is no JSON, or holds what would not be enforced.
    """
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
        if not isinstance(schema, dict):
            raise SchemaError("it is not an object")
        multiple = 1
        for part in _parts(schema, MAX_DEPTH):
            _check(part)
            multiple *= abs(Fraction(str(part.get("multipleOf", 1))).numerator)
        if not 0 < multiple <= MAX_MULTIPLE:
            raise SchemaError("multipleOf is no multiple that can be counted, or its values are too large together")
        return json.dumps(schema)
    except SchemaError:
        raise
    except (ValueError, RecursionError):
        raise SchemaError("it is not JSON") from None


def _refuse_constant(name: str) -> None:
    raise SchemaError(f"{name} is not JSON")


def _parts(schema: Any, depth: int) -> Iterator[dict[str, Any]]:
    """The schema and all within it that are not plain true or false."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise SchemaError("a part of it is neither an object nor a boolean")
    if not depth:
        raise SchemaError(f"it nests over {MAX_DEPTH} deep")
    yield schema
    inner = [schema[key] for key in _SCHEMAS & schema.keys()]
    for key in _SCHEMA_LISTS & schema.keys():
        if not isinstance(schema[key], list):
            raise SchemaError(f"{key} is not a list")
        inner += schema[key]
    for key in _SCHEMA_MAPS & schema.keys():
        if not isinstance(schema[key], dict):
            raise SchemaError(f"{key} is not an object")
        inner += schema[key].values()
    for part in inner:
        yield from _parts(part, depth - 1)


def _check(schema: dict[str, Any]) -> None:
    unknown = sorted(set(schema) - _KNOWN)
    if unknown:
        raise SchemaError(f"the keyword {unknown[0][:40]!r} is not enforced")
    for key in sorted(_NUMBERS & schema.keys()):
        bound = schema[key]
        if isinstance(bound, bool) or not isinstance(bound, int | float) or not math.isfinite(bound):
            raise SchemaError(f"{key} is not a number")
    required = schema.get("required", [])
    fewest = schema.get("minProperties", 0)
    if not isinstance(required, list) or isinstance(fewest, bool) or not isinstance(fewest, int):
        raise SchemaError("required is not a list, or minProperties is not a count")
    if fewest > max(1, len(required)):
        # A name may come twice among those that `properties` does not list.
        raise SchemaError("minProperties is not enforced above 1 and the number of required properties")
