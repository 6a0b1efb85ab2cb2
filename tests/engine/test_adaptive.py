"""The engine where no depth is set, and where prompts come again: what callers see of it."""

import json
import math
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_mtp_backend import (
    Engine,
    EngineError,
    EngineOptions,
    Finished,
    GenerateParams,
    LoadOptions,
    Sampling,
    Started,
    Statistics,
    WiringPolicy,
    cache,
)
from mlx_mtp_backend.api import Rule
from mlx_mtp_backend.decode import rounds
from mlx_mtp_backend.decode.depth import DepthController
from mlx_mtp_backend.decode.drafters import CATCH_UP_ROWS, HeadDrafter
from mlx_mtp_backend.decode.pacing import paced_round
from mlx_mtp_backend.families.base import Segment
from mlx_mtp_backend.synthetic import Recipe, write
from tests.conformance import decode
from tests.engine.test_engine import tokens_of

ADAPTIVE = LoadOptions(wiring=WiringPolicy.OFF, prefill_chunk=16)
PROMPT = tuple(range(3, 103))


@pytest.fixture(scope="module")
def memory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("memory") / "depths.json"


@pytest.fixture(scope="module")
def engine(history: Path, pass_through: Path, memory: Path):
    with Engine(EngineOptions(device="cpu", depth_memory=memory)) as engine:
        for name, path in (("history", history), ("chain", pass_through)):
            engine.load(name, path, ADAPTIVE).result(timeout=60)
        yield engine


def reply(engine: Engine, model: str, prompt=PROMPT, **changes) -> tuple[Started, tuple[int, ...], Statistics]:
    defaults = {"max_tokens": 40, "sampling": Sampling(0.8), "seed": 5, "ignore_eos": True}
    events = list(engine.submit(GenerateParams(model, prompt, **defaults | changes)))
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
    return events[0], tokens_of(events), events[-1].statistics


@pytest.mark.parametrize("model", ["history", "chain"])
def test_an_adaptive_reply_is_the_plain_one(engine, model):
    started, tokens, statistics = reply(engine, model)
    assert started.depth is None
    assert tokens == reply(engine, model, depth=0)[1] == reply(engine, model, depth=4)[1]
    assert sum(statistics.depths) == statistics.rounds
    assert sum(depth * rounds for depth, rounds in enumerate(statistics.depths)) == sum(statistics.drafted)


def test_a_depth_that_is_asked_for_is_kept(engine):
    started, _, statistics = reply(engine, "history", depth=2)
    assert started.depth == 2
    assert statistics.depths[2] >= statistics.rounds - 2  # but for the last tokens
    assert reply(engine, "history", depth=0)[2].drafted == ()


def test_many_streams_at_once_change_nothing(engine):
    prompts = [tuple(range(n, n + 30 + n)) for n in range(1, 7)]
    alone = [reply(engine, "history", prompt, depth=0)[1] for prompt in prompts]
    streams = [
        engine.submit(GenerateParams("history", prompt, 40, Sampling(0.8), 5, (None, 3, 0)[i % 3], ignore_eos=True))
        for i, prompt in enumerate(prompts)
    ]
    assert [tokens_of(list(stream)) for stream in streams] == alone


def test_cached_tokens_are_told_and_change_nothing(engine):
    prompt = tuple(range(200, 300))
    cold, warm = (reply(engine, "history", prompt, depth=3) for _ in range(2))
    assert (cold[0].cached_tokens, warm[0].cached_tokens) == (0, 96)
    assert (cold[2].cached_tokens, warm[2].cached_tokens) == (0, 96)
    assert cold[1] == warm[1]
    turn = (*prompt, *cold[1], *range(50))
    assert reply(engine, "history", turn, depth=3)[0].cached_tokens == 96


def test_a_boundary_is_cached(engine):
    system = tuple(range(300, 340))
    reply(engine, "history", system + tuple(range(40)), boundaries=(len(system),))
    assert reply(engine, "history", system + tuple(range(60, 100)))[0].cached_tokens == 32


def test_where_the_time_went_is_told(engine):
    _, _, statistics = reply(engine, "chain", depth=2)
    parts = (statistics.seconds_draft, statistics.seconds_verify, statistics.seconds_commit)
    assert all(part > 0 for part in parts)
    assert sum(parts) <= statistics.seconds_decode


def test_what_was_measured_is_remembered(history, tmp_path):
    memory = tmp_path / "depths.json"
    stages: list[list[str]] = []
    for _ in range(2):
        stages.append([])
        with Engine(EngineOptions(device="cpu", depth_memory=memory)) as engine:
            engine.load("m", history, ADAPTIVE, lambda step: stages[-1].append(step.stage)).result(timeout=60)
            reply(engine, "m")
    assert "rounds" in stages[0]
    assert "rounds" not in stages[1]
    (stored,) = json.loads(memory.read_text()).values()
    assert [row[:2] for row in stored["costs"]][:1] == [[1, 1]]
    assert stored["head_step"] > 0
    assert 0 < stored["catch_up"] < math.inf


def test_what_other_files_showed_is_not_taken_over(tmp_path):
    """A model that is replaced where it lies is another one."""
    folder, memory = tmp_path / "model", tmp_path / "depths.json"
    write(folder, Recipe(layers=2))
    stages: list[list[str]] = []
    for seed in (1, 1, 2):
        if seed == 2:
            write(folder, Recipe(layers=2, seed=seed))
        stages.append([])
        with Engine(EngineOptions(device="cpu", depth_memory=memory)) as engine:
            engine.load("m", folder, ADAPTIVE, lambda step: stages[-1].append(step.stage)).result(timeout=60)
    assert ["rounds" in stage for stage in stages] == [True, False, True]
    assert len(json.loads(memory.read_text())) == 1


@pytest.mark.parametrize("content", ["", "[]", '{"x": 1', "{}"])
def test_a_memory_that_cannot_be_read_is_measured_again(history, tmp_path, content):
    memory, stages = tmp_path / "depths.json", []
    memory.write_text(content)
    with Engine(EngineOptions(device="cpu", depth_memory=memory)) as engine:
        engine.load("m", history, ADAPTIVE, lambda step: stages.append(step.stage)).result(timeout=60)
    assert "rounds" in stages
    assert json.loads(memory.read_text())


def test_a_malformed_entry_is_measured_again(history, tmp_path):
    memory, stages = tmp_path / "depths.json", []
    with Engine(EngineOptions(device="cpu", depth_memory=memory)) as engine:
        engine.load("m", history, ADAPTIVE).result(timeout=60)
    stored = json.loads(memory.read_text())
    memory.write_text(json.dumps({key: {"costs": [[1]], "acceptance": 3} for key in stored}))
    with Engine(EngineOptions(device="cpu", depth_memory=memory)) as engine:
        engine.load("m", history, ADAPTIVE, lambda step: stages.append(step.stage)).result(timeout=60)
        assert reply(engine, "m")[1]
    assert "rounds" in stages


def test_options_are_checked():
    for build in (
        lambda: EngineOptions(prefix_cache_bytes=-1),
        lambda: LoadOptions(depth=17),
        lambda: GenerateParams("m", PROMPT, boundaries=(101,)),
        lambda: GenerateParams("m", PROMPT, boundaries=(1,) * 17),
    ):
        with pytest.raises(EngineError):
            build()


def test_a_long_reply_without_drafts_keeps_few_arrays_and_drafts_again(history):
    """Hiddens that the head has missed are joined as they come."""
    model = decode.load(history)
    one = decode.start(model, PROMPT, 400, sampling=Sampling(0.8), seed=5, rule=Rule.COUPLING, depth=1)
    decode.prefill(model, one)
    one.depth = 0
    for _ in range(300):
        rounds.run_round(model, HeadDrafter(model), [one])
    assert one.pending_rows == 301
    assert len(one.pending) < 70
    one.depth = 3
    for _ in range(2):  # the first brings the head nearer
        rounds.run_round(model, HeadDrafter(model), [one])
    assert one.drafted
    (plain,) = decode.generate(model, [PROMPT], 400, HeadDrafter(model), sampling=Sampling(0.8), depth=0, seed=5)
    assert one.tokens == plain.tokens[: len(one.tokens)]
    assert one.head[0].offset + one.pending_rows == len(one.tokens) - 1


def lagging(model, missed: int, start: int = 0):
    """A sequence whose head is so many slots behind."""
    one = decode.start(model, PROMPT[start:], 2000, sampling=Sampling(0.8), seed=5, rule=Rule.COUPLING, depth=2)
    decode.prefill(model, one)
    one.depth = 0
    while one.pending_rows < missed:
        rounds.run_round(model, HeadDrafter(model), [one])
    one.depth = 2
    return one


def test_a_head_far_behind_catches_up_in_slices(history, monkeypatch):
    """No pass of the head is longer than a slice, every slot is run with its own hidden, and drafts are those of a head
    that never lagged."""
    model = decode.load(history)
    one, other = lagging(model, 3 * CATCH_UP_ROWS // 2), lagging(model, CATCH_UP_ROWS + 40, start=1)
    passes: list[int] = []
    head = type(model).head

    def counted(self, tokens, carried, segments):
        passes.append(tokens.shape[0])
        return head(self, tokens, carried, segments)

    monkeypatch.setattr(type(model), "head", counted)
    drafter, depths, behind = HeadDrafter(model), DepthController(), []
    for _ in range(6):
        before = len(passes)
        paced_round(model, drafter, depths, [one, other])
        behind.append(sum(passes[before:]))
    assert max(passes) <= CATCH_UP_ROWS + 2 * 3
    assert max(behind) <= CATCH_UP_ROWS + 2 * 3 * 2
    assert one.drafted
    assert other.drafted
    monkeypatch.undo()
    (plain,) = decode.generate(model, [PROMPT], 2000, HeadDrafter(model), sampling=Sampling(0.8), depth=0, seed=5)
    assert one.tokens == plain.tokens[: len(one.tokens)]
    assert one.head[0].offset + one.pending_rows == len(one.tokens) - 1


def test_slices_leave_the_head_as_one_pass_does(history):
    """Its next drafts are the same."""
    model = decode.load(history)
    sliced, whole = lagging(model, 300), lagging(model, 300)
    rounds.run_round(model, HeadDrafter(model), [sliced])
    assert sliced.pending_rows < 60
    whole.depth = 0
    rounds.run_round(model, HeadDrafter(model), [whole])
    whole.depth = 2
    hidden = mx.concatenate(whole.pending)
    cache.begin(whole.head)
    model.head(mx.array(whole.tokens[-len(hidden) :], mx.int32), hidden, [Segment(whole.head, len(hidden))])
    rows = [one.head[0].rows(0, 340)[0] for one in (whole,)]
    cache.abort(whole.head)
    rounds.run_round(model, HeadDrafter(model), [sliced])
    assert sliced.drafted
    assert mx.allclose(sliced.head[0].rows(0, 340)[0], rows[0], atol=1e-4)


def test_a_round_that_fails_keeps_the_slices_that_were_run(history):
    model = decode.load(history)
    one = lagging(model, 300)
    trunk = type(model).trunk
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(model), "trunk", lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
        with pytest.raises(RuntimeError):
            rounds.run_round(model, HeadDrafter(model), [one])
    assert type(model).trunk is trunk
    assert one.pending_rows < 60
    assert one.head[0].offset + one.pending_rows == len(one.tokens) - 1
    for _ in range(3):
        rounds.run_round(model, HeadDrafter(model), [one])
    (plain,) = decode.generate(model, [PROMPT], 2000, HeadDrafter(model), sampling=Sampling(0.8), depth=0, seed=5)
    assert one.tokens == plain.tokens[: len(one.tokens)]
