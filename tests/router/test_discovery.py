"""Models that nobody wrote down: found where they lie, named once, and described as if they had been written down."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.gguf_files import Script, write_script_model

from mlx_mtp_backend.synthetic import Recipe, write
from router import discovery
from router.catalog import Catalog, build_catalog
from router.domain import Capability
from router.settings import ModelSettings, Settings, load_settings

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """words.gguf, and the checkpoint `head`."""
    folder = tmp_path_factory.mktemp("originals")
    write_script_model(folder / "words.gguf", {"a": Script(["b", "c"])})
    write(folder / "head", Recipe(layers=2))
    return folder


def found(*folders: Path, models: dict[str, ModelSettings] | None = None, **more: Any) -> Catalog:
    settings = Settings(discovery={"folders": folders, **more}, models=models or {})
    return build_catalog(settings, Path("/nowhere"))


def names(catalog: Catalog) -> list[str]:
    return [entry.name for entry in catalog.entries]


def test_nothing_is_searched_unless_told(originals: Path) -> None:
    assert names(build_catalog(Settings(), originals / "none")) == []


def test_files_and_checkpoints_below_a_folder(originals: Path, tmp_path: Path) -> None:
    shutil.copytree(originals / "head", tmp_path / "a" / "b" / "Qwen-head")
    shutil.copy(originals / "words.gguf", tmp_path / "a" / "words.gguf")
    shutil.copy(originals / "words.gguf", tmp_path / "a" / "words-mmproj-f16.gguf")
    (tmp_path / "a" / "notes.txt").write_text("no model")
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    deep = tmp_path.joinpath(*"12345")
    deep.mkdir(parents=True)
    shutil.copy(originals / "words.gguf", deep / "too-deep.gguf")
    catalog = found(tmp_path)
    assert names(catalog) == ["Qwen-head", "words"]
    assert catalog.resolve("Qwen-head").facts.can(Capability.MTP)


def test_what_is_written_down_wins_and_names_are_used_once(
    originals: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        shutil.copy(originals / "words.gguf", tmp_path / folder / "words.gguf")
        shutil.copy(originals / "words.gguf", tmp_path / folder / "no name!.gguf")
    catalog = found(tmp_path)
    assert catalog.resolve("words").path == tmp_path / "one" / "words.gguf"
    assert names(catalog) == ["words"]
    assert "a second 'words' is not served" in caplog.text
    assert "'no name!' is not served" in caplog.text
    mine = ModelSettings(path=tmp_path / "two" / "words.gguf", aliases=("other",))
    assert found(tmp_path, models={"words": mine}).resolve("words").path == mine.path
    assert names(found(tmp_path, models={"x": mine.model_copy(update={"aliases": ("words",)})})) == ["x"]


def test_a_split_model_is_one_model(originals: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        shutil.copy(originals / "words.gguf", tmp_path / f"big-{number:05}-of-00002.gguf")
    entry = found(tmp_path).resolve("big")
    assert names(found(tmp_path)) == ["big"]
    assert entry.facts.problem == ""
    assert entry.facts.size_bytes == 2 * (originals / "words.gguf").stat().st_size
    (tmp_path / "big-00002-of-00002.gguf").unlink()
    assert found(tmp_path).resolve("big").facts.problem == "big-00002-of-00002.gguf does not exist"
    alone = ModelSettings(path=tmp_path / "big-00002-of-00003.gguf")
    shutil.copy(originals / "words.gguf", alone.path)
    assert "part 2 of 3; name the first one" in found(models={"m": alone}).resolve("m").facts.problem


def test_a_folder_with_too_much_in_it_does_not_hold_up_the_start(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(discovery, "MAX_LOOKED_AT", 10)
    for number in range(11):
        (tmp_path / f"{number}.txt").touch()
    shutil.copy(originals / "words.gguf", tmp_path / "words.gguf")
    assert names(found(tmp_path, tmp_path / "absent")) == []
    assert "the rest is not searched" in caplog.text
    assert "absent is no folder" in caplog.text


def in_cache(cache: Path, repository: str, files: dict[str, Path], revision: str = REVISION) -> Path:
    """A repository as huggingface_hub lays it out: snapshots of links into blobs."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / revision
    for name, source in files.items():
        blob = folder / "blobs" / f"{abs(hash((repository, name))):040x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, blob)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path("../" * (len(Path(name).parts) + 1)) / "blobs" / blob.name)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(revision)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


def test_snapshots_in_the_hugging_face_cache(originals: Path, cache: Path) -> None:
    in_cache(cache, "org/Head-4B", {file.name: file for file in (originals / "head").iterdir()})
    in_cache(
        cache, "org/Words-GGUF", {"words.Q4.gguf": originals / "words.gguf", "README.md": originals / "words.gguf"}
    )
    catalog = found(hugging_face_cache=True)
    assert names(catalog) == ["org/Head-4B", "org/Words-GGUF/words.Q4"]
    assert catalog.resolve("org/Head-4B").facts.problem == ""
    assert catalog.resolve("org/Head-4B").facts.can(Capability.MTP)
    assert catalog.resolve("org/Words-GGUF/words.Q4").facts.architecture == "llama"


def test_a_link_out_of_its_repository_is_refused(originals: Path, cache: Path) -> None:
    snapshot = in_cache(cache, "org/evil", {file.name: file for file in (originals / "head").iterdir()})
    config = snapshot / "config.json"
    config.unlink()
    config.symlink_to(originals / "head" / "config.json")
    assert "leads out of its model's folder" in found(hugging_face_cache=True).resolve("org/evil").facts.problem


def test_no_cache_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(tmp_path / "none"), raising=False)
    assert names(found(hugging_face_cache=True)) == []
    assert "there is none at" in caplog.text


def test_folders_are_relative_to_the_settings_file(
    originals: Path, tmp_path: Path, make_settings: Callable[[str], Path]
) -> None:
    shutil.copytree(originals, tmp_path / "library")
    settings = load_settings(make_settings('[discovery]\nfolders = ["library"]\n'))
    assert names(build_catalog(settings, tmp_path / "none")) == ["head", "words"]


@pytest.fixture
def make_settings(tmp_path: Path) -> Callable[[str], Path]:
    def make(text: str) -> Path:
        file = tmp_path / "router.toml"
        file.write_text(text)
        return file

    return make
