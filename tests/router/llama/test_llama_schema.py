"""Schemas that llama.cpp would drop parts of, choke on or ignore are refused before it sees them."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.backends.llama_schema import MAX_COST, SchemaError, checked_schema


def nested(depth: int, **around: Any) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema, **around}
    return schema


GOOD = {
    "incident": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "summary": {"type": "string", "description": "one sentence", "maxLength": 200},
            "severity": {"enum": ["low", "high"]},
            "hosts": {"type": "array", "items": {"$ref": "#/$defs/host"}, "maxItems": 20},
            "count": {"type": "integer", "minimum": 0},
        },
        "required": ["summary"],
        "additionalProperties": False,
        "$defs": {"host": {"type": "string", "minLength": 1, "maxLength": 40}},
    },
    "empty": {},
    "nested": nested(20),
}
BAD = {
    "not JSON": "{",
    "a number": 5,
    "a list": [{}],
    "null": None,
    "unknown keyword": {"type": "array", "uniqueItems": True},
    "unknown keyword inside": {"anyOf": [{"not": {}}]},
    "bounds on a number": {"type": "number", "minimum": 1},
    "a pattern that takes ten seconds to compile": {"type": "string", "pattern": "^(a|b){1,3000}$"},
    "an empty range of lengths, which never ends": {"type": "string", "minLength": 5, "maxLength": 2},
    "an empty range of items, which never ends": {"type": "array", "minItems": 5, "maxItems": 2},
    "an empty range of integers, which aborts": {"type": "integer", "minimum": 9, "maximum": 1},
    "an empty open range of integers": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 4},
    "a bound beyond 64 bits": {"type": "integer", "minimum": -(10**20)},
    "an enum whose text takes seconds to compile": {"enum": ["x" * 20 + str(i) for i in range(300)]},
    "required but unknown": {"type": "object", "properties": {}, "required": ["a"]},
    "required that is no list": {"type": "object", "properties": {"a": {}}, "required": "a"},
    "all of several": {"allOf": [{"type": "string"}, {"type": "integer"}]},
    "enum beside a length": {"enum": ["a", "bbb"], "minLength": 2},
    "type beside anyOf": {"type": "integer", "anyOf": [{"type": "string"}]},
    "prefix items": {"type": "array", "prefixItems": [{"type": "integer"}], "minItems": 3},
    "a format": {"type": "string", "format": "email"},
    "a length without a type": {"minLength": 3},
    "a type that is none": {"type": "nope"},
    "several types": {"type": ["string", "null"]},
    "a reference to nowhere": {"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}},
    "a reference to itself": {"$ref": "#"},
    "a reference elsewhere": {"$ref": "http://127.0.0.1/x"},
    "deep": nested(40),
    "deeper than the parser goes": "[" * 100_000,
    "many items": {"type": "array", "items": {}, "maxItems": 10**6},
    "items of items": nested(10, minItems=50, maxItems=60),
    "long string": {"type": "string", "maxLength": 10**9},
    "large enum": {"enum": list(range(MAX_COST + 1))},
    "negative count": {"type": "array", "minItems": -1},
    "count of text": {"type": "array", "minItems": "1"},
    "alternatives that are no list": {"anyOf": {}},
    "properties that are no map": {"properties": []},
}


@pytest.mark.parametrize("schema", GOOD.values(), ids=GOOD.keys())
def test_an_ordinary_schema_passes_unchanged(schema: dict[str, Any]) -> None:
    assert checked_schema(json.dumps(schema)) == schema


@pytest.mark.parametrize("schema", BAD.values(), ids=BAD.keys())
def test_a_schema_that_would_not_be_followed_is_refused(schema: Any) -> None:
    with pytest.raises(SchemaError):
        checked_schema(schema if isinstance(schema, str) else json.dumps(schema))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["items", "anyOf", "properties", "enum", "maxItems", "pattern"]), inner)
    ),
    max_leaves=20,
)


@given(VALUES)
def test_any_json_passes_or_is_refused(value: Any) -> None:
    with contextlib.suppress(SchemaError):
        assert checked_schema(json.dumps(value)) == value
