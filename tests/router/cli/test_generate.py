"""`generate` against a real server in this process."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from mtp_router.generate import v1
from support.fake_router import FakeRouter, delta, endless, fail, finished, running, started
from support.terminal import on_a_terminal

from router.cli import main

Capture = pytest.CaptureFixture[str]


def generate(router: FakeRouter, *arguments: str) -> int:
    return main(["generate", "--target", router.address, "--model", "tiny", *arguments])


def sent(router: FakeRouter) -> v1.GenerationInput:
    return router.requests[-1].input


def test_generate_prints_the_text_alone_where_nobody_watches(router: FakeRouter, capsys: Capture) -> None:
    assert generate(router, "--prompt", "Hi", "--system", "Be brief.") == 0
    assert capsys.readouterr() == ("Hello\n", "")
    messages = [(message.role, message.content) for message in sent(router).messages.messages]
    assert messages == [(v1.ROLE_SYSTEM, "Be brief."), (v1.ROLE_USER, "Hi")]
    assert not router.requests[-1].include_progress


def test_generate_json_prints_every_event(router: FakeRouter, capsys: Capture) -> None:
    assert generate(router, "--prompt", "Hi", "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    events = [json_format.Parse(line, v1.StreamGenerateResponse()) for line in lines]
    assert events == [started(), delta("Hel"), delta("lo"), finished()]
    assert json.loads(lines[0])["started"]["route"]["backend_kind"] == "BACKEND_KIND_LLAMA_CPP"


def test_every_flag_reaches_the_request(router: FakeRouter, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    flags = (
        "--temperature 0 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.1 --presence-penalty 0.2 "
        "--frequency-penalty 0.3 --top-k 5 --seed 0 --max-tokens 9 --min-tokens 2 --stop a --stop b --time-budget 1.5 "
        "--no-thinking --thinking-budget 0 --speculation off --draft-depth 2 --logprobs 3 --priority batch "
        f"--correlation-id c-1 --label incident=7=8 --raw --progress --schema {schema}"
    ).split()
    assert generate(router, "--prompt", "Hi", "--json", *flags) == 0
    assert router.requests[-1].include_progress
    sampling = v1.SamplingParameters(
        temperature=0.0,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        seed=0,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
    )
    expected = v1.GenerationInput(
        model="tiny",
        text="Hi",
        sampling=sampling,
        stop=v1.StopConditions(max_output_tokens=9, min_output_tokens=2, sequences=["a", "b"]),
        response_format=v1.ResponseFormat(json_schema='{"type": "object"}'),
        reasoning=v1.Reasoning(mode=v1.REASONING_MODE_OFF, budget_tokens=0),
        logprobs=v1.LogprobsOptions(top_count=3),
        speculation=v1.Speculation(mode=v1.SPECULATION_MODE_OFF, depth=2),
        priority=v1.PRIORITY_BATCH,
        correlation_id="c-1",
        labels={"incident": "7=8"},
    )
    expected.time_budget.FromMilliseconds(1500)
    assert sent(router) == expected


def test_no_flag_sets_no_field(router: FakeRouter) -> None:
    assert generate(router, "--prompt", "Hi", "--raw") == 0
    assert sent(router) == v1.GenerationInput(model="tiny", text="Hi")


@pytest.mark.parametrize("source", [["--prompt", "-"], ["--file", "-"]])
def test_the_prompt_may_come_from_standard_input(router: FakeRouter, command: list[str], source: list[str]) -> None:
    arguments = [*command, "generate", "--target", router.address, "--model", "tiny", *source]
    done = subprocess.run(arguments, input="Grüße", capture_output=True, text=True, check=True, timeout=20)
    assert done.stdout == "Hello\n"
    assert sent(router).messages.messages[0].content == "Grüße"


def test_the_prompt_may_come_from_a_file(router: FakeRouter, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "prompt.txt").write_text("Hi")
    assert generate(router, "--file", str(tmp_path / "prompt.txt")) == 0
    assert sent(router).messages.messages[0].content == "Hi"
    assert generate(router, "--file", str(tmp_path / "none.txt")) == 2
    assert "cannot read" in capsys.readouterr().err


def test_log_probabilities_are_listed_after_the_answer(router: FakeRouter, capsys: Capture) -> None:
    other = v1.TokenLogprob(token_id=2, token_bytes=b"Ho", logprob=-2.0)
    entry = v1.TokenLogprob(token_id=1, token_bytes=b"Hi\xff", logprob=-0.5, top_logprobs=[other])
    router.script = lambda request, context: iter([started(), delta("Hi", logprobs=[entry]), finished()])
    assert generate(router, "--prompt", "Hi", "--logprobs", "1") == 0
    out = capsys.readouterr().out
    assert "-0.5000" in out
    assert "0.607" in out
    assert "'Ho' 0.135" in out


def test_a_terminal_gets_text_statistics_and_no_escape_sequences_of_the_model(
    router: FakeRouter, command: list[str]
) -> None:
    def script(request: Any, context: Any) -> Iterator[Any]:
        yield v1.StreamGenerateResponse(progress=v1.GenerationProgress(queue=v1.QueueProgress(ahead=2)))
        time.sleep(0.3)
        yield started()
        yield delta("", reasoning_text="Well. ")
        yield delta("Hel\x1b]0;owned\x07lo")
        yield finished()

    router.script = script
    arguments = ["generate", "--target", router.address, "--model", "tiny", "--prompt", "Hi"]
    status, seen = on_a_terminal([*command, *arguments])
    assert status == 0
    assert router.requests[-1].include_progress
    assert "waiting behind 2 other requests" in seen
    assert "Well." in seen
    assert "Hel]0;ownedlo" in seen
    assert "\x07" not in seen
    for part in ("tiny on local (no MTP head)", "TTFT 0.50 s", "5.0 tokens/s", "7 + 11 tokens", "75% of drafts"):
        assert part in seen


def test_a_failed_call_is_one_line_and_status_1(router: FakeRouter, capsys: Capture) -> None:
    router.script = lambda request, context: (
        fail(context, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", "no model named 'tiny'; known models: a, b")
        or iter(())
    )
    assert generate(router, "--prompt", "Hi") == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "mtp-router: MODEL_NOT_FOUND: no model named 'tiny'; known models: a, b\n")
    assert generate(router, "--prompt", "Hi", "--json") == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["reason"] == "MODEL_NOT_FOUND"
    assert err.count("\n") == 1


def test_an_answer_that_breaks_off_keeps_its_text(router: FakeRouter, capsys: Capture) -> None:
    def script(request: Any, context: Any) -> Iterator[Any]:
        yield started()
        yield delta("Hel")
        fail(context, grpc.StatusCode.UNAVAILABLE, "BACKEND_FAILED", "the backend broke off")

    router.script = script
    assert generate(router, "--prompt", "Hi") == 1
    assert capsys.readouterr() == ("Hel\n", "mtp-router: BACKEND_FAILED: the backend broke off\n")


def test_a_server_that_vanishes_is_told_from_one_that_never_was(command: list[str]) -> None:
    with running() as router:
        router.script = endless
        arguments = [*command, "generate", "--target", router.address, "--model", "tiny", "--prompt", "Hi"]
        child = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.read(4) == "more"
    out, err = child.communicate(timeout=10)
    assert child.returncode == 1
    assert out.endswith("\n")
    assert err == f"mtp-router: the server at {router.address} is gone; the text so far is a prefix, not the answer\n"


def test_an_answer_that_was_cut_off_says_so(router: FakeRouter, capsys: Capture) -> None:
    end = v1.StreamGenerateResponse(finished=v1.GenerationFinished(reason=v1.FINISH_REASON_TIME_LIMIT))
    router.script = lambda request, context: iter([started(), delta("Hel"), end])
    assert generate(router, "--prompt", "Hi") == 0
    assert capsys.readouterr() == ("Hel\n", "mtp-router: the answer was cut off: time limit\n")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--prompt", "x", "--label", "nothing"], "KEY=VALUE"),
        (["--prompt", "x", "--raw", "--system", "y"], "--raw"),
        (["--prompt", "x", "--schema", "/does/not/exist"], "cannot read /does/not/exist"),
        (["--prompt", "x", "--time-budget", "1e300"], "time_budget"),
    ],
)
def test_wrong_usage_is_status_2(router: FakeRouter, capsys: Capture, arguments: list[str], complaint: str) -> None:
    assert generate(router, *arguments) == 2
    err = capsys.readouterr().err
    assert complaint in err
    assert err.count("\n") == 1
    assert router.requests == []


@pytest.mark.parametrize("deadline", ["0", "-1", "nan", "inf", "soon"])
def test_a_deadline_is_a_number_of_seconds(router: FakeRouter, deadline: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        generate(router, "--prompt", "x", "--deadline", deadline)


def test_the_deadline_ends_the_call(router: FakeRouter, capsys: Capture) -> None:
    router.script = endless
    assert generate(router, "--prompt", "x", "--deadline", "0.3") == 1
    assert "DEADLINE_EXCEEDED" in capsys.readouterr().err


def test_interrupting_generate_cancels_the_call(router: FakeRouter, command: list[str]) -> None:
    router.script = endless
    arguments = [*command, "generate", "--target", router.address, "--model", "tiny", "--prompt", "Hi"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.read(4) == b"more"
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=10)
    assert child.returncode == 130
    assert b"Traceback" not in err
    assert router.call_ended.wait(2.0)


def test_a_reader_that_has_enough_is_no_fault(router: FakeRouter, command: list[str]) -> None:
    router.script = endless
    arguments = [*command, "generate", "--target", router.address, "--model", "tiny", "--prompt", "Hi"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.read(4)
        child.stdout.close()
        assert child.wait(10) == 1
        assert child.stderr.read() == b""


def test_a_request_that_is_too_large_is_told(router: FakeRouter, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "long.txt").write_text("word " * 1_000_000)
    assert generate(router, "--file", str(tmp_path / "long.txt")) == 1
    assert f"larger than the server at {router.address} takes" in capsys.readouterr().err
