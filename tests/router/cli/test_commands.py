"""What all commands have in common: usage, the console script, and no server."""

from __future__ import annotations

import subprocess
import sys

import pytest

from router.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("arguments", [["models"], ["generate", "--model", "m", "--prompt", "x"]])
def test_without_a_server_it_says_how_to_start_one(arguments: list[str], capsys: Capture) -> None:
    assert main([*arguments, "--target", "127.0.0.1:1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mtp-router: no server answers at 127.0.0.1:1: none runs, or it is shutting down;")
    assert error.count("\n") == 1


def test_usage_errors_and_help_need_no_server() -> None:
    for arguments, status in ((["--help"], 0), (["generate"], 2), (["fly"], 2), ([], 2)):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == status


def test_the_console_script_is_this_function() -> None:
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="mtp-router")
    assert script.load() is main
    assert sys.modules["router.cli"].main is main


@pytest.mark.parametrize("module", ["argparse", "grpc", "router.client", "router.cli.generate", "rich.console"])
def test_ctrl_c_while_a_command_is_still_imported_is_quiet(command: list[str], module: str) -> None:
    interrupted = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}: raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
    )
    done = subprocess.run(
        [command[0], "-c", interrupted + command[2], "generate", "--model", "m", "--prompt", "x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "--model", "m", "--prompt", "x", "--seed", "-1"], "--seed: '-1' is not a whole number from 0 to"),
        (["generate", "--model", "m", "--prompt", "x", "--top-k", "4294967296"], "from 0 to 4294967295"),
        (["generate", "--model", "m", "--prompt", "x", "--max-tokens", "few"], "--max-tokens: 'few' is not a whole"),
        (["generate", "--model", "m", "--prompt", "\udc9c"], "--prompt: it is not UTF-8 text"),
        (["explain", "\udc9c"], "name: it is not UTF-8 text"),
        (["top", "--interval", "abc"], "--interval: 'abc' is not a number of seconds above 0"),
        (["top", "--interval", "nan"], "--interval: 'nan' is not a number of seconds above 0"),
        (["verify", "x", "--tokens", "abc"], "--tokens: 'abc' is not a whole number from 8 to 4096"),
    ],
)
def test_a_wrong_argument_is_named_with_what_it_may_be(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err
