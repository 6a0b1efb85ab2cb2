"""Family: the head computes what its equations say, the trunk what mlx-lm computes, and mistakes in wiring show."""

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest

from mlx_mtp_backend import cache
from mlx_mtp_backend.api import LoadOptions, Norm
from mlx_mtp_backend.checkpoint.files import find_tensors
from mlx_mtp_backend.families import layouts, qwen3_5, qwen3_5_load
from mlx_mtp_backend.families.base import Segment
from mlx_mtp_backend.language.text import load_text
from mlx_mtp_backend.load import wiring
from mlx_mtp_backend.models import WiringReport
from mlx_mtp_backend.synthetic import Recipe, write
from tests.conformance import decode
from tests.conformance.head_equations import CONFUSIONS, Head
from tests.conformance.planting import planted

TOKENS = [(83 * i + 29) % 690 for i in range(40)]
# fp32 against float64, relative to the logits' spread; the smallest confusion lies far above.
TOLERANCE = 2e-5
CLEAR = 1e-2


def equations(path: Path, wrong: str | None = None) -> Head:
    """The NumPy head on the checkpoint's own tensors, read by name."""
    files = find_tensors(path)
    read = {file: mx.load(str(path / file)) for file in {t.file for t in (*files.head.values(), *files.trunk.values())}}
    plain = lambda tensor: np.array(read[tensor.file][tensor.name].astype(mx.float32), dtype=np.float64)  # noqa: E731
    weights = {name: plain(tensor) for name, tensor in files.head.items()}
    for name, tensor in files.trunk.items():
        if name.endswith("embed_tokens.weight"):
            weights["embed"] = plain(tensor)
        elif name == "lm_head.weight":
            weights["lm_head"] = plain(tensor)
    weights.setdefault("lm_head", weights["embed"])
    config = json.loads((path / "config.json").read_text())
    return Head(weights, config.get("text_config", config), frozenset([wrong] if wrong else []))


def engine_head(model) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The engine's head over the text, in one pass and again in rounds' fashion; with both hiddens of the trunk."""
    tokens = mx.array(TOKENS, mx.int32)
    trunk = model.trunk_caches()
    cache.begin(trunk)
    unnormed = qwen3_5.Qwen35(model.text, model.mtp, seed_norm=Norm.PRE)
    post = model.trunk(tokens, [Segment(trunk, len(TOKENS))])
    cache.abort(trunk)
    cache.begin(trunk)
    pre = unnormed.trunk(tokens, [Segment(trunk, len(TOKENS))]).carried
    head = model.head_caches()
    parts = []
    for begin, end in ((0, 1), (1, 9), (9, 10), (10, len(TOKENS) - 1)):
        cache.begin(head)
        parts.append(
            model.head(tokens[begin + 1 : end + 1], post.carried[begin:end], [Segment(head, end - begin)]).normed
        )
        cache.commit(head, end - begin)
    return tuple(np.array(a, dtype=np.float64) for a in (model.logits(mx.concatenate(parts)), post.normed, pre))


def error(path: Path, model=None, wrong: str | None = None) -> float:
    """Largest difference between engine and equations, relative to the spread of the logits."""
    logits, post, pre = engine_head(model or decode.load(path))
    expected = equations(path, wrong)(np.array(TOKENS), post, pre)
    return float(np.abs(logits - expected).max() / expected.std())


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(wrapper=False),
        Recipe(head="side"),
        Recipe(head="folder"),
        Recipe(tied=True),
        Recipe(interval=4),
    ],
    ids=["wrapper", "text only", "side file", "folder", "tied", "interval 4"],
)
def test_the_head_is_its_equations(tmp_path, recipe, establish):
    worst = error(write(tmp_path, recipe))
    kind = "tied" if recipe.tied else f"{recipe.head}, {'wrapper' if recipe.wrapper else 'text only'}"
    establish("family", f"head against NumPy equations, {kind}", len(TOKENS) - 1, f"{worst:.1e}")
    assert worst < TOLERANCE


@pytest.mark.parametrize("confusion", CONFUSIONS)
def test_every_confusion_of_the_equations_is_far_off(history, history_model, confusion):
    assert error(history, history_model, confusion) > CLEAR


def test_the_trunk_is_mlx_lms_to_the_bit(history, history_model, establish):
    stock, _ = mlx_lm.utils.load_model(history)
    stock.set_dtype(mx.float32)
    trunk = history_model.trunk_caches()
    cache.begin(trunk)
    tokens = mx.array(TOKENS, mx.int32)
    ours = history_model.logits(history_model.trunk(tokens, [Segment(trunk, len(TOKENS))]).normed)
    theirs = stock(tokens[None])[0]
    establish("family", "trunk against mlx-lm, bit for bit", len(TOKENS), "0 bits differ")
    assert mx.array_equal(ours.view(mx.uint32), theirs.view(mx.uint32))


def test_the_original_head_beside_a_quantised_trunk(history, tmp_path, establish):
    """As a user has it: an mlx-lm conversion that dropped the head, and the original's shards."""
    model, config = mlx_lm.utils.load_model(history)
    model, config = mlx_lm.utils.quantize_model(model, config, group_size=32, bits=4)
    converted = tmp_path / "converted"
    mlx_lm.utils.save_model(converted, model)
    mlx_lm.utils.save_config(config, converted / "config.json")
    loaded = decode.result(qwen3_5_load.load(converted, LoadOptions(head_path=history), mx.float32))
    assert loaded.has_head
    assert loaded.text.model.layers[0].mlp.gate_proj.bits == 4
    caches = loaded.trunk_caches()
    cache.begin(caches)
    hidden = loaded.trunk(mx.array(TOKENS, mx.int32), [Segment(caches, len(TOKENS))])
    reference = decode.load(history)
    mine, theirs = (m.mtp.parameters()["fc"]["weight"] for m in (loaded, reference))
    assert mx.array_equal(mine, theirs)
    assert mx.array_equal(loaded.mtp.norm.weight, reference.mtp.norm.weight)
    assert bool(mx.all(mx.isfinite(loaded.logits(hidden.normed))))
    establish("family", "original's head beside a 4-bit mlx-lm trunk", 1, "head's weights equal")


@pytest.mark.parametrize("shifted", [False, True])
def test_norms_are_shifted_once(tmp_path, history, history_model, shifted):
    """A converted head has its 1 already; the names and the metadata say nothing, the values do."""
    trunk = write(tmp_path / "trunk", Recipe(head="none"))
    head = {t.name: mx.load(str(history / t.file))[t.name] for t in find_tensors(history).head.values()}
    if shifted:
        head = {name: value + 1 if value.ndim == 1 else value for name, value in head.items()}
    mx.save_safetensors(str(trunk / "mtp.safetensors"), head)
    loaded = decode.load(trunk)
    assert mx.allclose(loaded.mtp.norm.weight, history_model.mtp.norm.weight, atol=0.01)


FUSED = "[embedded, self.mtp.pre_fc_norm_hidden(carried)]"
REVERSED = "[self.mtp.pre_fc_norm_hidden(carried), embedded]"
ENDING = "_hidden(x, self.mtp.norm(x), "
EMBEDDED = "self.mtp.pre_fc_norm_embedding(self.text.model.embed_tokens(tokens))"
BUGS = [
    ("concatenation reversed", qwen3_5, FUSED, REVERSED),
    ("pre-norm hidden as seed", qwen3_5, "normed if carried is Norm.POST else before", "before"),
    ("head's norms not shifted", qwen3_5_load, "if stored_zero_centred(weights):", "if False:"),
    ("embedding norm left out", qwen3_5, EMBEDDED, "self.text.model.embed_tokens(tokens)"),
    ("head's final norm left out", qwen3_5, ENDING, "_hidden(x, x, "),
    ("trunk's final norm for the head's", qwen3_5, ENDING, "_hidden(x, self.text.model.norm(x), "),
    ("output gate left out", qwen3_5, "attended * mx.sigmoid(gate.reshape(1, rows, -1))", "attended"),
    ("query norm left out", qwen3_5, "layer.q_norm(queries).transpose", "queries.transpose"),
    ("positions not advanced", qwen3_5, "queries[:, :, part], offset=cache.offset", "queries[:, :, part], offset=0"),
    ("rows of a pass not causal", qwen3_5, '"causal" if own.shape[2] > 1 else None', "None"),
]


@pytest.mark.parametrize(("bug", "module", "old", "new"), BUGS, ids=[bug[0] for bug in BUGS])
def test_a_planted_bug_is_caught(bug, module, old, new, history, caught):
    with planted(module, old, new):
        found = error(history)
    assert found > CLEAR
    caught(bug, f"test_the_head_is_its_equations: {found:.2f} off")


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return write(tmp_path_factory.mktemp("chain"), Recipe(kind="pass-through", acceptance=0.9, layers=2))


def wired(path: Path) -> WiringReport:
    """The check that runs at load: acceptance alone, no equations."""
    return decode.result(wiring.check(decode.load(path), load_text(path).encode(wiring.TEXT)))


def test_the_wiring_check_passes_a_right_head(chain, establish):
    report = wired(chain)
    figure = f"{report.acceptance:.2f} ({report.control:.2f})"
    establish("family", "teacher-forced acceptance (control)", report.positions, figure)
    assert report.healthy
    assert report.better is None


def test_the_wiring_check_fails_a_random_head(history):
    assert not wired(history).healthy


@pytest.mark.parametrize(
    ("bug", "module", "old", "new", "better"),
    [
        ("concatenation reversed", qwen3_5, FUSED, REVERSED, "hidden before embedding"),
        ("head's norms not shifted", qwen3_5_load, "if stored_zero_centred(weights):", "if False:", "norms one higher"),
    ],
)
def test_the_wiring_check_names_what_would_do_better(chain, bug, module, old, new, better, caught):
    with planted(module, old, new):
        report = wired(chain)
    assert report.better == better
    assert not report.healthy
    caught(bug, f"wiring check at load: {report.summary()}")


def test_the_layout_lists_fifteen_tensors(history):
    config = json.loads((history / "config.json").read_text())["text_config"]
    assert len(layouts.qwen3_5_head(config)) == 15
