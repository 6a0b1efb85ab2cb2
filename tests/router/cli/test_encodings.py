"""What pipes, files and terminals carry: UTF-8, or a word on what does not."""

from __future__ import annotations

import os
import subprocess

import pytest
from support.fake_router import FakeRouter, answer
from support.terminal import on_a_terminal


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8:surrogateescape"])
@pytest.mark.parametrize("option", ["--prompt", "--file", "--schema"])
def test_standard_input_that_is_not_text_is_told(
    router: FakeRouter, command: list[str], encoding: str, option: str
) -> None:
    prompt = ["--prompt", "x"] if option == "--schema" else []
    done = subprocess.run(
        [*command, "generate", "--target", router.address, "--model", "tiny", *prompt, option, "-"],
        input=b"\x00\x9c\xff",
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"mtp-router: standard input is not UTF-8 text\n"
    assert not router.requests


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_pipe_carries_utf8_whatever_the_locale(router: FakeRouter, command: list[str], form: list[str]) -> None:
    router.script = answer("caf\u00e9 \U0001f600")
    done = subprocess.run(
        [*command, "generate", "--target", router.address, "--model", "tiny", "--prompt", "x", *form],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert "caf\u00e9 \U0001f600" in done.stdout.decode()


def test_a_terminal_that_cannot_show_a_character_shows_its_code(
    router: FakeRouter, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    router.script = answer("caf\u00e9")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    status, seen = on_a_terminal([*command, "generate", "--target", router.address, "--model", "tiny", "--prompt", "x"])
    assert status == 0
    assert "caf\\xe9" in seen
