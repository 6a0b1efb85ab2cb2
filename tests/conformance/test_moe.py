"""Every promise again on mixtures of experts: which experts a row goes to must not depend on its neighbours either."""

import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import pytest
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from mlx_mtp_backend import cache
from mlx_mtp_backend.api import LoadOptions, Replay, Rule, Sampling
from mlx_mtp_backend.decode.depth import DepthController
from mlx_mtp_backend.families import moe, qwen3_5_load
from mlx_mtp_backend.families.base import Model, Segment
from mlx_mtp_backend.families.layouts import Spelling
from mlx_mtp_backend.families.moe import moe_rows
from mlx_mtp_backend.language.text import load_text
from mlx_mtp_backend.load import numerics, wiring
from mlx_mtp_backend.synthetic import Recipe, write
from tests.conformance import decode, laws, test_batching, test_family, test_law_end_to_end, test_replay, test_rollback
from tests.conformance.head_equations import MOE_CONFUSIONS
from tests.conformance.planting import planted

EXPERTS = 8
# Of the prompts in test_replay, those that do not cross a growth step of the KV buffers: what is tried there in full.
FEW = 3


@pytest.fixture(scope="module", params=["fp32", "4 bits"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def path(kind: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue({"fp32": "experts", "4 bits": "quantised_experts"}[kind])


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return decode.load(path)


# --------------------------------------------------------------------------------------------------------------------
# Family


@pytest.mark.parametrize(
    "recipe",
    [
        *(Recipe(experts=EXPERTS, spelling=spelling) for spelling in Spelling),
        Recipe(experts=EXPERTS, wrapper=False, head="side", spelling=Spelling.EACH),
        Recipe(experts=EXPERTS, head="folder", spelling=Spelling.STACKED, tied=True),
        Recipe(experts=5, top_k=5),
        Recipe(experts=3, top_k=1),
    ],
    ids=lambda recipe: f"{recipe.spelling.name.lower()}, {recipe.head}, top {recipe.top_k} of {recipe.experts}",
)
def test_the_head_is_its_equations(tmp_path, recipe, establish):
    worst = test_family.error(write(tmp_path, recipe))
    what = f"experts {recipe.spelling.name.lower()}, {recipe.head}, top {recipe.top_k} of {recipe.experts}"
    establish("family", f"head against NumPy equations, {what}", len(test_family.TOKENS) - 1, f"{worst:.1e}")
    assert worst < test_family.TOLERANCE


@pytest.mark.parametrize("confusion", MOE_CONFUSIONS)
def test_every_confusion_of_the_equations_is_far_off(experts, confusion):
    assert test_family.error(experts, wrong=confusion) > test_family.CLEAR


def test_the_trunk_is_mlx_lms_to_the_bit(path, kind, model, establish):
    stock, _ = mlx_lm.utils.load_model(path)
    stock.set_dtype(mx.float32)
    caches = model.trunk_caches()
    cache.begin(caches)
    tokens = mx.array(test_family.TOKENS, mx.int32)
    ours = model.logits(model.trunk(tokens, [Segment(caches, len(tokens))]).normed)
    theirs = stock(tokens[None])[0]
    establish("family", f"trunk of experts against mlx-lm, {kind}, bit for bit", len(tokens), "0 bits differ")
    assert mx.array_equal(ours.view(mx.uint32), theirs.view(mx.uint32))


def test_bits_may_differ_from_module_to_module(quantised_experts):
    """Routers in 8 bits by 64, the rest in 4 by 32; of the head only the shapes say so."""
    loaded = decode.load(quantised_experts)
    for layer in (loaded.text.model.layers[0], loaded.mtp.layers[0]):
        assert (layer.mlp.gate.bits, layer.mlp.gate.group_size) == (8, 64)
        assert isinstance(layer.mlp.switch_mlp.up_proj, QuantizedSwitchLinear)
        assert (layer.mlp.switch_mlp.up_proj.bits, layer.mlp.switch_mlp.up_proj.group_size) == (4, 32)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    recipe = Recipe(kind="pass-through", acceptance=0.9, layers=2, experts=EXPERTS)
    return write(tmp_path_factory.mktemp("chain"), recipe)


def test_the_wiring_check_passes_a_right_head(chain, establish):
    report = test_family.wired(chain)
    figure = f"{report.acceptance:.2f} ({report.control:.2f})"
    establish("family", "teacher-forced acceptance (control), experts", report.positions, figure)
    assert report.healthy
    assert report.better is None
    assert "experts' gate and up swapped" in report.alternatives


def test_swapped_experts_are_a_known_mistake(experts, tmp_path):
    """A checkpoint with up before gate in its fused tensors: the alternative is what its head should have been."""
    right = decode.load(experts)
    swapped = Path(shutil.copytree(experts, tmp_path / "swapped"))
    file = swapped / "model-00003-of-00003.safetensors"
    name = "mtp.layers.0.mlp.experts.gate_up_proj"
    shared = dict(mx.load(str(file)))
    gate, up = mx.split(shared[name], 2, axis=1)
    mx.save_safetensors(str(file), shared | {name: mx.concatenate([up, gate], axis=1)})
    tokens = list(range(3, 23))
    expected = wiring.teacher_forced(right, tokens)[1]
    found = decode.load(swapped)
    assert not mx.array_equal(wiring.teacher_forced(found, tokens)[1], expected)
    alternative = found.alternatives()["experts' gate and up swapped"]
    assert mx.array_equal(wiring.teacher_forced(alternative, tokens)[1], expected)


RENORMALISED = "scores = scores / scores.sum(axis=-1, keepdims=True)"
GATED = "mx.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)"
FAMILY_BUGS = [
    ("experts' gate and up swapped", "experts.up_proj(x, chosen), experts.gate_proj(x, chosen)",
     "experts.gate_proj(x, chosen), experts.up_proj(x, chosen)"),
    ("fused experts taken up first", "gate, up = fused[", "up, gate = fused["),
    ("experts' weights not renormalised", RENORMALISED, "pass"),
    ("shared expert's gate left out", GATED, "block.shared_expert(x)"),
    ("shared expert left out", "sum(axis=-2) + shared", "sum(axis=-2)"),
    ("experts weighted alike", "(routed * scores[..., None]).sum(axis=-2)", "routed.mean(axis=-2)"),
    ("the worst experts chosen", "[..., -block.top_k :]", "[..., : block.top_k]"),
]  # fmt: skip


@pytest.mark.parametrize(("bug", "old", "new"), FAMILY_BUGS, ids=[bug[0] for bug in FAMILY_BUGS])
def test_a_planted_bug_of_the_family_is_caught(bug, old, new, experts, caught):
    with planted(moe, old, new):
        found = test_family.error(experts)
    assert found > test_family.CLEAR
    caught(bug, f"test_the_head_is_its_equations (experts): {found:.2f} off")


def test_experts_stacked_in_another_order_are_caught(tmp_path, caught):
    path = write(tmp_path, Recipe(experts=EXPERTS, spelling=Spelling.EACH))
    assert test_family.error(path) < test_family.TOLERANCE
    with planted(moe, "for number in range(count)])", "for number in sorted(range(count), reverse=True)])"):
        found = test_family.error(path)
    assert found > test_family.CLEAR
    caught("experts stacked in another order", f"test_the_head_is_its_equations (experts): {found:.2f} off")


# --------------------------------------------------------------------------------------------------------------------
# Rows


def block(model: Model):
    return model.text.model.layers[0].mlp


def rows_of(model: Model, count: int) -> mx.array:
    return mx.random.normal((1, count, model.hidden_size), key=mx.random.key(5))


def test_rows_do_not_depend_on_their_number(model, establish):
    test_rollback.test_rows_do_not_depend_on_their_number(model, lambda *_: None)
    x = rows_of(model, 64)
    single = mx.concatenate([moe_rows(block(model), x[:, i : i + 1], [Segment((), 1)]) for i in range(64)], axis=1)
    for count in (2, 3, 8, 31, 32, 33, 64):
        # All of one sequence, which are sorted by expert from 33 rows on, and of sequences of one row each.
        for segments in ([Segment((), count)], [Segment((), 1)] * count):
            together = moe_rows(block(model), x[:, :count], segments)
            assert mx.array_equal(together.view(mx.uint32), single[:, :count].view(mx.uint32))
    establish("rows", "1 to 64 rows of a mixture of experts against one row at a time", 14, "0 bits differ")


@pytest.mark.parametrize("tie", ["all", "at the border"])
def test_ties_between_experts_fall_the_same_whatever_the_rows(tmp_path, tie, establish):
    """Of experts with one router logit, a row has the same in every pass."""
    model = decode.load(write(tmp_path, Recipe(experts=EXPERTS, top_k=3)))
    router = block(model).gate
    if tie == "all":
        router.weight = mx.zeros_like(router.weight)
    else:
        router.weight = mx.concatenate([router.weight[:2], mx.repeat(router.weight[2:3], EXPERTS - 2, axis=0)])
    x = rows_of(model, 40)
    single = mx.concatenate([moe_rows(block(model), x[:, i : i + 1], [Segment((), 1)]) for i in range(40)], axis=1)
    for count in (2, 8, 11, 40):
        together = moe_rows(block(model), x[:, :count], [Segment((), count)])
        assert mx.array_equal(together.view(mx.uint32), single[:, :count].view(mx.uint32))
    establish("rows", f"tied experts, {tie}, 2 to 40 rows against one at a time", 4, "0 bits differ")


def sorted_passes(model: Model, segments: list[Segment], monkeypatch: pytest.MonkeyPatch) -> set[bool]:
    """Whether products by experts were told that these are sorted."""
    told: set[bool] = set()
    experts = type(block(model).switch_mlp.up_proj)
    real = experts.__call__

    def noted(self, x, indices, sorted_indices=False):
        told.add(sorted_indices)
        return real(self, x, indices, sorted_indices)

    with monkeypatch.context() as patch:
        patch.setattr(experts, "__call__", noted)
        moe_rows(block(model), rows_of(model, sum(s.rows for s in segments)), segments)
    return told


def test_only_prefill_sorts_rows_by_expert(model, monkeypatch):
    """A GPU has other products for sorted rows: a verify pass must not choose by how many neighbours it has."""
    assert sorted_passes(model, [Segment((), 9)] * 8, monkeypatch) == {False}
    assert sorted_passes(model, [Segment((), 72)], monkeypatch) == {True}


def test_the_load_check_says_exact(model):
    replay, evidence = decode.result(numerics.replay_class(model))
    assert replay is Replay.EXACT, evidence


# --------------------------------------------------------------------------------------------------------------------
# Rollback


def test_every_accepted_count_leaves_the_sequential_state(model, kind, establish):
    wrong = test_rollback.wrong_after_verify(model)
    establish("rollback", f"experts, {kind}: all trunk caches, every kept count", 44, f"{len(wrong)} differ")
    assert wrong == []


@pytest.mark.parametrize("acceptance", [0.5, 1.0])
def test_many_rounds_leave_the_plain_state(model, kind, acceptance, establish):
    wrong = test_rollback.wrong_after_rounds(model, acceptance)
    establish(
        "rollback", f"experts, {kind}: caches after 20 tokens, acceptance {acceptance}", 2, f"{len(wrong)} differ"
    )
    assert wrong == []


# --------------------------------------------------------------------------------------------------------------------
# Replay


@pytest.fixture(scope="module")
def references(model):
    return {
        name: test_replay.plain(model, sampling, test_replay.PROMPTS[:FEW])
        for name, sampling in test_replay.SAMPLINGS.items()
    }


def test_the_references_are_not_all_alike(references):
    replies = {tuple(one.tokens[-test_replay.NEW :]) for runs in references.values() for one in runs}
    assert len(replies) == len(test_replay.SAMPLINGS) * FEW


@pytest.mark.parametrize("name", test_replay.SAMPLINGS)
@pytest.mark.parametrize("depth", [0, 2, 4])
def test_the_same_tokens_whatever_the_drafts(model, kind, references, name, depth, establish):
    kinds = [0.5, 1.0, "head"] if depth else ["head"]
    sampling = test_replay.SAMPLINGS[name]
    wrong = [test_replay.wrong_tokens(model, references[name], sampling, depth, drafter) for drafter in kinds]
    what = f"experts, {kind}: temperature {name}, depth {depth}, {len(kinds)} drafters"
    establish("replay", what, len(kinds) * FEW, f"{sum(wrong)} differ")
    assert not any(wrong)


@pytest.mark.parametrize("batch", [3, 8])
@pytest.mark.parametrize("budget", [0, 1 << 30], ids=["cold", "warm"])
def test_joining_and_leaving_changes_no_token(path, model, kind, plain, batch, budget, establish):
    text = load_text(path)
    wrong = [
        test_batching.wrong_replies(model, text, plain, batch, budget, depths)
        for depths in (DepthController(), test_batching.Restless(7))
    ]
    what = (
        f"experts, {kind}: up to {batch} at once come and go, {'warm' if budget else 'cold'} prefix, depth 0, 2, auto"
    )
    establish("replay", what, 48 if budget else 24, f"{sum(wrong)} differ")
    assert not any(wrong)


@pytest.fixture(scope="module")
def plain(path, model):
    return test_batching.alone(model, load_text(path))


def test_half_floats_are_exact_too(quantised_experts, establish):
    """As a model runs whose weights do not fit in fp32."""
    model = decode.result(qwen3_5_load.load(quantised_experts, LoadOptions(), None))
    assert model.text.model.norm.weight.dtype == mx.bfloat16
    assert decode.result(numerics.replay_class(model))[0] is Replay.EXACT
    plain = test_replay.plain(model, Sampling(1.0), test_replay.PROMPTS[:FEW])
    wrong = [test_replay.wrong_tokens(model, plain, Sampling(1.0), 4, drafter) for drafter in (0.5, "head")]
    establish(
        "replay", "experts, 4 bits in bfloat16: temperature 1.0, depth 4, 2 drafters", 2 * FEW, f"{sum(wrong)} differ"
    )
    assert not any(wrong)


REPLAY_BUGS = [
    ("experts of row 0 used for all rows", moe, "mx.argpartition(gates, ",
     "mx.argpartition(mx.broadcast_to(gates[:, :1], gates.shape), "),
    ("weights shared among the rows", moe, RENORMALISED, "scores = scores / scores.sum(axis=(-1, -2), keepdims=True)"),
]  # fmt: skip


@pytest.mark.parametrize(("bug", "module", "old", "new"), REPLAY_BUGS, ids=[bug[0] for bug in REPLAY_BUGS])
def test_a_planted_bug_of_rows_is_caught(bug, module, old, new, experts, caught):
    with planted(module, old, new):
        replay, _ = decode.result(numerics.replay_class(decode.load(experts)))
        broken = decode.load(experts)
        plain = test_replay.plain(broken, Sampling(1.0), test_replay.PROMPTS[:FEW])
        wrong = test_replay.wrong_tokens(broken, plain, Sampling(1.0), 4, 0.5)
    assert replay is Replay.BEST_EFFORT
    assert wrong
    caught(bug, f"test_the_same_tokens_whatever_the_drafts (experts): {wrong} of {FEW} replies differ")


# --------------------------------------------------------------------------------------------------------------------
# Law


@pytest.mark.parametrize("rule", Rule)
def test_two_tokens_follow_their_joint_law(tmp_path, rule, establish):
    path = write(tmp_path, Recipe(layers=2, hidden=32, width=48, seed=1, experts=EXPERTS))
    model, text, name = decode.load(path), load_text(path), "top-k 3"
    law = test_law_end_to_end
    start = law.ready(model, law.SAMPLINGS[name], Rule.COUPLING, 0).tokens
    joint = law.joint_law(model, start, name, text)
    worst = law.worst_deviation(model, text, joint, name, rule, 2, "head")
    establish(
        "law",
        f"two tokens of a mixture of experts, {rule.value}, depth 2, head, {name}",
        law.SEEDS,
        f"{worst:.1f} sigma",
    )
    assert worst < laws.Z_CUT
