"""Text: templates render as transformers renders them, stops are never shown, characters are never cut."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mlx_mtp_backend.errors import EngineError, ErrorReason
from mlx_mtp_backend.language.text import StopScanner, load_text

MESSAGES = [
    {"role": "system", "content": "Fold alerts."},
    {"role": "user", "content": "db-1 is down\n\n<b>&"},
    {"role": "assistant", "content": "Noted."},
    {"role": "user", "content": "And now?"},
]


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
@pytest.mark.parametrize("add", [True, False])
def test_a_template_renders_as_transformers_does(pass_through, variables, add):
    text = load_text(pass_through)
    peer = AutoTokenizer.from_pretrained(pass_through)
    expected = peer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=add, **variables)
    assert text.render(MESSAGES, add_generation_prompt=add, **variables) == expected
    assert text.encode(expected) == peer.encode(expected, add_special_tokens=False)


def test_boundaries_are_where_other_prompts_part(pass_through):
    """Behind the system message for another chat, behind the last message for the next turn: never too far."""
    text = load_text(pass_through)

    def prompt(messages):
        rendered = text.render(messages)
        tokens = text.encode(rendered)
        return tokens, text.boundaries(messages, rendered, tokens)

    tokens, (system, last) = prompt(MESSAGES)
    other_chat, _ = prompt([MESSAGES[0], {"role": "user", "content": "Something else"}])
    next_turn, _ = prompt([*MESSAGES, {"role": "assistant", "content": "Fine."}, {"role": "user", "content": "Sure?"}])
    assert tokens[:system] == other_chat[:system]
    assert tokens[:last] == next_turn[:last]
    assert 5 < system < last < len(tokens)
    assert len(text.decode(tokens[last:])) < 20
    assert len(prompt(MESSAGES[1:])[1]) == 1  # without a system message there is one boundary


def test_a_template_may_refuse_and_may_not_escape(pass_through, tmp_path):
    folder = shutil.copytree(pass_through, tmp_path / "copy")
    for template in (
        "{{ raise_exception('no') }}",
        "{{ messages[0].nothing.more }}",
        "{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__ }}",
    ):
        (folder / "chat_template.jinja").write_text(template)
        with pytest.raises(EngineError) as caught:
            load_text(folder).render(MESSAGES)
        assert caught.value.reason is ErrorReason.INVALID_PARAMS


def test_end_tokens_come_from_the_generation_config(pass_through, tmp_path):
    folder = shutil.copytree(pass_through, tmp_path / "copy")
    listed = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert load_text(folder).end_tokens == frozenset(listed)
    (folder / "generation_config.json").unlink()
    assert load_text(folder).end_tokens == frozenset(load_text(folder).encode("<|im_end|>"))


def test_a_broken_tokenizer_is_typed(pass_through, tmp_path):
    folder = shutil.copytree(pass_through, tmp_path / "copy")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(EngineError) as caught:
        load_text(folder)
    assert caught.value.reason is ErrorReason.CHECKPOINT_UNREADABLE
    (folder / "tokenizer.json").unlink()
    assert load_text(folder) is None


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "generation_config.json"])
def test_a_file_that_is_a_link_out_is_not_read(pass_through, tmp_path, name):
    folder = tmp_path / "m"
    shutil.copytree(pass_through, folder)
    (folder / name).unlink(missing_ok=True)
    (tmp_path / "secret").write_text("{{ 'a secret' }}")
    (folder / name).symlink_to("../secret")
    with pytest.raises(EngineError, match="leads out of its model's folder") as caught:
        load_text(folder)
    assert caught.value.reason is ErrorReason.CHECKPOINT_UNREADABLE


def test_reasoning_marks_are_text_and_special_tokens_are_not(pass_through):
    text = load_text(pass_through)
    tokens = text.encode("<think>so</think>done<|im_end|>")
    assert text.decode(tokens) == "<think>so</think>done"


@settings(deadline=None)  # each example reads the tokenizer
@given(st.text(max_size=60))
def test_growing_text_is_the_text_and_never_cuts_a_character(pass_through, value):
    text = load_text(pass_through)
    growing = text.growing()
    pieces = [growing.add(token) for token in text.encode(value)]
    assert "".join(pieces) == text.decode(text.encode(value))
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in value


ALPHABET = "ab."


@given(
    st.lists(st.text(ALPHABET, min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text(ALPHABET, max_size=3), max_size=20),
)
def test_a_stop_is_found_first_and_never_shown(stops, pieces):
    scanner = StopScanner(stops)
    shown = ""
    whole = ""
    for piece in pieces:
        whole += piece
        shown += scanner.add(piece)
        assert whole.startswith(shown)
        if scanner.found:
            break
    first = min((whole.find(stop) for stop in stops if stop in whole), default=None)
    if first is None:
        assert scanner.found is None
        assert shown + scanner.rest() == whole
    else:
        assert scanner.found in stops
        assert shown == whole[:first]
        assert whole[first:].startswith(scanner.found)
