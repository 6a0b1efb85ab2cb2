"""Qwen3-Next runs as Qwen3.5 MoE with its projections put in another order; held against mlx-lm's class."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import pytest

from mlx_mtp_backend import EngineError, ErrorReason, cache
from mlx_mtp_backend.api import Replay, Sampling
from mlx_mtp_backend.checkpoint import Experts, MTPStatus, inspect_checkpoint
from mlx_mtp_backend.families import qwen3_next
from mlx_mtp_backend.families.base import Model, Segment
from mlx_mtp_backend.load import numerics
from mlx_mtp_backend.synthetic import Recipe
from tests.conformance import decode, test_family, test_replay, test_rollback
from tests.conformance.planting import planted
from tests.support.conversion import convert
from tests.support.qwen3_next import write_next


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    # Four value heads to two key heads, so that the order within a key head's rows matters.
    return write_next(tmp_path_factory.mktemp("next"), Recipe(experts=8, head_dim=32))


@pytest.fixture(scope="module")
def quantised(path, tmp_path_factory) -> Path:
    return convert(path, tmp_path_factory.mktemp("converted") / "m")


@pytest.fixture(scope="module")
def model(path) -> Model:
    return decode.load(path)


def logits_differ(path: Path) -> int:
    """Of the trunk's logits, how many are not mlx-lm's to the bit."""
    stock, _ = mlx_lm.utils.load_model(path)
    assert type(stock).__module__.endswith("qwen3_next")
    stock.set_dtype(mx.float32)
    model = decode.load(path)
    caches = model.trunk_caches()
    cache.begin(caches)
    tokens = mx.array(test_family.TOKENS, mx.int32)
    ours = model.logits(model.trunk(tokens, [Segment(caches, len(tokens))]).normed)
    return int(mx.sum(ours.view(mx.uint32) != stock(tokens[None])[0].view(mx.uint32)))


def test_a_head_is_found_though_the_configuration_has_no_word_of_it(path, quantised):
    report = inspect_checkpoint(path)
    assert (report.mtp.status, report.mtp.declared, report.family) == (MTPStatus.PRESENT, 0, "qwen3_next")
    assert (len(report.mtp.tensors), report.experts) == (12 + 5 + 3 * 8, Experts(8, 2))
    assert inspect_checkpoint(quantised).mtp.status is MTPStatus.PRESENT


@pytest.mark.parametrize("kind", ["path", "quantised"])
def test_the_trunk_is_mlx_lms_to_the_bit(kind, request, establish):
    differ = logits_differ(request.getfixturevalue(kind))
    what = "as released" if kind == "path" else "4 bits"
    establish(
        "family", f"trunk of Qwen3-Next against mlx-lm, {what}", len(test_family.TOKENS), f"{differ} logits differ"
    )
    assert differ == 0


BUGS = [
    ("values and output gates swapped", "q, k, v, z = _parts", "q, k, z, v = _parts"),
    ("a and b swapped", "b, a = _parts", "a, b = _parts"),
    ("projections not by key head", "weight.reshape(heads, sum(rows), -1), ends, axis=1)",
     "weight.reshape(1, -1, weight.shape[1]), [heads * end for end in ends], axis=1)"),
    ("rotary settings of another family", 'if not text.get("rope_parameters"):', "if False:"),
]  # fmt: skip


@pytest.mark.parametrize(("bug", "old", "new"), BUGS, ids=[bug[0] for bug in BUGS])
def test_a_planted_bug_is_caught(bug, old, new, path, caught):
    with planted(qwen3_next, old, new):
        differ = logits_differ(path)
    assert differ
    caught(bug, f"test_the_trunk_is_mlx_lms_to_the_bit (Qwen3-Next): {differ} logits differ")


def test_left_out_weights_of_experts_are_not_renormalised(path, tmp_path):
    """As mlx-lm and the released code take it; Qwen3.5's way round is the other."""
    copy = Path(shutil.copytree(path, tmp_path / "m"))
    config = json.loads((copy / "config.json").read_text())
    del config["norm_topk_prob"]
    (copy / "config.json").write_text(json.dumps(config))
    assert logits_differ(copy) == 0


def test_the_head_is_its_equations(path, tmp_path, establish):
    """Which look for the rotary settings where Qwen3.5 has them."""
    copy = Path(shutil.copytree(path, tmp_path / "m"))
    config = json.loads((copy / "config.json").read_text())
    rope = {key: config[key] for key in ("rope_theta", "partial_rotary_factor")}
    (copy / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    worst = test_family.error(copy, decode.load(path))
    establish("family", "head of Qwen3-Next against NumPy equations", len(test_family.TOKENS) - 1, f"{worst:.1e}")
    assert worst < test_family.TOLERANCE


def test_rows_and_rollback(model, establish):
    assert decode.result(numerics.replay_class(model))[0] is Replay.EXACT
    wrong = test_rollback.wrong_after_verify(model) + test_rollback.wrong_after_rounds(model, 0.5)
    establish("rollback", "Qwen3-Next: all caches, every kept count and after 20 tokens", 46, f"{len(wrong)} differ")
    assert wrong == []


def test_the_same_tokens_whatever_the_drafts(model, establish):
    plain = test_replay.plain(model, Sampling(1.0), test_replay.PROMPTS[:3])
    wrong = [test_replay.wrong_tokens(model, plain, Sampling(1.0), 4, kind) for kind in (0.5, 1.0, "head")]
    establish("replay", "Qwen3-Next: temperature 1.0, depth 4, 3 drafters", 9, f"{sum(wrong)} differ")
    assert not any(wrong)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mlp_only_layers": [1]}, ErrorReason.FAMILY_UNSUPPORTED),
        ({"decoder_sparse_step": 2}, ErrorReason.FAMILY_UNSUPPORTED),
        ({"linear_num_value_heads": 6}, ErrorReason.WEIGHTS_MISMATCH),
        ({"linear_num_key_heads": 0}, ErrorReason.WEIGHTS_MISMATCH),
        ({"rope_scaling": "yes"}, ErrorReason.WEIGHTS_MISMATCH),
    ],
)
def test_what_does_not_fit_is_refused(path, tmp_path, change, reason):
    copy = Path(shutil.copytree(path, tmp_path / "m"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(EngineError) as caught:
        decode.load(copy)
    assert caught.value.reason is reason
