"""Replay where requests come and go: in one batch or many, at any depth, from a cold or a warm prefix cache."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlx_mtp_backend.api import Rule, Sampling
from mlx_mtp_backend.decode import pacing, prefix, rounds, sequence
from mlx_mtp_backend.decode.depth import DepthController
from mlx_mtp_backend.decode.drafters import HeadDrafter
from mlx_mtp_backend.decode.pacing import paced_round
from mlx_mtp_backend.decode.prefix import PrefixStore
from mlx_mtp_backend.decode.sequence import Sequence
from mlx_mtp_backend.families.base import Model
from mlx_mtp_backend.language.text import ModelText, load_text
from tests.conformance import decode
from tests.conformance.decode import CHUNK
from tests.conformance.planting import planted
from tests.conformance.test_replay import EVERYTHING, FORMATS, everything

# The last has every logits processor on, in a response format.
SAMPLINGS = [Sampling(0.0), Sampling(0.6, top_k=20, top_p=0.95), Sampling(1.0, min_p=0.02), EVERYTHING]
NEW = 10


class Restless(DepthController):
    """Another depth every round, so that every change of depth is tried."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)

    def choose(self, streams, others=0, other_rows=0, missed=0, left=math.inf):
        return self._random.choice((0, 0, 1, 2, 4))


@dataclass(frozen=True)
class Request:
    """`depth` None: chosen round by round."""

    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int
    depth: int | None

    def processing(self, text: ModelText) -> decode.Processing:
        return everything(text, FORMATS["expression"]) if self.sampling is EVERYTHING else lambda _: None


def requests() -> list[Request]:
    """Twelve that share beginnings of several chunks, among them one whose prompt comes twice."""
    shared = [tuple((41 * i + 7 * n) % 690 for i in range(3 * CHUNK + 5)) for n in range(2)]
    made = []
    for number in range(12):
        tail = tuple((17 * i + 31 * (number % 11)) % 690 for i in range(3 + 7 * (number % 4)))
        made.append(
            Request(shared[number % 2] + tail, SAMPLINGS[number % 4], number % 11, (0, 2, None)[number // 2 % 3])
        )
    return made


@pytest.fixture(scope="module")
def text(history: Path) -> ModelText:
    loaded = load_text(history)
    assert loaded is not None
    return loaded


def alone(model: Model, text: ModelText) -> list[list[int]]:
    """The tokens of each by itself, without drafts or cache."""
    replies = []
    for one in requests():
        settings = {"sampling": one.sampling, "depth": 0, "seed": one.seed, "processing": one.processing(text)}
        (done,) = decode.generate(model, [one.prompt], NEW, HeadDrafter(model), **settings)
        replies.append(done.tokens)
    return replies


@pytest.fixture(scope="module")
def plain(history_model: Model, text: ModelText) -> list[list[int]]:
    return alone(history_model, text)


def crowd(
    model: Model, text: ModelText, batch: int, store: PrefixStore, depths: DepthController, seed: int
) -> dict[int, list[int]]:
    """Serve all requests, at most `batch` at a time, prefill between rounds; some leave early.

    Returns:
        tokens by request; those that left early have fewer.
    """
    chance, drafter = random.Random(seed), HeadDrafter(model)
    waiting = list(enumerate(requests()))
    chance.shuffle(waiting)
    running: dict[int, Sequence] = {}
    done: dict[int, list[int]] = {}
    while waiting or running:
        if waiting and len(running) < batch and chance.random() < 0.7:
            number, asked = waiting.pop()
            running[number] = start(model, text, asked, store, depths)
        prefilling = [one for one in running.values() if one.prefilling]
        if prefilling:
            rounds.prefill_chunk(model, prefilling[0], CHUNK)
            if store.wants(prefilling[0], CHUNK):
                store.keep("m", prefilling[0], CHUNK)
        decoding = [number for number, one in running.items() if not one.prefilling]
        chance.shuffle(decoding)
        if decoding:
            paced_round(model, drafter, depths, [running[number] for number in decoding])
        for number, one in list(running.items()):
            left = not one.prefilling and chance.random() < 0.01
            if left or len(one.tokens) >= one.limit:
                done[number] = running.pop(number).tokens
    return done


def start(model: Model, text: ModelText, asked: Request, store: PrefixStore, depths: DepthController) -> Sequence:
    one = sequence.start(
        model,
        asked.prompt,
        sampling=asked.sampling,
        seed=asked.seed,
        rule=Rule.COUPLING,
        depth=asked.depth or 0,
        limit=len(asked.prompt) + NEW,
        acceptance=depths.sequence() if asked.depth is None else None,
    )
    one.processors = asked.processing(text)(asked.prompt)
    store.adopt("m", one, CHUNK)
    return one


def wrong_replies(
    model: Model, text: ModelText, plain: list[list[int]], batch: int, budget: int, depths: DepthController
) -> int:
    """How many replies are no beginning of their plain ones: of one crowd, or of two that share a prefix cache."""
    store, wrong = PrefixStore(budget), 0
    for seed in range(2 if budget else 1):
        for number, tokens in crowd(model, text, batch, store, depths, seed).items():
            wrong += tokens != plain[number][: len(tokens)]
    if budget:
        assert store.statistics.hits > 6
    return wrong


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("budget", [0, 1 << 30], ids=["cold", "warm"])
@pytest.mark.parametrize("controller", [DepthController, lambda: Restless(7)], ids=["paced", "restless"])
def test_joining_and_leaving_changes_no_token(
    history_model: Model,
    text: ModelText,
    plain: list[list[int]],
    batch: int,
    budget: int,
    controller: Callable[[], DepthController],
    establish,
    request: pytest.FixtureRequest,
):
    wrong = wrong_replies(history_model, text, plain, batch, budget, controller())
    kind = "-".join(request.node.callspec.id.split("-")[:2])
    establish("replay", f"up to {batch} at once, requests come and go, {kind}", 24 if budget else 12, f"{wrong} differ")
    assert wrong == 0


BUGS = [
    ("prefix of other tokens taken", prefix, "node.children.get(tuple(prompt[start : start + chunk]))",
     "next(iter(node.children.values()), None)"),
    ("recurrent state not taken from the cache", prefix,
     "cache.restore([step.rows[place] for step in path], state.snapshots[place])",
     "cache.restore([step.rows[place] for step in path], ())"),
    ("the last chunk's rows alone taken from the cache", prefix,
     "cache.restore([step.rows[place] for step in path], state.snapshots[place])",
     "cache.restore([step.rows[place] for step in path[-1:]], state.snapshots[place])"),
]  # fmt: skip


@pytest.mark.parametrize(("bug", "module", "old", "new"), BUGS, ids=[bug[0] for bug in BUGS])
def test_a_planted_bug_is_caught(history_model: Model, text: ModelText, plain, bug, module, old, new, caught):
    with planted(module, old, new):
        try:
            wrong = wrong_replies(history_model, text, plain, 3, 1 << 30, pacing.DepthController())
            what = f"{wrong} of 24 replies differ"
        except (AssertionError, RuntimeError, ValueError, AttributeError, TypeError) as error:
            wrong, what = 1, f"raises {type(error).__name__}"
    assert wrong
    caught(bug, f"test_joining_and_leaving_changes_no_token: {what}")
