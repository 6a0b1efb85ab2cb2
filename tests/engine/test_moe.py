"""Checkpoints of mixtures of experts: what inspection finds, what they take, and what is refused where parts lack."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from support.conversion import convert

from mlx_mtp_backend import (
    Engine,
    EngineError,
    EngineOptions,
    ErrorReason,
    GenerateParams,
    LoadOptions,
    WiringPolicy,
    cache,
)
from mlx_mtp_backend.api import Delta, Finished, Replay, Sampling
from mlx_mtp_backend.checkpoint import Experts, MTPStatus, inspect_checkpoint
from mlx_mtp_backend.checkpoint.files import INDEX
from mlx_mtp_backend.families import qwen3_5_load
from mlx_mtp_backend.families.base import Segment
from mlx_mtp_backend.families.layouts import MAX_EXPERTS, PROJECTIONS, Spelling
from mlx_mtp_backend.synthetic import Recipe, write

EXPERTS, TOP_K = 8, 2
WIDTH, HIDDEN = 32, 64  # of a routed expert
LAYER = "layers.0.mlp."
Tensors = dict[str, mx.array]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("experts"), Recipe(experts=EXPERTS, top_k=TOP_K))


@pytest.fixture(scope="module")
def each(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The head's experts one by one."""
    recipe = Recipe(experts=EXPERTS, top_k=TOP_K, spelling=Spelling.EACH)
    return write(tmp_path_factory.mktemp("each"), recipe)


def edited(original: Path, folder: Path, change: Callable[[Tensors], None] | None = None, **config: object) -> Path:
    """A copy, its tensors (all in one file) and the text part of its configuration changed."""
    shutil.copytree(original, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"] |= config
    (folder / "config.json").write_text(json.dumps(settings))
    if change is not None:
        tensors: Tensors = {}
        for file in sorted(folder.glob("model-*.safetensors")):
            tensors |= mx.load(str(file))
            mx.eval(tensors)
            file.unlink()
        (folder / INDEX).unlink()
        change(tensors)
        mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return folder


def loaded(path: Path, dtype: mx.Dtype | None = mx.float32, options: LoadOptions | None = None):
    """The model on this thread, without an engine."""
    steps = qwen3_5_load.load(path, options or LoadOptions(), dtype)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value


# --------------------------------------------------------------------------------------------------------------------
# What is there


@pytest.mark.parametrize("wrapper", [True, False])
@pytest.mark.parametrize("spelling", Spelling, ids=lambda spelling: spelling.name.lower())
def test_a_head_is_found_in_every_spelling(tmp_path, spelling, wrapper):
    report = inspect_checkpoint(write(tmp_path, Recipe(experts=EXPERTS, spelling=spelling, wrapper=wrapper)))
    assert report.family == "qwen3_5_moe"
    assert (report.mtp.status, report.mtp.missing) == (MTPStatus.PRESENT, ())
    routed = {Spelling.FUSED: 2, Spelling.EACH: 3 * EXPERTS, Spelling.STACKED: 3}[spelling]
    assert len(report.mtp.tensors) == 12 + 5 + routed
    assert report.experts == Experts(EXPERTS, TOP_K)
    assert json.loads(json.dumps(report.to_json()))["experts"] == {"count": EXPERTS, "per_token": TOP_K}


@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "qwen3_5"])
def test_other_names_of_the_family(experts, tmp_path, family):
    """The text-only one, and the dense one in a configuration that counts experts, which mlx-lm takes at its word."""
    path = Path(shutil.copytree(experts, tmp_path / "other"))
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"model_type": family}))
    report = inspect_checkpoint(path)
    assert (report.mtp.status, report.experts) == (MTPStatus.PRESENT, Experts(EXPERTS, TOP_K))
    assert loaded(path).has_head


def test_a_dense_model_has_no_experts(history):
    assert inspect_checkpoint(history).experts is None


def test_a_converted_head_is_found(experts, tmp_path):
    """Stacked and quantised, in a file beside the trunk."""
    report = inspect_checkpoint(convert(experts, tmp_path / "converted"))
    assert (report.mtp.status, report.mtp.place) == (MTPStatus.PRESENT, "side file")
    assert (
        inspect_checkpoint(convert(experts, tmp_path / "bare", head=False)).mtp.status is MTPStatus.DECLARED_BUT_ABSENT
    )


def test_every_expert_counts_as_memory(experts, tmp_path):
    """Not only the two that a token goes to."""
    more = inspect_checkpoint(write(tmp_path, Recipe(experts=2 * EXPERTS, top_k=TOP_K)))
    report, layers = inspect_checkpoint(experts), 4 + 1
    one_expert_and_its_row_of_the_router = 2 * (3 * WIDTH * HIDDEN + HIDDEN)
    assert more.weight_bytes - report.weight_bytes == layers * EXPERTS * one_expert_and_its_row_of_the_router
    vision = 2 * 8 * 3 * 8
    assert loaded(experts).weight_bytes == 2 * (report.weight_bytes - vision)  # fp32 of bfloat16


# --------------------------------------------------------------------------------------------------------------------
# What is not


def without(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def shorter(name: str) -> Callable[[Tensors], None]:
    """An expert fewer, or a row for those that are single."""
    return lambda tensors: tensors.update({name: mx.contiguous(tensors[name][1:])})


PARTS = ["gate.weight", "experts.down_proj", "experts.gate_up_proj", "shared_expert.up_proj.weight"]


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, change) for name in PARTS for change in (without, shorter)] + [("shared_expert_gate.weight", without)],
)
def test_a_head_without_a_part_is_incomplete(experts, tmp_path, name, change):
    path = edited(experts, tmp_path / "m", change(f"mtp.{LAYER}{name}"))
    report = inspect_checkpoint(path)
    assert report.mtp.status is MTPStatus.INCOMPLETE
    assert [problem.partition(" ")[0] for problem in report.mtp.missing] == [LAYER + name]
    assert refusal(path) is ErrorReason.WEIGHTS_MISMATCH


@pytest.mark.parametrize("change", [without, shorter])
def test_a_head_without_one_expert_is_incomplete(each, tmp_path, change):
    name = f"{LAYER}experts.5.up_proj.weight"
    path = edited(each, tmp_path / "m", change(f"mtp.{name}"))
    report = inspect_checkpoint(path)
    assert report.mtp.status is MTPStatus.INCOMPLETE
    assert [problem.partition(" ")[0] for problem in report.mtp.missing] == [name]
    assert refusal(path) is ErrorReason.WEIGHTS_MISMATCH


@pytest.mark.parametrize("count", [EXPERTS - 1, EXPERTS + 1])
@pytest.mark.parametrize("spelling", ["experts", "each"])
def test_another_number_of_experts_than_the_configuration_says(tmp_path, spelling, count, request):
    path = edited(request.getfixturevalue(spelling), tmp_path / "m", num_experts=count)
    assert inspect_checkpoint(path).mtp.status is MTPStatus.INCOMPLETE
    assert refusal(path) is ErrorReason.WEIGHTS_MISMATCH
    with pytest.raises(EngineError) as caught:
        loaded(path)
    assert caught.value.reason is ErrorReason.WEIGHTS_MISMATCH


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("num_experts", value) for value in (0, -1, None, "8", True, 8.0, [8], MAX_EXPERTS + 1, 2**39, 2**70)),
        *(("num_experts_per_tok", value) for value in (0, -1, None, "2", EXPERTS + 1, 2**39)),
        *((key, value) for key in ("moe_intermediate_size", "shared_expert_intermediate_size") for value in (0, None)),
    ],
)
def test_numbers_that_cannot_be_are_refused(experts, tmp_path, key, value):
    path = edited(experts, tmp_path / "m", **{key: value})
    with pytest.raises(EngineError, match=key) as caught:
        inspect_checkpoint(path)
    assert (caught.value.reason, caught.value.field) == (ErrorReason.CHECKPOINT_UNREADABLE, key)
    assert refusal(path) is ErrorReason.CHECKPOINT_UNREADABLE


def test_numbers_are_looked_at_without_a_head_too(tmp_path):
    path = write(tmp_path / "good", Recipe(experts=EXPERTS, head="none"))
    assert refusal(edited(path, tmp_path / "m", num_experts_per_tok=9)) is ErrorReason.CHECKPOINT_UNREADABLE


TRUNK = f"model.language_model.{LAYER}"


def one_by_one(tensors: Tensors) -> None:
    """The trunk's experts, as some conversions have them."""
    for layer in range(4):
        mlp = TRUNK.replace("layers.0", f"layers.{layer}")
        gate, up = mx.split(tensors.pop(f"{mlp}experts.gate_up_proj"), 2, axis=1)
        for name, stack in zip(PROJECTIONS, (gate, up, tensors.pop(f"{mlp}experts.down_proj")), strict=True):
            tensors |= {f"{mlp}experts.{n}.{name}.weight": mx.contiguous(one) for n, one in enumerate(stack)}


def test_a_trunk_with_experts_one_by_one_is_the_same_model(experts, tmp_path):
    """mlx-lm does not read it."""
    same, other = loaded(experts), loaded(edited(experts, tmp_path / "m", one_by_one))
    for layer, twin in zip(same.text.model.layers, other.text.model.layers, strict=True):
        for name in PROJECTIONS:
            assert mx.array_equal(layer.mlp.switch_mlp[name].weight, twin.mlp.switch_mlp[name].weight)


def renamed(old: str, new: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"{TRUNK}{new}": tensors.pop(f"{TRUNK}{old}")})


BROKEN_TRUNKS: dict[str, tuple[list[Callable[[Tensors], None]], str]] = {
    "no fused tensor": ([without(f"{TRUNK}experts.gate_up_proj")], "switch_mlp"),
    "no router": ([without(f"{TRUNK}gate.weight")], r"mlp\.gate\.weight"),
    "an expert fewer": ([shorter(f"{TRUNK}experts.down_proj")], "down_proj"),
    "an odd number of rows": (
        [lambda t: t.update({f"{TRUNK}experts.gate_up_proj": mx.zeros((EXPERTS, 2 * WIDTH - 1, HIDDEN))})],
        r"\[8, 63, 64\]",
    ),
    "a matrix for a stack": (
        [lambda t: t.update({f"{TRUNK}experts.gate_up_proj": mx.zeros((EXPERTS, HIDDEN))})],
        r"\[8, 64\]",
    ),
    "a number for a stack": ([lambda t: t.update({f"{TRUNK}experts.down_proj": mx.array(1.0)})], "down_proj"),
    "one expert missing": ([one_by_one, without(f"{TRUNK}experts.5.up_proj.weight")], "lacks expert 5 of 8"),
    "one expert too many": (
        [one_by_one, lambda t: t.update({f"{TRUNK}experts.8.up_proj.weight": mx.zeros((WIDTH, HIDDEN))})],
        "has expert 8",
    ),
    "an expert of another shape": ([one_by_one, shorter(f"{TRUNK}experts.5.up_proj.weight")], "of shapes"),
    "an expert by an odd name": (
        [one_by_one, renamed("experts.5.up_proj.weight", "experts.05.up_proj.weight")],
        "lacks expert 5",
    ),
}


@pytest.mark.parametrize(("changes", "says"), BROKEN_TRUNKS.values(), ids=BROKEN_TRUNKS)
def test_a_trunk_whose_experts_do_not_fit_is_refused(experts, tmp_path, changes, says):
    path = edited(experts, tmp_path / "m", lambda tensors: [change(tensors) for change in changes])
    with pytest.raises(EngineError, match=says) as caught:
        loaded(path)
    assert caught.value.reason is ErrorReason.WEIGHTS_MISMATCH


@pytest.fixture(scope="module")
def converted(experts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(experts, tmp_path_factory.mktemp("converted"))


@pytest.mark.parametrize("part", ["scales", "biases", "weight"])
@pytest.mark.parametrize("change", ["none", "one column", "transposed"])
def test_a_quantised_head_that_does_not_fit_is_refused(converted, tmp_path, part, change):
    path = Path(shutil.copytree(converted, tmp_path / "m"))
    name = f"mtp.{LAYER}switch_mlp.up_proj.{part}"
    head = dict(mx.load(str(path / "mtp.safetensors")))
    if change == "none":
        del head[name]
    else:
        head[name] = mx.contiguous(head[name][..., :1] if change == "one column" else head[name].swapaxes(-1, -2))
    mx.eval(head)
    mx.save_safetensors(str(path / "mtp.safetensors"), head)
    with pytest.raises(EngineError) as caught:
        loaded(path)
    assert caught.value.reason is ErrorReason.WEIGHTS_MISMATCH


def refusal(path: Path) -> ErrorReason:
    """The engine's, which serves on."""
    with Engine(EngineOptions(device="cpu")) as engine:
        with pytest.raises(EngineError) as caught:
            engine.load("m", path).result(timeout=60)
        assert not engine.models()
    return caught.value.reason


# --------------------------------------------------------------------------------------------------------------------
# Through the engine


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its head is always right."""
    recipe = Recipe(kind="pass-through", acceptance=1.0, layers=2, experts=EXPERTS)
    return write(tmp_path_factory.mktemp("chain"), recipe)


@pytest.mark.parametrize("form", ["fp32", "4 bits", "4 bits, the original's head"])
def test_a_long_prompt_and_a_drafted_reply(chain, tmp_path, form):
    """Prefill sorts hundreds of rows by expert; the same tokens with drafts and without, and the head was asked."""
    quantised = form != "fp32"
    path = convert(chain, tmp_path / "m", bits=8, head=form == "4 bits") if quantised else chain
    head = chain if "original" in form else None
    with Engine(EngineOptions(device="cpu")) as engine:
        options = LoadOptions(head_path=head, wiring=WiringPolicy.OFF)
        info = engine.load("m", path, options).result(timeout=120)
        assert info.has_head
        assert info.replay is Replay.EXACT
        replies, end = [], None
        for depth in (0, 3):
            prompt = tuple(3 + i % 400 for i in range(300))
            params = GenerateParams("m", prompt, 24, Sampling(0.6), seed=4, depth=depth, ignore_eos=True)
            events = list(engine.submit(params))
            replies.append([token for event in events if isinstance(event, Delta) for token in event.tokens])
            end = events[-1]
    assert isinstance(end, Finished)
    assert replies[0] == replies[1]
    assert sum(end.statistics.accepted) > 0.9 * sum(end.statistics.drafted) > 0


def test_half_float_experts_on_a_cpu(experts, tmp_path):
    """MLX multiplies by them on a GPU only: a trunk's are refused, a head's few are widened."""
    with pytest.raises(EngineError, match="quantise") as caught:
        loaded(experts, None)
    assert caught.value.reason is ErrorReason.FAMILY_UNSUPPORTED
    model = loaded(convert(experts, tmp_path / "m", head=False), None, LoadOptions(head_path=experts))
    assert model.mtp.layers[0].mlp.switch_mlp.up_proj.weight.dtype == mx.float32
    assert model.mtp.fc.weight.dtype == mx.bfloat16
    caches = model.head_caches()
    cache.begin(caches)
    out = model.head(mx.array([3, 4, 5]), mx.zeros((3, HIDDEN), mx.bfloat16), [Segment(caches, 3)])
    assert out.normed.dtype == mx.bfloat16
    assert bool(mx.all(mx.isfinite(model.logits(out.normed))))
