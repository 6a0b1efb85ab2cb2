"""The engine from outside: events, cuts, failures, limits, and what is left afterwards."""

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import psutil
import pytest
from support.engines import reason_of, tokens_of, until

from mlx_mtp_backend import (
    Delta,
    Engine,
    EngineError,
    EngineOptions,
    EngineProcess,
    ErrorReason,
    Finished,
    FinishReason,
    GenerateParams,
    LoadOptions,
    Replay,
    Rule,
    Sampling,
    Started,
    WiringPolicy,
)
from mlx_mtp_backend.families.qwen3_5 import Qwen35
from mlx_mtp_backend.synthetic import Recipe, write

QUIET = LoadOptions(depth=3, wiring=WiringPolicy.OFF, prefill_chunk=16)
PROMPT = tuple(range(3, 43))


@pytest.fixture(scope="module", params=[Engine, EngineProcess], ids=["thread", "process"])
def kind(request: pytest.FixtureRequest):
    """Everything that shows from outside holds for both."""
    return request.param


@pytest.fixture(scope="module")
def engine(kind, history: Path, pass_through: Path):
    with serving(kind, history, pass_through) as engine:
        yield engine


@pytest.fixture(scope="module")
def near(history: Path, pass_through: Path):
    """An engine on a thread of this process, into which faults can be planted."""
    with serving(Engine, history, pass_through) as engine:
        yield engine


@contextmanager
def serving(kind, history: Path, pass_through: Path):
    with kind(EngineOptions(device="cpu", max_streams=4, max_waiting=2000, stream_buffer=64)) as engine:
        for name, path in (("history", history), ("chain", pass_through)):
            engine.load(name, path, QUIET).result(timeout=60)
        yield engine


def ask(model: str = "history", **changes) -> GenerateParams:
    defaults = {"prompt": PROMPT, "max_tokens": 24, "sampling": Sampling(0.8), "seed": 5, "ignore_eos": True}
    return GenerateParams(model, **defaults | changes)


def text_of(events) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


def reply(engine: Engine, params: GenerateParams) -> list:
    return list(engine.submit(params))


def idle(engine: Engine) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        status = engine.status()
        if status.active == status.waiting == 0:
            return True
        time.sleep(0.01)
    return False


def test_a_reply_is_started_deltas_finished(engine):
    events = reply(engine, ask())
    assert isinstance(events[0], Started)
    assert all(isinstance(event, Delta) for event in events[1:-1])
    started, finished = events[0], events[-1]
    assert (started.prompt_tokens, started.seed, started.rule) == (len(PROMPT), 5, Rule.COUPLING)
    assert started.replay is Replay.EXACT
    assert finished.reason is FinishReason.MAX_TOKENS
    assert finished.statistics.completion_tokens == len(tokens_of(events)) == 24
    assert text_of(events) == engine.models()["history"].text.decode(tokens_of(events))


def test_statistics_add_up(engine):
    statistics = reply(engine, ask("chain", max_tokens=60))[-1].statistics
    # The first token comes from the prefill; a round commits its accepted drafts and one token more.
    assert 1 + statistics.rounds + sum(statistics.accepted) == 60
    assert all(a <= d for a, d in zip(statistics.accepted, statistics.drafted, strict=True))
    assert sum(statistics.accepted) > 0
    assert statistics.tokens_per_round > 1.5
    assert min(statistics.seconds_queued, statistics.seconds_prefill, statistics.seconds_decode) >= 0


def test_a_seeded_reply_depends_on_nothing_around_it(engine):
    alone = tokens_of(reply(engine, ask(depth=0)))
    neighbours = [engine.submit(ask(seed=90 + i, max_tokens=40)) for i in range(3)]
    beside = tokens_of(reply(engine, ask(depth=3)))
    for neighbour in neighbours:
        list(neighbour)
    assert alone == beside


def test_without_a_seed_one_is_drawn_and_reported(engine):
    first, second = (reply(engine, ask(seed=None)) for _ in range(2))
    assert first[0].seed != second[0].seed
    assert first[0].rule is Rule.REJECTION
    assert first[0].replay is Replay.NONE
    assert "seed" in first[0].replay_reason
    plain = reply(engine, ask(seed=None, depth=0))
    again = reply(engine, ask(seed=plain[0].seed, depth=3))
    assert plain[0].replay is Replay.EXACT
    assert tokens_of(plain) == tokens_of(again)


def test_greedy_is_exact_without_a_seed(engine):
    first, second = (reply(engine, ask(seed=None, sampling=Sampling(0.0))) for _ in range(2))
    assert first[0].replay is Replay.EXACT
    assert tokens_of(first) == tokens_of(second)


def test_a_stop_token_ends_the_reply_and_is_not_emitted(engine):
    whole = tokens_of(reply(engine, ask()))
    stop = whole[10]
    events = reply(engine, ask(stop_tokens=frozenset({stop})))
    assert tokens_of(events) == whole[: whole.index(stop)]
    assert (events[-1].reason, events[-1].stop) == (FinishReason.STOP_TOKEN, stop)


def test_the_models_own_end_stops_unless_ignored(engine):
    events = reply(engine, ask("chain", prompt=(5, 6), max_tokens=300, ignore_eos=False, seed=2))
    assert events[-1].reason is FinishReason.STOP_TOKEN
    assert events[-1].stop in engine.models()["chain"].text.end_tokens
    length = len(tokens_of(events)) + 5
    assert reply(engine, ask("chain", prompt=(5, 6), max_tokens=length, seed=2))[-1].reason is FinishReason.MAX_TOKENS


def test_a_stop_string_ends_the_reply_and_is_not_shown(engine):
    whole = text_of(reply(engine, ask("chain", max_tokens=80)))
    stop = whole[60:67]
    events = reply(engine, ask("chain", max_tokens=80, stop_strings=("never there", stop)))
    assert text_of(events) == whole[: whole.index(stop)]
    assert (events[-1].reason, events[-1].stop) == (FinishReason.STOP_STRING, stop)


def test_text_held_for_a_stop_that_does_not_come_is_shown(engine):
    whole = text_of(reply(engine, ask("chain")))
    assert text_of(reply(engine, ask("chain", stop_strings=(whole[-5:] + "never",)))) == whole


def test_the_context_is_a_limit(kind, tmp_path):
    path = write(tmp_path, Recipe(context=64))
    with kind(EngineOptions(device="cpu")) as engine:
        engine.load("short", path, QUIET).result(timeout=60)
        for depth in (0, 3):
            events = reply(engine, ask("short", max_tokens=100, depth=depth))
            assert events[-1].reason is FinishReason.CONTEXT_LIMIT
            assert len(tokens_of(events)) == 64 - len(PROMPT)
        refused = reason_of(lambda: engine.submit(ask("short", prompt=(1,) * 64)))
        assert refused is ErrorReason.PROMPT_TOO_LONG


def test_a_time_limit_leaves_a_prefix(engine):
    events = reply(engine, ask(max_tokens=3000, time_limit=0.3))
    assert events[-1].reason is FinishReason.TIME_LIMIT
    cut = tokens_of(events)
    whole = tokens_of(reply(engine, ask(max_tokens=len(cut) + 8)))
    assert 0 < len(cut) < len(whole)
    assert cut == whole[: len(cut)]


def test_a_slow_reader_pauses_then_is_cut_with_a_prefix(kind, history):
    options = EngineOptions(device="cpu", stream_buffer=8, slow_reader_limit=1.0)
    with kind(options) as engine:
        engine.load("history", history, QUIET).result(timeout=60)
        whole = tokens_of(reply(engine, ask(max_tokens=60)))
        assert len(whole) == 60
        stream = engine.submit(ask(max_tokens=60))
        until(lambda: stream.full)
        early = stream.read()
        assert 8 <= len(tokens_of(early)) < 20
        until(lambda: stream.finished)
        late = stream.read()
        assert late[-1].reason is FinishReason.SLOW_READER
        cut = tokens_of([*early, *late])
        assert cut == whole[: len(cut)]


@pytest.mark.parametrize("delay", [0.0, 0.002, 0.01, 0.05])
def test_a_cancelled_stream_ends(engine, delay):
    stream = engine.submit(ask(max_tokens=3000, prompt=PROMPT * 8))
    time.sleep(delay)
    stream.cancel()
    asked = time.monotonic()
    events = list(stream)
    assert time.monotonic() - asked < 2
    assert events[-1].reason is FinishReason.CANCELLED
    stream.cancel()
    assert stream.read() == []


def memory_of(engine) -> int:
    """Bytes of its arrays, or of its process."""
    return mx.get_active_memory() if isinstance(engine, Engine) else psutil.Process(engine.pid).memory_info().rss


def test_a_thousand_cancels_leave_nothing(engine):
    assert idle(engine)
    reply(engine, ask())
    gc.collect()
    threads, memory = threading.active_count(), memory_of(engine)
    streams = []
    for i in range(1000):
        stream = engine.submit(ask(max_tokens=500, seed=i))
        streams.append(stream)
        if i % 3 == 0:
            time.sleep(0.001)
        stream.cancel()
    for stream in streams:
        assert list(stream)[-1].reason is FinishReason.CANCELLED
    assert idle(engine)
    reply(engine, ask())
    gc.collect()
    assert threading.active_count() == threads
    assert memory_of(engine) <= memory + (1_000_000 if isinstance(engine, Engine) else 20_000_000)


def test_a_full_queue_refuses(kind, history):
    with kind(EngineOptions(device="cpu", max_streams=1, max_waiting=2)) as engine:
        engine.load("history", history, QUIET).result(timeout=60)
        streams = [engine.submit(ask(max_tokens=2000)) for _ in range(3)]
        assert reason_of(lambda: engine.submit(ask())) is ErrorReason.QUEUE_FULL
        for stream in streams:
            stream.cancel()
            list(stream)
        assert idle(engine)
        assert reply(engine, ask())[-1].reason is FinishReason.MAX_TOKENS


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": (0, 99_999)}, ErrorReason.TOKEN_OUT_OF_RANGE),
        ({"prompt": (-1,)}, ErrorReason.TOKEN_OUT_OF_RANGE),
        ({"prompt": ()}, ErrorReason.PROMPT_EMPTY),
        ({"prompt": (1,) * 4096}, ErrorReason.PROMPT_TOO_LONG),
        ({"max_tokens": 0}, ErrorReason.INVALID_PARAMS),
        ({"seed": 1 << 64}, ErrorReason.INVALID_PARAMS),
        ({"seed": -1}, ErrorReason.INVALID_PARAMS),
        ({"depth": 17}, ErrorReason.INVALID_PARAMS),
        ({"time_limit": float("nan")}, ErrorReason.INVALID_PARAMS),
        ({"time_limit": 0.0}, ErrorReason.INVALID_PARAMS),
        ({"stop_strings": ("",)}, ErrorReason.INVALID_PARAMS),
        ({"stop_strings": ("x",) * 17}, ErrorReason.INVALID_PARAMS),
        ({"stop_strings": ("x" * 257,)}, ErrorReason.INVALID_PARAMS),
    ],
)
def test_bad_requests_are_refused_with_a_reason(engine, changes, reason):
    assert reason_of(lambda: engine.submit(ask(**changes))) is reason


def test_an_unknown_model_is_refused(engine):
    assert reason_of(lambda: engine.submit(ask("nobody"))) is ErrorReason.MODEL_NOT_LOADED
    assert reason_of(lambda: engine.unload("nobody").result(timeout=10)) is ErrorReason.MODEL_NOT_LOADED
    assert reason_of(lambda: engine.load("history", Path("x"))) is ErrorReason.INVALID_PARAMS


def test_a_model_in_use_is_not_unloaded(kind, history):
    with kind(EngineOptions(device="cpu")) as engine:
        engine.load("a", history, QUIET).result(timeout=60)
        stream = engine.submit(ask("a", max_tokens=2000))
        assert reason_of(lambda: engine.unload("a").result(timeout=10)) is ErrorReason.MODEL_IN_USE
        stream.cancel()
        list(stream)
        engine.unload("a").result(timeout=10)
        assert engine.models() == {}
        assert reason_of(lambda: engine.submit(ask("a"))) is ErrorReason.MODEL_NOT_LOADED


def test_a_checkpoint_without_a_head_decodes_plainly(kind, tmp_path):
    path = write(tmp_path, Recipe(head="none"))
    with kind(EngineOptions(device="cpu")) as engine:
        info = engine.load("plain", path).result(timeout=60)
        assert (info.has_head, info.depth, info.wiring) == (False, 0, None)
        events = reply(engine, ask("plain"))
        assert (events[0].depth, events[-1].statistics.drafted) == (0, ())
        assert reason_of(lambda: engine.submit(ask("plain", depth=2))) is ErrorReason.HEAD_MISSING


def test_loads_that_fail_say_why_and_leave_the_engine_serving(engine, history, tmp_path):
    nowhere = engine.load("x", tmp_path / "nowhere")
    assert reason_of(lambda: nowhere.result(timeout=30)) is ErrorReason.CHECKPOINT_UNREADABLE
    other = write(tmp_path / "other", Recipe(head="none"))
    (other / "config.json").write_text((other / "config.json").read_text().replace('"qwen3_5"', '"mystery"'))
    unknown = engine.load("x", other)
    assert reason_of(lambda: unknown.result(timeout=30)) is ErrorReason.FAMILY_UNSUPPORTED
    wider = write(tmp_path / "wider", Recipe(head="none"))
    (wider / "config.json").write_text(
        (wider / "config.json").read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 6')
    )
    mismatch = engine.load("x", wider)
    assert reason_of(lambda: mismatch.result(timeout=30)) is ErrorReason.WEIGHTS_MISMATCH
    headless = engine.load("x", other.parent / "wider", LoadOptions(head_path=tmp_path / "other"))
    assert reason_of(lambda: headless.result(timeout=30)) is ErrorReason.HEAD_MISSING
    refused = engine.load("x", history, LoadOptions(wiring=WiringPolicy.REFUSE))
    assert reason_of(lambda: refused.result(timeout=60)) is ErrorReason.HEAD_MISWIRED
    assert engine.status().loading == ()
    assert reply(engine, ask())[-1].reason is FinishReason.MAX_TOKENS


def test_streams_go_on_while_a_model_loads(engine, pass_through):
    stream = engine.submit(ask(max_tokens=3000))
    seen: list[int] = []
    engine.load("second", pass_through, LoadOptions(), lambda _: seen.append(len(tokens_of(stream.read())))).result(
        timeout=60
    )
    stream.cancel()
    list(stream)
    engine.unload("second").result(timeout=10)
    assert len(seen) > 5
    assert sum(count > 0 for count in seen) >= len(seen) // 2


def test_a_round_that_cannot_be_built_changes_nothing(near, monkeypatch):
    """The head raises half way through a round's graph: the same tokens come out, without its drafts."""
    expected = tokens_of(reply(near, ask()))
    real, calls = Qwen35.head, []

    def head(self, tokens, carried, segments):
        calls.append(len(calls))
        hidden = real(self, tokens, carried, segments)
        if len(calls) % 4 == 0:
            raise ValueError("planted")
        return hidden

    monkeypatch.setattr(Qwen35, "head", head)
    events = reply(near, ask())
    assert len(calls) > 8
    assert tokens_of(events) == expected
    assert events[-1].reason is FinishReason.MAX_TOKENS


def test_a_sequence_that_cannot_go_on_ends_alone(near, monkeypatch):
    healthy = near.submit(ask("chain", max_tokens=60))
    real = Qwen35.trunk

    def trunk(self, tokens, segments):
        if self.hidden_size == 64 and segments[0].rows < 8:
            raise ValueError("planted")
        return real(self, tokens, segments)

    monkeypatch.setattr(Qwen35, "trunk", trunk)
    finished = reply(near, ask())[-1]
    assert (finished.reason, finished.error.reason) == (FinishReason.ERROR, ErrorReason.BUILD_FAILURE)
    assert list(healthy)[-1].reason is FinishReason.MAX_TOKENS


def unreadable(folder: Path) -> mx.array:
    """An array whose evaluation really fails: its file is cut short after it was opened."""
    mx.save_safetensors(str(folder / "cut.safetensors"), {"x": mx.ones((1000,))})
    array = mx.load(str(folder / "cut.safetensors"))["x"]
    with (folder / "cut.safetensors").open("r+b") as file:
        file.truncate(200)
    return array


def test_a_failed_evaluation_ends_its_pass_only(near, monkeypatch, tmp_path):
    expected = tokens_of(reply(near, ask("chain", max_tokens=60)))
    other = near.submit(ask("chain", max_tokens=60))
    real, passes = Qwen35.logits, []

    def logits(self, normed):
        out = real(self, normed)
        if self.hidden_size != 64:
            return out
        passes.append(1)
        return out + mx.sum(unreadable(tmp_path)) if len(passes) == 5 else out

    monkeypatch.setattr(Qwen35, "logits", logits)
    finished = reply(near, ask(depth=0))[-1]
    assert (finished.reason, finished.error.reason) == (FinishReason.ERROR, ErrorReason.DEVICE_FAILURE)
    assert tokens_of(list(other)) == expected
    assert reply(near, ask())[-1].reason is FinishReason.MAX_TOKENS


def test_logits_that_are_not_finite_end_the_request(near, monkeypatch):
    real, passes = Qwen35.logits, []

    def logits(self, normed):
        passes.append(1)
        out = real(self, normed)
        return out.at[..., 5].add(mx.nan) if len(passes) == 4 else out

    monkeypatch.setattr(Qwen35, "logits", logits)
    finished = reply(near, ask(depth=0))[-1]
    assert (finished.reason, finished.error.reason) == (FinishReason.ERROR, ErrorReason.NON_FINITE_LOGITS)


def test_closing_ends_every_stream_and_refuses_more(kind, history):
    engine = kind(EngineOptions(device="cpu", max_streams=1))
    engine.load("history", history, QUIET).result(timeout=60)
    streams = [engine.submit(ask(max_tokens=3000)) for _ in range(3)]
    engine.close()
    engine.close()
    for stream in streams:
        finished = list(stream)[-1]
        assert (finished.reason, finished.error.reason) == (FinishReason.ERROR, ErrorReason.ENGINE_CLOSED)
    assert reason_of(lambda: engine.submit(ask())) is ErrorReason.ENGINE_CLOSED
    assert reason_of(lambda: engine.load("x", history)) is ErrorReason.ENGINE_CLOSED


async def test_asyncio_readers_are_woken(engine):
    loop, expected = asyncio.get_running_loop(), tokens_of(reply(engine, ask()))

    async def read(params: GenerateParams) -> list:
        ready, events = asyncio.Event(), []
        stream = engine.submit(params, on_ready=lambda: loop.call_soon_threadsafe(ready.set))
        while not events or not isinstance(events[-1], Finished):
            await asyncio.wait_for(ready.wait(), 10)
            ready.clear()
            events += stream.read()
        return events

    replies = await asyncio.gather(*(read(ask()) for _ in range(6)))
    assert {tokens_of(events) for events in replies} == {expected}


def test_a_reader_that_raises_is_dropped_and_the_engine_serves_on(engine):
    def gone() -> None:
        raise RuntimeError("event loop is closed")

    stream = engine.submit(ask(max_tokens=3000), on_ready=gone)
    assert list(stream)[-1].reason is FinishReason.CANCELLED
    assert reply(engine, ask())[-1].reason is FinishReason.MAX_TOKENS


def run_python(code: str) -> subprocess.CompletedProcess:
    path = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "kernels")]
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": ":".join(path)},
        check=False,
    )


def test_importing_the_package_does_not_import_mlx():
    done = run_python("import sys, mlx_mtp_backend; print('mlx.core' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("close", ["engine.close()", "pass"])
def test_the_process_exits_cleanly(kind, history, close):
    """Also when nobody closed the engine: the thread is a daemon, and MLX's streams end with it."""
    done = run_python(f"""
        from pathlib import Path
        from mlx_mtp_backend import *
        engine = {kind.__name__}(EngineOptions(device="cpu"))
        engine.load("m", Path({str(history)!r}), LoadOptions(wiring=WiringPolicy.OFF)).result()
        print(len(list(engine.submit(GenerateParams("m", (1, 2, 3), max_tokens=5, seed=1)))) > 2)
        {close}
    """)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the interposed BLAS is for Linux")
def test_an_interposed_blas_says_best_effort(history):
    done = run_python(f"""
        from pathlib import Path
        from mlx_mtp_backend import *
        engine = Engine(EngineOptions(device="cpu", interpose_blas=True))
        info = engine.load("m", Path({str(history)!r}), LoadOptions(wiring=WiringPolicy.OFF)).result()
        print(info.replay.value, "blas=openblas" in info.fingerprint)
        engine.close()
    """)
    assert done.stdout.split() == ["best_effort", "True"], done.stderr


def test_a_blas_cannot_be_interposed_once_mlx_is_there():
    with pytest.raises(EngineError) as caught:
        Engine(EngineOptions(interpose_blas=True))
    assert caught.value.reason in (ErrorReason.BLAS_TOO_LATE, ErrorReason.BLAS_MISSING)
