"""Response formats: what is refused and how, that every accepted keyword is enforced, and how a grammar moves."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from mlx_mtp_backend.api import FormatKind, ResponseFormat
from mlx_mtp_backend.errors import EngineError, ErrorReason
from mlx_mtp_backend.language import grammar, json_schema
from mlx_mtp_backend.language.text import ModelText, load_text

END = 2


@pytest.fixture(scope="module")
def text(history: Path) -> ModelText:
    loaded = load_text(history)
    assert loaded is not None
    return loaded


def schema(rule: object) -> ResponseFormat:
    return ResponseFormat(FormatKind.JSON_SCHEMA, rule if isinstance(rule, str) else json.dumps(rule))


def follows(text: ModelText, wanted: ResponseFormat, reply: str) -> bool:
    """Whether the format allows exactly this reply."""
    follower = text.compile(wanted)
    for token in [*text.encode(reply), END]:
        mask = follower.mask(())
        assert mask is not None
        if not mask[token // 32] >> token % 32 & 1:
            return False
        follower.commit([token])
    return True


# For each keyword that is let through: a schema with it, values it accepts, values it does not.
ENFORCED = {
    "type": ({"type": "integer"}, ["3"], ['"3"', "3.5"]),
    "enum": ({"enum": ["x", 3]}, ['"x"', "3"], ['"y"']),
    "const": ({"const": {"a": 1}}, ['{"a":1}'], ['{"a":2}']),
    "anyOf": ({"anyOf": [{"type": "null"}, {"type": "boolean"}]}, ["null", "true"], ["3"]),
    "oneOf": ({"oneOf": [{"type": "null"}, {"type": "boolean"}]}, ["null", "true"], ["3"]),
    "allOf": ({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}, ["4"], ["2", "6"]),
    "$ref": ({"$defs": {"n": {"type": "null"}}, "$ref": "#/$defs/n"}, ["null"], ["3"]),
    "$defs": ({"$defs": {"n": {"type": "null"}}, "items": {"$ref": "#/$defs/n"}, "type": "array"}, ["[null]"], ["[3]"]),
    "definitions": ({"definitions": {"n": {"type": "null"}}, "$ref": "#/definitions/n"}, ["null"], ["3"]),
    "$anchor": ({"$defs": {"n": {"$anchor": "here", "type": "null"}}, "$ref": "#here"}, ["null"], ["3"]),
    "items": ({"type": "array", "items": {"type": "null"}}, ["[]", "[null,null]"], ["[3]"]),
    "prefixItems": ({"type": "array", "prefixItems": [{"type": "null"}]}, ["[null,3]"], ["[3]"]),
    "minItems": ({"type": "array", "minItems": 2}, ["[1,2]"], ["[1]"]),
    "maxItems": ({"type": "array", "maxItems": 1}, ["[1]"], ["[1,2]"]),
    "properties": ({"type": "object", "properties": {"a": {"type": "null"}}}, ['{"a":null}', "{}"], ['{"a":3}']),
    "required": (
        {"type": "object", "properties": {"a": True}, "required": ["a", "b"]},
        ['{"a":1,"b":2}'],
        ["{}", '{"a":1}'],
    ),
    "additionalProperties": ({"type": "object", "additionalProperties": {"type": "null"}}, ['{"z":null}'], ['{"z":1}']),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^a": {"type": "null"}}, "additionalProperties": False},
        ['{"ab":null}'],
        ['{"ab":1}', '{"b":null}'],
    ),
    "minProperties": ({"type": "object", "minProperties": 1}, ['{"a":1}'], ["{}"]),
    "maxProperties": ({"type": "object", "maxProperties": 1}, ['{"a":1}'], ['{"a":1,"b":1}']),
    "minLength": ({"type": "string", "minLength": 2}, ['"ab"'], ['"a"']),
    "maxLength": ({"type": "string", "maxLength": 2}, ['"ab"'], ['"abc"']),
    "pattern": ({"type": "string", "pattern": "^a+$"}, ['"aa"'], ['"ab"']),
    "format": ({"type": "string", "format": "date"}, ['"2026-01-02"'], ['"soon"']),
    "minimum": ({"type": "integer", "minimum": 3}, ["3"], ["2"]),
    "maximum": ({"type": "number", "maximum": 3}, ["3", "2.5"], ["3.5"]),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 3}, ["4"], ["3"]),
    "exclusiveMaximum": ({"type": "integer", "exclusiveMaximum": 3}, ["2"], ["3"]),
    "multipleOf": ({"type": "integer", "multipleOf": 7}, ["21"], ["22"]),
}
NAMES_ONLY = {"$id"}  # says where a schema lives, nothing about the value


def test_every_keyword_is_tried_or_says_nothing_about_the_value():
    assert set(ENFORCED) | NAMES_ONLY == json_schema._KNOWN - json_schema._ANNOTATIONS


@pytest.mark.parametrize("keyword", ENFORCED)
def test_a_keyword_is_enforced(text, keyword):
    rule, good, bad = ENFORCED[keyword]
    assert keyword in json.dumps(rule)
    assert [value for value in good if not follows(text, schema(rule), value)] == []
    assert [value for value in bad if follows(text, schema(rule), value)] == []


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("{", "not JSON"),
        ("[]", "not an object"),
        ({"items": 3}, "neither an object nor a boolean"),
        ('{"maximum": NaN}', "NaN"),
        ("[" * 5000 + "]" * 5000, "not JSON"),
        ({"not": {"type": "string"}}, "'not'"),
        ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
        ({"type": "object", "properties": {"a": {"typo": 3}}}, "'typo'"),
        ({"x-guidance": {"lenient": True}, "type": "object"}, "'x-guidance'"),
        ({"type": "string", "format": "colour"}, "format"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "oneOf"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "nothing can satisfy"),
        ({"properties": {"a": {"type": "strng"}}}, "a type is none of JSON Schema's"),
        ({"type": 5}, "a type is none of JSON Schema's"),
        ({"$ref": "#/absent"}, "points at nothing"),
        ({"type": "string", "pattern": "("}, "a pattern is no regular expression"),
        ({"type": "string", "minLength": -1}, "a keyword has a value of a kind"),
        ({"type": "integer", "minimum": 3, "exclusiveMinimum": True}, "exclusiveMinimum"),
        ({"$ref": "#"}, "nothing can satisfy"),
        ({"$ref": "https://example.org/schema"}, "outside"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"allOf": [{"type": "integer", "multipleOf": n} for n in (7, 11, 13, 17, 19, 23)]}, "multipleOf"),
        ({"type": "integer", "multipleOf": 0}, "multipleOf"),
        (False, "not an object"),
    ],
)
def test_a_schema_that_would_not_be_enforced_is_refused(text, rule, says):
    with pytest.raises(EngineError) as caught:
        text.compile(schema(rule))
    assert (caught.value.reason, caught.value.field) == (ErrorReason.INVALID_PARAMS, "response_format")
    assert says in caught.value.detail


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        (FormatKind.REGEX, "("),
        (FormatKind.REGEX, "(?=a)b"),
        (FormatKind.LARK, "start: A\nA: /.*a.{200}/ & /.*b.{300}/ & ~/.*c.{100}d.*/"),
        (FormatKind.LARK, "start: missing"),
        (FormatKind.LARK, 'start: %json {"type": "object"}'),
        (FormatKind.LARK, "start: a\na[temperature=0.5]: /b/"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_refused(text, kind, rule):
    with pytest.raises(EngineError) as caught:
        text.compile(ResponseFormat(kind, rule))
    assert (caught.value.reason, caught.value.field) == (ErrorReason.INVALID_PARAMS, "response_format")


def test_expressions_and_grammars_match_the_whole_reply(text):
    assert follows(text, ResponseFormat(FormatKind.REGEX, "a|bc"), "bc")
    assert not follows(text, ResponseFormat(FormatKind.REGEX, "a|bc"), "b")
    assert not follows(text, ResponseFormat(FormatKind.REGEX, "a|bc"), "bcd")
    sums = ResponseFormat(FormatKind.LARK, 'start: n ("+" n)*\nn: /[0-9]{1,3}/')
    assert follows(text, sums, "1+22+333")
    assert not follows(text, sums, "1+")
    limited = ResponseFormat(FormatKind.LARK, 'start: a "!"\na[max_tokens=2]: /[xy]*/')
    assert follows(text, limited, "xy!")
    assert not follows(text, limited, "xyx!")


def test_blanks_between_json_tokens_are_bounded(text):
    wanted = schema({"type": "array", "items": {"type": "integer"}})
    assert follows(text, wanted, "[1, 2]")
    assert follows(text, wanted, "[\n  1,\n  2\n]")
    assert not follows(text, wanted, "[" + " " * 30 + "1]")
    assert not follows(text, wanted, "[" + "\n" * 4 + "1]")


def test_a_model_without_an_end_cannot_follow_a_format(text):
    endless = ModelText(text._tokenizer, None, {}, frozenset())
    with pytest.raises(EngineError) as caught:
        endless.compile(schema({}))
    assert caught.value.field == "response_format"


def test_a_tokenizer_that_cannot_be_read_is_told():
    words = ModelText(Tokenizer(models.WordLevel({"a": 0, "end": 1}, unk_token="a")), None, {}, frozenset({1}))
    for call, field in (
        (lambda: words.compile(schema({})), "response_format"),
        (lambda: words.token_bytes(0), "logprobs"),
    ):
        with pytest.raises(EngineError) as caught:
            call()
        assert (caught.value.reason, caught.value.field) == (ErrorReason.INVALID_PARAMS, field)


def test_compiled_formats_are_kept_and_not_shared_between_replies(text, monkeypatch):
    calls = []
    real = grammar._compiled
    monkeypatch.setattr(grammar, "_compiled", lambda *args: calls.append(args) or real(*args))
    wanted = ResponseFormat(FormatKind.REGEX, "kept once")
    one, two = text.compile(wanted), text.compile(wanted)
    assert len(calls) == 1
    one.commit(text.encode("k"))
    assert (one.mask(()) != two.mask(())).any()
    for i in range(grammar.MAX_KEPT):
        text.compile(ResponseFormat(FormatKind.REGEX, f"other {i}"))
    text.compile(wanted)
    assert len(calls) == 2 + grammar.MAX_KEPT


def test_too_much_work_in_mid_reply_is_told(text, monkeypatch):
    """An expression whose automaton doubles with every letter, and a small limit on its states."""
    monkeypatch.setattr(grammar, "_LIMITS", grammar.LLParserLimits(max_lexer_states=40, verbose_errors=False))
    follower = text.compile(ResponseFormat(FormatKind.REGEX, "(a|b)*a(a|b){15}c"))
    with pytest.raises(EngineError) as caught:
        for _ in range(30):
            follower.mask(())
            follower.commit(text.encode("a"))
    assert caught.value.reason is ErrorReason.GRAMMAR_LIMIT


# An ambiguous rule, of which every digit makes the next row longer.
CROWDED = ResponseFormat(
    FormatKind.LARK, 'start: n ("+" n)*\nn: "(" start ")" | /[0-9]{1,3}/ | /[0-9]{2,5}/ | start start'
)


def test_a_limit_met_at_a_token_that_may_follow_sets_no_reply_free(text, monkeypatch):
    monkeypatch.setattr(grammar, "_LIMITS", grammar.LLParserLimits(max_items_in_row=20, verbose_errors=False))
    digit, letter = text.encode("1")[0], text.encode("x")[0]
    follower = text.compile(CROWDED)
    for _ in range(100):
        allowed = follower.mask(())
        assert allowed is not None
        assert allowed[digit // 32] >> digit % 32 & 1
        assert follower.mask((letter,)) is None  # a draft that the rule forbids
        try:
            assert follower.mask((digit,)) is not None
        except EngineError:
            break
        follower.commit([digit])
    follower.mask(())  # a draft alone ends nothing
    for more in ([digit], [digit, digit], [letter]):
        follower.commit(more)
        with pytest.raises(EngineError) as caught:
            follower.mask(())
        assert caught.value.reason is ErrorReason.GRAMMAR_LIMIT


def test_a_repetition_that_takes_seconds_to_compile_is_cut_short(text):
    letter = text.encode("a")

    def reply(rule):
        follower = text.compile(ResponseFormat(FormatKind.REGEX, rule))
        for _ in range(3):
            follower.mask(())
            follower.commit(letter)

    reply("(a{200}){200}")
    with pytest.raises(EngineError) as caught:
        reply("(a{500}){500}")
    assert caught.value.reason is ErrorReason.GRAMMAR_LIMIT


def test_ids_that_pad_the_vocabulary_stand_for_nothing(text):
    size = text._tokenizer.get_vocab_size()
    assert [text.token_bytes(token) for token in (size, size + 63)] == [b"", b""]


def test_bytes_of_tokens(text):
    assert text.token_bytes(text.encode("a")[0]) == b"a"
    assert b"".join(text.token_bytes(token) for token in text.encode("né ")) == "né ".encode()
