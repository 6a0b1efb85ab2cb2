"""The catalog over real files: names, evidence, and files that cannot be served."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from support.gguf_files import Script, write_mtp_model, write_script_model
from support.storages import FP8_CONFIG, fp8, stored

from mlx_mtp_backend.families.layouts import Spelling
from mlx_mtp_backend.synthetic import Recipe, write
from router.catalog import build_catalog, warn_of
from router.domain import BackendKind, Capability, ErrorReason, HeadFacts, ModelFormat, Offer, RouterError
from router.facts import read_facts
from router.policy import choose_route
from router.settings import ModelSettings, SamplingSettings, Settings

DRIVER = "mlx_mtp_backend.families.qwen3_5_load"
OFFERS = {"llama_cpp": Offer(BackendKind.LLAMA_CPP), "mlx": Offer(BackendKind.MLX)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """small.gguf, and the checkpoints with (head, shards), (side, its own file) and without (bare) a head."""
    folder = tmp_path_factory.mktemp("models")
    write_script_model(folder / "small.gguf", {"a": Script(["b", "c"])})
    for name, head in (("head", "shards"), ("side", "side"), ("bare", "none")):
        write(folder / name, Recipe(head=head, layers=2))
    return folder


def test_pulled_files_are_served_by_their_names(files: Path) -> None:
    settings = Settings(models={"mine": ModelSettings(path=files / "small.gguf", aliases=("default",))})
    catalog = build_catalog(settings, files)
    assert [entry.name for entry in catalog.entries] == ["mine", "small"]
    assert catalog.resolve("default").name == "mine"
    taken = Settings(models={"mine": ModelSettings(path=files / "small.gguf", aliases=("small",))})
    assert [entry.name for entry in build_catalog(taken, files).entries] == ["mine"]


def test_an_unknown_name_lists_the_known_ones(files: Path) -> None:
    with pytest.raises(RouterError, match=r"no model named 'x'.*small") as caught:
        build_catalog(Settings(), files).resolve("x")
    assert caught.value.reason is ErrorReason.MODEL_NOT_FOUND
    with pytest.raises(RouterError, match="pull smollm2"):
        build_catalog(Settings(), files / "empty").resolve("x")


def test_sampling_defaults_of_the_model_win(files: Path) -> None:
    settings = Settings(
        sampling=SamplingSettings(temperature=0.1, top_k=5),
        models={"m": ModelSettings(path=files / "small.gguf", sampling=SamplingSettings(temperature=0.0))},
    )
    merged = build_catalog(settings, files / "empty").resolve("m").sampling
    assert (merged.temperature, merged.top_k, merged.top_p) == (0.0, 5, None)


def test_context_is_the_setting_or_the_models_own_up_to_a_bound(files: Path) -> None:
    entries = {
        name: build_catalog(Settings(models={"m": model}), files / "empty").resolve("m")
        for name, model in {
            "own": ModelSettings(path=files / "small.gguf"),
            "set": ModelSettings(path=files / "small.gguf", context_length=64),
            "too much": ModelSettings(path=files / "small.gguf", context_length=10**6),
        }.items()
    }
    own = entries["own"].facts.context_length
    assert own is not None
    assert entries["own"].context_length == min(own, 8192)
    assert entries["set"].context_length == 64
    assert entries["too much"].context_length == own


@pytest.mark.parametrize(("name", "file"), [("head", "model-"), ("side", "mtp.safetensors")])
def test_a_head_is_shown_by_its_tensors(files: Path, name: str, file: str) -> None:
    facts = read_facts(files / name)
    assert facts.format is ModelFormat.CHECKPOINT
    assert facts.can(Capability.MTP)
    evidence = facts.capabilities[Capability.MTP].evidence
    assert "mtp_num_hidden_layers = 1" in evidence
    assert file in evidence


def test_a_head_is_told_in_its_parts(files: Path, tmp_path: Path) -> None:
    write_mtp_model(tmp_path / "mtp.gguf", {"a": Script(["b", "c"])})
    heads = {
        "shards": read_facts(files / "head").head,
        "side file": read_facts(files / "side").head,
        "removed": read_facts(files / "bare").head,
        "grafted": read_facts(files / "bare", files / "head").head,
        "GGUF": read_facts(tmp_path / "mtp.gguf").head,
        "GGUF without": read_facts(files / "small.gguf").head,
    }
    assert heads == {
        "shards": HeadFacts(1, True, DRIVER, "shards"),
        "side file": HeadFacts(1, True, DRIVER, "side file"),
        "removed": HeadFacts(1, False, DRIVER, ""),
        "grafted": HeadFacts(1, True, DRIVER, "head_path", grafted=True),
        "GGUF": HeadFacts(1, True, "llama.cpp", "file"),
        "GGUF without": HeadFacts(0, False),
    }


def test_a_removed_head_is_declared_but_absent_and_routed_elsewhere(files: Path) -> None:
    facts = read_facts(files / "bare")
    assert not facts.can(Capability.MTP)
    assert "declared but absent" in facts.capabilities[Capability.MTP].evidence
    models = {"m": ModelSettings(path=files / "bare", gguf=files / "small.gguf")}
    route, served = choose_route("m", build_catalog(Settings(models=models), files / "empty").resolve("m"), OFFERS)
    assert route.kind is BackendKind.LLAMA_CPP
    assert "declared but absent" in route.reason
    assert served.path == files / "small.gguf"
    models = {"m": ModelSettings(path=files / "head", gguf=files / "small.gguf")}
    route, _ = choose_route("m", build_catalog(Settings(models=models), files / "empty").resolve("m"), OFFERS)
    assert route.kind is BackendKind.MLX


@pytest.mark.parametrize("wrapper", [True, False])
def test_a_mixture_of_experts_goes_to_the_engine_by_its_heads_tensors(
    files: Path, tmp_path: Path, wrapper: bool
) -> None:
    path = write(tmp_path / "m", Recipe(layers=2, experts=8, wrapper=wrapper))
    models = {"m": ModelSettings(path=path, gguf=files / "small.gguf")}
    entry = build_catalog(Settings(models=models), files / "empty").resolve("m")
    route, served = choose_route("m", entry, OFFERS)
    assert (route.kind, served.path) == (BackendKind.MLX, path)
    facts = entry.facts
    assert (facts.architecture, facts.experts) == ("qwen3_5_moe", (8, 2))
    assert facts.head == HeadFacts(1, True, DRIVER, "shards")
    assert "19 tensors, such as mtp." in facts.capabilities[Capability.MTP].evidence
    # All eight experts of each layer, not the two that a token goes to: in bfloat16, behind headers of some kilobytes.
    files_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert facts.size_bytes is not None
    assert 0 <= files_bytes - facts.size_bytes < 10_000
    memory = entry.memory_bytes(1)
    assert memory is not None
    assert memory > facts.size_bytes


def test_a_mixture_whose_head_lacks_an_expert_is_no_head(files: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "m", Recipe(layers=2, experts=8, spelling=Spelling.EACH))
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["num_experts"] = 9
    (path / "config.json").write_text(json.dumps(config))
    models = {"m": ModelSettings(path=path, gguf=files / "small.gguf")}
    route, _ = choose_route("m", build_catalog(Settings(models=models), files / "empty").resolve("m"), OFFERS)
    assert route.kind is BackendKind.LLAMA_CPP
    assert "layers.0.mlp.gate.weight" in route.reason


def test_a_head_path_without_a_head_is_told_before_anything_is_loaded(files: Path, tmp_path: Path) -> None:
    models = {"m": ModelSettings(path=files / "bare", head_path=tmp_path)}
    entry = build_catalog(Settings(models=models), files / "empty").resolve("m")
    assert f"{tmp_path.name}, its head_path, holds no head for it" in entry.facts.problem
    with pytest.raises(RouterError, match="head_path") as caught:
        choose_route("m", entry, OFFERS)
    assert caught.value.reason is ErrorReason.MODEL_LOAD_FAILED


def test_weights_that_the_engine_does_not_read_are_told_before_anything_is_loaded(files: Path, tmp_path: Path) -> None:
    path = stored(files / "head", tmp_path / "fp8", fp8, FP8_CONFIG)
    models = {
        "alone": ModelSettings(path=path),
        "beside": ModelSettings(path=path, gguf=files / "small.gguf"),
        "head": ModelSettings(path=files / "bare", head_path=stored(files / "head", tmp_path / "o", fp8, head=True)),
    }
    catalog = build_catalog(Settings(models=models), files / "empty")
    assert catalog.resolve("alone").facts.quantization == "fp8"
    with pytest.raises(RouterError, match=r"\.weight \(F8_E4M3\)\); convert the unquantised original with") as caught:
        choose_route("alone", catalog.resolve("alone"), OFFERS)
    assert caught.value.reason is ErrorReason.MODEL_LOAD_FAILED
    assert caught.value.message.endswith("by head_path")  # nothing of the advice is cut off
    route, _ = choose_route("beside", catalog.resolve("beside"), OFFERS)
    assert route.kind is BackendKind.LLAMA_CPP
    assert "stored in a way that the engine does not read" in route.reason
    assert "(stored as F8_E4M3, which is not read)" in catalog.resolve("head").facts.problem


def test_a_head_that_lacks_a_part_is_told_before_anything_is_loaded(files: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(files / "head", tmp_path / "m"))
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 1
    (path / "config.json").write_text(json.dumps(config))
    problem = read_facts(path).problem
    assert "its head cannot be used: mtp_num_hidden_layers = 1, but 3 tensors are absent, misshapen or not" in problem


def test_what_cannot_be_served_and_what_lacks_its_head_are_warned_of(
    files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = {
        "gone": ModelSettings(path=files / "gone.gguf"),
        "fine": ModelSettings(path=files / "head"),
        "bare": ModelSettings(path=files / "bare"),
        "plain": ModelSettings(path=files / "bare", speculation="off"),
        "grafted": ModelSettings(path=files / "bare", head_path=files / "head"),
    }
    warn_of(build_catalog(Settings(models=models), files / "empty").entries)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "bare declares a prediction head that its files lack",
        "gone cannot be served",
    ]
    assert "head_path" in caplog.text


def test_a_gguf_without_a_head_says_which_key_is_absent(files: Path) -> None:
    fact = read_facts(files / "small.gguf").capabilities[Capability.MTP]
    assert fact.supported is False
    assert "llama.nextn_predict_layers" in fact.evidence


def test_names_of_pulled_files_must_be_model_names(files: Path, tmp_path: Path) -> None:
    for name in (b"bad\xff.gguf", b"a b.gguf", b"good.gguf"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes((files / "small.gguf").read_bytes())
    assert [entry.name for entry in build_catalog(Settings(), tmp_path).entries] == ["good"]


def test_the_error_for_an_unknown_name_has_a_bounded_size(files: Path) -> None:
    models = {f"m{number}-{'x' * 100}": ModelSettings(path=files / "small.gguf") for number in range(200)}
    with pytest.raises(RouterError) as caught:
        build_catalog(Settings(models=models), files / "empty").resolve("y" * 10_000)
    assert len(caught.value.message) + sum(map(len, caught.value.metadata.values())) < 8192
    assert "and 168 more" in caught.value.message


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen3_5", "text_config": {"head_dim": {"a": 1}, "mtp_num_hidden_layers": 1}},
        {"model_type": "qwen3_5", "text_config": []},
        {"model_type": "\ud800" + "x" * 10_000},
        {"model_type": ["qwen3_5"]},
        {"model_type": "qwen3_5", "mtp_num_hidden_layers": {"a": []}, "vocab_size": -1},
    ],
)
def test_a_malformed_checkpoint_is_a_problem_not_a_crash(files: Path, tmp_path: Path, config: object) -> None:
    shutil.copytree(files / "head", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    facts = read_facts(tmp_path / "model")
    assert facts.problem
    assert "cannot be made sense of" not in facts.problem  # that is for faults of the reader
    shown = [facts.problem, facts.architecture, *(fact.evidence for fact in facts.capabilities.values())]
    assert all(len(text.encode()) < 2000 for text in shown)


def test_files_that_cannot_be_served_say_why(files: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((files / "small.gguf").read_bytes()[:100])
    no_config = tmp_path / "empty"
    no_config.mkdir()
    runs_code = tmp_path / "code"
    runs_code.mkdir()
    (runs_code / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "auto_map": {"AutoModel": "x.y"}}))
    problems = {path.name: read_facts(path).problem for path in (tmp_path / "absent.gguf", cut, no_config, runs_code)}
    assert "does not exist" in problems["absent.gguf"]
    assert "cut short" in problems["cut.gguf"]
    assert "config.json" in problems["empty"]
    assert problems["code"]
