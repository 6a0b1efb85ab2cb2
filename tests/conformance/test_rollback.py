"""Rollback: after any verify pass and any number of accepted rows, every cache is as if the others never came.

On a model whose logits depend on all of history, bit for bit.
"""

import mlx.core as mx
import pytest

from mlx_mtp_backend import cache
from mlx_mtp_backend.api import Sampling
from mlx_mtp_backend.cache import delta, kv
from mlx_mtp_backend.decode import rounds
from mlx_mtp_backend.decode.drafters import HeadDrafter
from mlx_mtp_backend.families.base import Segment
from mlx_mtp_backend.host import evaluate
from tests.conformance import decode
from tests.conformance.planting import planted

PREFIX = [(37 * i + 5) % 700 for i in range(21)]
ROWS = [(91 * i + 17) % 700 for i in range(8)]


def run(model, caches, tokens, keep):
    """One pass as a transaction; its logits."""
    cache.begin(caches)
    hidden = model.trunk(mx.array(tokens, mx.int32), [Segment(caches, len(tokens))])
    logits = model.logits(hidden.normed)
    cache.commit(caches, keep)
    return logits


def sequential(model, rows):
    caches = model.trunk_caches()
    run(model, caches, PREFIX, len(PREFIX))
    logits = [run(model, caches, [token], 1) for token in rows]
    return caches, logits


def wrong_after_verify(model) -> list[str]:
    """Every (rows, kept) whose caches differ from plain decoding's, with the caches that do."""
    plain = [decode.contents(sequential(model, ROWS[:kept])[0]) for kept in range(len(ROWS) + 1)]
    wrong = []
    for rows in range(1, len(ROWS) + 1):
        for kept in range(rows + 1):
            caches = model.trunk_caches()
            run(model, caches, PREFIX, len(PREFIX))
            run(model, caches, ROWS[:rows], kept)
            wrong += [f"{rows} rows, {kept} kept: {n}" for n in decode.differing(decode.contents(caches), plain[kept])]
    return wrong


def test_rows_do_not_depend_on_their_number(history_model, establish):
    """Logits of the whole step, 1 to 8 rows in a pass, against one row at a time."""
    _, single = sequential(history_model, ROWS)
    for rows in range(1, len(ROWS) + 1):
        caches = history_model.trunk_caches()
        run(history_model, caches, PREFIX, len(PREFIX))
        together = run(history_model, caches, ROWS[:rows], rows)
        assert mx.array_equal(together.view(mx.uint32), mx.concatenate(single[:rows]).view(mx.uint32))
    establish("rows", "logits of 1-8 rows against one row at a time", len(ROWS), "0 bits differ")


def test_every_accepted_count_leaves_the_sequential_state(history_model, establish):
    wrong = wrong_after_verify(history_model)
    cases = sum(rows + 1 for rows in range(1, len(ROWS) + 1))
    establish("rollback", "all trunk caches after a verify pass, every kept count", cases, f"{len(wrong)} differ")
    assert wrong == []


def wrong_after_rounds(model, acceptance: float, depth: int = 4, new: int = 20) -> list[str]:
    """Caches of trunk and head after many rounds against those that plain decoding and one clean head pass leave."""
    prompts = [PREFIX, PREFIX * 12 + [3]]  # the second crosses a growth step of the KV buffers
    settings = {"sampling": Sampling(0.8), "seed": 3}
    plain = decode.generate(model, prompts, new, HeadDrafter(model), depth=0, **settings)
    drafter = decode.scripted(model, plain, acceptance, head=True)
    drafted = decode.generate(model, prompts, new, drafter, depth=depth, **settings)
    wrong = []
    for one, reference in zip(drafted, plain, strict=True):
        wrong += ["tokens"] if one.tokens != reference.tokens else []
        wrong += [f"trunk {n}" for n in decode.differing(decode.contents(one.trunk), decode.contents(reference.trunk))]
        ran = len(one.tokens) - 1 - one.pending_rows
        held = decode.contents(one.head)
        if int(held["0.offset"]) != ran:
            wrong += ["head 0.offset"]
        else:
            wrong += [f"head {name}" for name in decode.differing(held, clean_head(model, one.tokens, ran))]
    return wrong


def clean_head(model, tokens, count):
    """The head's cache after one clean pass over the first `count` slots, with true trunk hiddens."""
    trunk, head = model.trunk_caches(), model.head_caches()
    cache.begin(head)
    for begin in range(0, count, decode.CHUNK):
        end = min(count, begin + decode.CHUNK)
        cache.begin(trunk)
        hidden = model.trunk(mx.array(tokens[begin:end]), [Segment(trunk, end - begin)]).carried
        cache.commit(trunk, end - begin)
        model.head(mx.array(tokens[begin + 1 : end + 1]), hidden, [Segment(head, end - begin)])
    return decode.contents(head)


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.9, 1.0])
def test_many_rounds_leave_the_plain_state(history_model, acceptance, establish):
    wrong = wrong_after_rounds(history_model, acceptance)
    establish("rollback", f"trunk and head caches after 20 tokens, acceptance {acceptance}", 2, f"{len(wrong)} differ")
    assert wrong == []


def test_a_round_that_fails_to_build_leaves_every_sequence_as_it_was(history_model, establish):
    one, two = decode.generate(
        history_model, [PREFIX, PREFIX[:9]], 6, HeadDrafter(history_model), sampling=Sampling(0.8), depth=3
    )
    one.limit = two.limit = 100
    before = [(decode.contents(s.caches), list(s.tokens), s.rounds, s.pending_rows) for s in (one, two)]
    calls = []

    class Failing:
        """The real model, whose output pass number `fails_at` raises."""

        fails_at = 0

        def __getattr__(self, name):
            return getattr(history_model, name)

        def logits(self, normed):
            calls.append(1)
            if len(calls) == self.fails_at:
                raise ValueError("planted")
            return history_model.logits(normed)

    failing = Failing()
    for stage in (1, 2, 3, 4):  # three drafts, then the verify pass
        calls.clear()
        failing.fails_at = stage
        with pytest.raises(ValueError, match="planted"):
            rounds.run_round(failing, HeadDrafter(failing), [one, two])
        after = [(decode.contents(s.caches), list(s.tokens), s.rounds, s.pending_rows) for s in (one, two)]
        for was, now in zip(before, after, strict=True):
            assert was[1:] == now[1:]
            assert decode.differing(was[0], now[0]) == []
    establish("rollback", "a round that raises at any of its output passes changes nothing", 4, "0 differ")


def test_a_kv_buffer_is_written_in_place():
    """A second reference to the buffer would cost a copy of it each round."""
    held = kv.KVCache()
    rows = mx.ones((1, 2, 1, 64))
    held.begin()
    held.append(mx.ones((1, 2, 5000, 64)), mx.ones((1, 2, 5000, 64)))
    evaluate(held.arrays)
    size = held.arrays[0].nbytes
    mx.reset_peak_memory()
    start = mx.get_active_memory()
    for _ in range(5):
        held.begin()
        keys, values = held.append(rows, rows)
        evaluate([mx.sum(keys), mx.sum(values)])
        del keys, values
        held.commit(1)
    assert mx.get_peak_memory() - start < size // 2


BUGS = [
    ("KV cache not rolled back", kv, "self.offset = self._mark + keep", "pass"),
    ("KV cache keeps one row too few", kv, "self._mark + keep", "self._mark + max(keep - 1, 1)"),
    (
        "KV growth loses the last row",
        kv,
        ":used, :], room]",
        ":used, :] * (mx.arange(used) + 1 < used)[:, None], room]",
    ),
    (
        "GDN state not rolled back",
        delta,
        "self.state = self._replay(tuple(rows[:, :keep] for rows in tape.recurrence), self._mark[1])",
        "pass",
    ),
    ("GDN replay from the new state", delta, "tape.recurrence), self._mark[1])", "tape.recurrence), self.state)"),
    ("GDN replay of one row too many", delta, "rows[:, :keep]", "rows[:, : keep + 1]"),
    ("conv window not rolled back", delta, "self.conv = tape.conv_input[:, keep : keep + self._window]", "pass"),
    ("conv window one row late", delta, "keep : keep + self._window", "keep + 1 : keep + 1 + self._window"),
    ("head cache not rolled back", rounds, "cache.commit(sequence.head, sequence.pending_rows)", "pass"),
    (
        "head keeps a row computed from its own output",
        rounds,
        "cache.commit(sequence.head, sequence.pending_rows)",
        "cache.commit(sequence.head, sequence.pending_rows + (len(drafts) > 1))",
    ),
    (
        "head fed the hiddens of rejected rows",
        rounds,
        "built.hidden.carried[part][: len(tokens)]",
        "built.hidden.carried[part][-len(tokens) :]",
    ),
    ("trunk keeps all verified rows", rounds, "sequence.trunk, len(tokens))", "sequence.trunk, 1 + len(drafts))"),
]


@pytest.mark.parametrize(("bug", "module", "old", "new"), BUGS, ids=[bug[0] for bug in BUGS])
def test_a_planted_bug_is_caught(bug, module, old, new, history, caught):
    with planted(module, old, new):
        wrong = wrong_after_rounds(decode.load(history), 0.5, new=12)
    assert wrong
    found = sorted({short(name) for name in wrong})
    caught(bug, f"test_many_rounds_leave_the_plain_state: {', '.join(found[:3])}")


def short(name: str) -> str:
    """'trunk 3.keys' as 'trunk keys'."""
    place, _, kind = name.partition(" ")
    return f"{place} {kind.rpartition('.')[2]}".strip()
