"""The prefix cache: what it finds, that nothing changes but the time, and that it keeps its budget."""

import pytest

from mlx_mtp_backend.api import Rule, Sampling
from mlx_mtp_backend.decode import prefix, rounds
from mlx_mtp_backend.decode.drafters import HeadDrafter
from mlx_mtp_backend.decode.prefix import RUNG, PrefixStore
from tests.conformance import decode
from tests.conformance.decode import CHUNK
from tests.conformance.planting import planted

PLENTY = 1 << 30
NEW = 12


@pytest.fixture(scope="module")
def model(history):
    return decode.load(history)


def prompt(length: int, salt: int = 0) -> list[int]:
    return [(41 * i + 7 + 13 * salt) % 690 for i in range(length)]


def run(model, store: PrefixStore, tokens: list[int], *, depth: int = 2, boundaries=(), name: str = "m"):
    """A whole reply, as the worker makes one."""
    one = decode.start(model, tokens, NEW, sampling=Sampling(0.9), seed=5, rule=Rule.COUPLING, depth=depth)
    one.boundaries = boundaries
    store.adopt(name, one, CHUNK)
    while one.prefilling:
        rounds.prefill_chunk(model, one, CHUNK)
        if store.wants(one, CHUNK):
            store.keep(name, one, CHUNK)
    decode.finish(model, HeadDrafter(model), [one])
    return one


def same(warm, cold) -> bool:
    """Tokens, and every bit of every cache."""
    return warm.tokens == cold.tokens and not decode.differing(
        decode.contents(warm.caches), decode.contents(cold.caches)
    )


def test_the_next_turn_starts_behind_the_last_whole_chunk(model):
    store = PrefixStore(PLENTY)
    first = run(model, store, prompt(5 * CHUNK + 3))
    turn = [*first.tokens, *prompt(CHUNK + 5, salt=1)]
    warm, cold = run(model, store, turn), run(model, PrefixStore(PLENTY), turn)
    assert (first.cached, warm.cached, cold.cached) == (0, 5 * CHUNK, 0)
    assert same(warm, cold)


@pytest.mark.parametrize("depth", [0, 2])
def test_the_same_prompt_again(model, depth):
    """One token at least is left to run: a prompt of whole chunks starts earlier, at a state kept on the way."""
    for length, cached in ((3 * CHUNK + 1, 3 * CHUNK), (RUNG * CHUNK + CHUNK, RUNG * CHUNK)):
        store = PrefixStore(PLENTY)
        cold = run(model, store, prompt(length), depth=depth)
        warm = run(model, store, prompt(length), depth=depth)
        assert warm.cached == cached
        assert same(warm, cold)


def test_the_first_draft_is_warm(model):
    """The head's cache and the hidden it has still to run are part of the prefix."""
    store = PrefixStore(PLENTY)
    runs = [run(model, store, prompt(4 * CHUNK + 2)) for _ in range(2)]
    assert runs[1].cached
    assert runs[0].accepted == runs[1].accepted
    assert runs[0].drafted == runs[1].drafted


def test_boundaries_that_a_request_names_are_kept(model):
    """A shared system message, then prompts that differ."""
    system = prompt(3 * CHUNK + 5)
    store = PrefixStore(PLENTY)
    run(model, store, system + prompt(2 * CHUNK, salt=1), boundaries=(len(system),))
    tokens = system + prompt(2 * CHUNK, salt=2)
    warm = run(model, store, tokens)
    assert warm.cached == 3 * CHUNK
    assert same(warm, run(model, PrefixStore(PLENTY), tokens))
    other = PrefixStore(PLENTY)
    run(model, other, system + prompt(2 * CHUNK, salt=1))
    assert run(model, other, tokens).cached == 0


def test_only_exact_tokens_of_the_same_model_count(model):
    store = PrefixStore(PLENTY)
    tokens = prompt(4 * CHUNK + 1)
    run(model, store, tokens)
    changed = [*tokens]
    changed[2] += 1
    assert run(model, store, changed).cached == 0
    assert run(model, store, tokens, name="other").cached == 0
    assert run(model, store, tokens, depth=0).cached == 0  # a prefix without the head's part is another one
    store.forget("m")
    assert run(model, store, tokens).cached == 0
    assert store.statistics.hits == 0


def test_the_budget_is_kept_and_the_oldest_go(model):
    one = PrefixStore(PLENTY)
    run(model, one, prompt(4 * CHUNK + 1))
    size = one.statistics.bytes
    store = PrefixStore(int(2.5 * size))
    for salt in range(4):
        run(model, store, prompt(4 * CHUNK + 1, salt))
        assert 0 < store.statistics.bytes <= 2.5 * size
    assert store.statistics.evictions > 0
    assert run(model, store, prompt(4 * CHUNK + 1, 3)).cached == 4 * CHUNK
    assert run(model, store, prompt(4 * CHUNK + 1, 0)).cached == 0
    store.forget("m")
    assert store.statistics.bytes == 0


def test_states_on_the_way_go_before_the_chunks_of_the_newest_prompt(model):
    whole = PrefixStore(PLENTY)
    tokens = prompt(2 * RUNG * CHUNK + 1)
    run(model, whole, tokens)
    store = PrefixStore(whole.statistics.bytes - 1)
    run(model, store, tokens)
    assert run(model, store, tokens).cached == 2 * RUNG * CHUNK
    assert store.statistics.evictions == 1


def test_a_budget_of_nothing_keeps_nothing(model):
    store = PrefixStore(0)
    assert [run(model, store, prompt(3 * CHUNK + 1)).cached for _ in range(2)] == [0, 0]
    assert store.statistics.bytes == 0


BUGS = [
    ("head's rows one slot off", "cache.rows(max(start - 1, 0), end - 1)", "cache.rows(start, end)"),
    ("hidden of the head left out", "[] if state.pending is None else [state.pending]", "[state.pending * 0]"),
    ("state of another boundary", "cache.restore([step.rows[place] for step in path], state.snapshots[place])",
     "cache.restore([step.rows[place] for step in path], found.path[0].state.snapshots[place])"),
]  # fmt: skip


@pytest.mark.parametrize(("bug", "old", "new"), BUGS, ids=[bug[0] for bug in BUGS])
def test_a_planted_bug_is_caught(model, bug, old, new):
    tokens = prompt(4 * CHUNK + 1)
    with planted(prefix, old, new):
        store = prefix.PrefixStore(PLENTY)
        cold = run(model, store, tokens, boundaries=(CHUNK,))
        try:
            caught = not same(run(model, store, tokens), cold)
        except (RuntimeError, ValueError, AttributeError):
            caught = True
    assert caught


def test_a_copy_that_fails_leaves_nothing(model, monkeypatch):
    """Rows that were never computed must not be found by the next prompt."""
    store, tokens = PrefixStore(PLENTY), prompt(4 * CHUNK + 1)

    def fails(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(prefix.mx, "eval", fails)
        with pytest.raises(RuntimeError):
            one = decode.start(model, tokens, NEW, sampling=Sampling(0.9), seed=5, rule=Rule.COUPLING, depth=2)
            one.prefilled = 2 * CHUNK
            store.keep("m", one, CHUNK)
    assert store.statistics.bytes == 0
    cold = run(model, store, tokens)
    assert (cold.cached, run(model, store, tokens).cached) == (0, 4 * CHUNK)
