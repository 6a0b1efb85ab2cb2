"""`chat` as a process, against a real server in this one."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import grpc
from support.fake_router import FakeRouter, answer, endless, fail


def chat(command: list[str], router: FakeRouter, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command, "chat", "--target", router.address, "--model", "tiny", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_chat_keeps_the_history_until_told_to_forget(router: FakeRouter, command: list[str]) -> None:
    with chat(command, router, "--system", "Be kind.", "--temperature", "0") as child:
        out, err = child.communicate("one\ntwo\n\n/clear\nthree\n/what\n/quit\nfour\n", timeout=20)
    assert (child.returncode, out) == (0, "Hello\n" * 3)
    assert "/quit ends" in err
    histories = [[m.content for m in request.input.messages.messages] for request in router.requests]
    assert histories == [
        ["Be kind.", "one"],
        ["Be kind.", "one", "Hello", "two"],
        ["Be kind.", "three"],
    ]
    assert router.requests[-1].input.sampling.temperature == 0.0


def test_chat_goes_on_after_a_failed_turn(router: FakeRouter, command: list[str]) -> None:
    def script(request: Any, context: Any) -> Iterator[Any]:
        if len(router.requests) == 1:
            fail(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", "too many requests wait")
        yield from answer("Hi")(request, context)

    router.script = script
    with chat(command, router) as child:
        out, err = child.communicate("one\ntwo\n", timeout=20)
    assert (child.returncode, out, err) == (0, "Hi\n", "mtp-router: QUEUE_FULL: too many requests wait\n")
    assert [message.content for message in router.requests[-1].input.messages.messages] == ["two"]


def test_ctrl_c_stops_the_answer_but_not_the_chat(router: FakeRouter, command: list[str]) -> None:
    router.script = endless
    with chat(command, router) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("one\n")
        child.stdin.flush()
        assert child.stdout.read(4) == "more"
        child.send_signal(signal.SIGINT)
        assert router.call_ended.wait(5.0)
        router.script = answer("Hi")
        out, err = child.communicate("two\n/quit\n", timeout=20)
    assert child.returncode == 0
    assert err == "(stopped)\n"
    assert out.endswith("\nHi\n")
    history = [message.content.strip() for message in router.requests[-1].input.messages.messages]
    assert (history[0], history[2]) == ("one", "two")
    assert history[1].startswith("more")


def test_chat_tells_of_input_that_is_not_text(router: FakeRouter, command: list[str]) -> None:
    done = subprocess.run(
        [*command, "chat", "--target", router.address, "--model", "tiny"],
        input=b"\x9c\n",
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"mtp-router: standard input is not UTF-8 text\n"
