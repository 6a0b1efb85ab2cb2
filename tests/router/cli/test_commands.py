"""The command line against a real server in this process."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from mtp_router.generate import v1
from prometheus_client import start_http_server
from support.fake_router import FakeRouter, answer, delta, endless, fail, finished, running, started

from router.cli import main
from router.domain import DraftSource, Finished, FinishReason, SpeculationStatistics, Usage
from router.metrics import Metrics
from router.settings import ServerSettings, Settings, effective_settings, load_settings

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


def on_a_terminal(arguments: list[str]) -> tuple[int, str]:
    """Runs a command on a pseudo-terminal; its exit status and what the terminal got."""
    near, far = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    with subprocess.Popen(arguments, stdin=far, stdout=far, stderr=far, env=environment) as child:
        os.close(far)
        seen = b""
        while True:
            try:
                chunk = os.read(near, 4096)
            except OSError:
                break  # Linux reports the end of a terminal this way
            if not chunk:
                break
            seen += chunk
    os.close(near)
    return child.returncode, seen.decode()


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


@pytest.mark.parametrize("arguments", [["models"], ["generate", "--model", "m", "--prompt", "x"]])
def test_without_a_server_it_says_how_to_start_one(arguments: list[str], capsys: Capture) -> None:
    assert main([*arguments, "--target", "127.0.0.1:1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mtp-router: no server answers at 127.0.0.1:1: none runs, or it is shutting down;")
    assert error.count("\n") == 1


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


def test_the_address_comes_from_the_settings(
    router: FakeRouter, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MTP_ROUTER_SERVER__LISTEN", router.address)
    assert main(["generate", "--model", "tiny", "--prompt", "Hi"]) == 0
    monkeypatch.setenv("MTP_ROUTER_SERVER__LISTEN", "127.0.0.1:0")
    assert main(["models"]) == 2
    assert "--target" in capsys.readouterr().err
    monkeypatch.delenv("MTP_ROUTER_SERVER__LISTEN")
    file = tmp_path / "router.toml"
    file.write_text(f'[server]\nlisten = "{router.address}"\n')
    assert main(["generate", "--config", str(file), "--model", "tiny", "--prompt", "Hi"]) == 0


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


def test_models(router: FakeRouter, capsys: Capture) -> None:
    assert main(["models", "--target", router.address]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("\t") == ["model-0", "local", "ready", "8192", "98 MB", "chat"]
    assert len(lines) == 5
    assert main(["models", "--target", router.address, "model-1", "--evidence"]) == 0
    out = capsys.readouterr().out
    assert "tokenizer.chat_template present" in out
    assert "no MTP head" in out
    assert "about 476 MB once loaded" in out
    assert "fallbacks    spare" in out
    assert "model-0" not in out
    assert main(["models", "--target", router.address, "--json"]) == 0
    assert [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()] == ["MODEL_STATE_READY"] * 5
    assert main(["models", "--target", router.address, "missing"]) == 1
    assert "MODEL_NOT_FOUND" in capsys.readouterr().err


def test_models_shows_problems_and_how_to_get_a_first_model(router: FakeRouter, capsys: Capture) -> None:
    router.models = [v1.Model(name="broken", state=v1.MODEL_STATE_FAILED, problem="x.gguf does not exist")]
    assert main(["models", "--target", router.address]) == 0
    assert "broken: x.gguf does not exist" in capsys.readouterr().out
    router.models = []
    assert main(["models", "--target", router.address]) == 0
    assert "mtp-router pull smollm2" in capsys.readouterr().out


def test_models_draws_a_table_on_a_terminal(router: FakeRouter, command: list[str]) -> None:
    status, seen = on_a_terminal([*command, "models", "--target", router.address])
    assert status == 0
    assert "capabilities" in seen
    assert "model-4" in seen


def test_top_shows_backends_models_and_what_the_metrics_page_tells(router: FakeRouter, capsys: Capture) -> None:
    assert main(["top", "--target", router.address, "--once"]) == 0
    out = capsys.readouterr().out
    assert "local" in out
    assert "model-4" in out
    assert "--metrics" in out
    metrics = Metrics()
    drafts = SpeculationStatistics(DraftSource.MTP_HEAD, 2, 4, 3, ((2, 2), (2, 1)))
    metrics.finished(("model-1", "local"), Finished(FinishReason.MAX_TOKENS, Usage(1, 6), drafts))
    metrics.ended(("model-1", "local"), "ok", 1.0, 0.0, 0.0, 0.25)
    page, thread = start_http_server(0, "127.0.0.1", metrics.registry)
    try:
        where = f"127.0.0.1:{page.server_port}"
        assert main(["top", "--target", router.address, "--metrics", where]) == 0  # no terminal: one look
    finally:
        page.shutdown()
        page.server_close()
        thread.join()
    row = next(line for line in capsys.readouterr().out.splitlines() if "model-1" in line)
    assert "0.250 s" in row
    assert "75%" in row
    assert main(["top", "--target", router.address, "--metrics", where]) == 2
    assert "cannot read the metrics page" in capsys.readouterr().err


def test_refresh_tells_what_is_different(router: FakeRouter, capsys: Capture) -> None:
    assert main(["refresh", "--target", router.address]) == 0
    assert capsys.readouterr().out == "nothing has changed\n"
    router.refreshed = v1.RefreshModelsResponse(
        added=["a", "b"], removed=["c"], changed=["d"], kept=["e"], needs_restart=["server"]
    )
    assert main(["refresh", "--target", router.address]) == 0
    told = ["added: a, b", "removed: c", "changed: d", "in use and so left as they were: e", "take a restart: server"]
    assert capsys.readouterr().out.splitlines() == told
    assert main(["refresh", "--target", router.address, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == ["e"]


def test_config_prints_toml_that_gives_the_same_settings(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "router.toml"
    file.write_text('[models."a.b"]\npath = "x \\"y\\".gguf"\naliases = ["c"]\n[sampling]\ntemperature = 0.5\n')
    monkeypatch.setenv("MTP_ROUTER_SERVER__DRAIN_GRACE", "7")
    assert main(["config", "--config", str(file)]) == 0
    out = capsys.readouterr().out
    assert tomllib.loads(out) == effective_settings(load_settings(file))
    assert "drain_grace = 7.0  # MTP_ROUTER_SERVER__DRAIN_GRACE\n" in out
    assert "temperature = 0.5  # file\n" in out
    assert 'listen = "127.0.0.1:50061"\n' in out
    assert f"# settings file: {file}\n" in out
    assert main(["config", "--config", str(file), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["settings"] == effective_settings(load_settings(file))
    assert data["origins"]["server.drain_grace"] == "MTP_ROUTER_SERVER__DRAIN_GRACE"
    assert data["origins"]["sampling.temperature"] == "file"
    assert data["origins"]["server.listen"] == "default"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[server]\nlissten = 1\n", "server.lissten"),
        ('[server]\nlisten = "0.0.0.0:1"\n', "allow_remote"),
        ("[server\n", "invalid settings"),
        ("\xff", "invalid settings"),
        (None, "no settings file"),
    ],
)
@pytest.mark.parametrize("command_name", ["config", "serve", "models"])
def test_wrong_settings_are_status_2(
    command_name: str, text: str | None, complaint: str, capsys: Capture, tmp_path: Path
) -> None:
    file = tmp_path / "router.toml"
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    assert main([command_name, "--config", str(file)]) == 2
    err = capsys.readouterr().err
    assert complaint in err
    assert err.count("\n") == 1


def test_serve_takes_the_address_from_the_arguments(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    served: list[ServerSettings] = []

    def serve(settings: Settings, load: Callable[[], Settings], *, announce_json: bool, lifeline: None) -> int:
        served.extend([settings.server, load().server])
        return 0

    monkeypatch.setattr("router.process.serve", serve)
    file = tmp_path / "router.toml"
    file.write_text("[server]\ndrain_grace = 7.0\n")
    assert main(["serve", "--config", str(file), "--listen", "127.0.0.1:7"]) == 0
    moved = ServerSettings(listen="127.0.0.1:7", drain_grace=7.0)
    assert served == [moved, moved]  # a refresh reads it the same way, and finds no change
    assert main(["serve", "--listen", "0.0.0.0:7"]) == 2
    assert "allow_remote" in capsys.readouterr().err


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


def test_chat_tells_of_input_that_is_not_text(router: FakeRouter, command: list[str]) -> None:
    done = subprocess.run(
        [*command, "chat", "--target", router.address, "--model", "tiny"],
        input=b"\x9c\n",
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"mtp-router: standard input is not UTF-8 text\n"


def test_a_request_that_is_too_large_is_told(router: FakeRouter, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "long.txt").write_text("word " * 1_000_000)
    assert generate(router, "--file", str(tmp_path / "long.txt")) == 1
    assert f"larger than the server at {router.address} takes" in capsys.readouterr().err
