"""Finds models that the settings do not write down: in folders, in the Hugging Face cache, at Ollama servers."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from router.backends.ollama_client import list_tags
from router.domain import RouterError
from router.gguf_split import SPLIT
from router.settings import MODEL_NAME, DiscoverySettings, ModelSettings, OllamaSettings, Settings

logger = logging.getLogger(__name__)

MAX_SHOWN = 128  # characters of a name that is refused
MAX_DEPTH = 4  # folders below one that is searched
MAX_LOOKED_AT = 20_000  # files and folders, so that a folder named by mistake does not hold up the start
PROJECTOR = re.compile(r"(^|[-_.])mmproj", re.IGNORECASE)  # a vision part, which is no model by itself

Found = Iterator[tuple[str, ModelSettings]]


async def discover(
    settings: Settings, pulled: Path, known: Mapping[str, ModelSettings] | None = None
) -> dict[str, ModelSettings]:
    """Every model that is not written down, by name; a name that is taken already is not used again.

    Args:
        settings: what is written down, and where to look.
        pulled: folder of fetched models.
        known: models that were there before: those of a server that does not answer now stay.
    """
    taken = {name for key, model in settings.models.items() for name in (key, *model.aliases)}
    found: dict[str, ModelSettings] = {}
    in_files = await asyncio.to_thread(lambda: list(_in_files(settings.discovery, pulled)))
    for name, model in [*in_files, *await _at_ollama(settings, known or {})]:
        if not re.fullmatch(MODEL_NAME, name):
            logger.warning("%r is not served: that is no model name", name)
        elif name in found:
            logger.warning("a second %r is not served: %s", name, model.path or model.kept_as)
        elif name not in taken:
            found[name] = model
    return found


def _in_files(settings: DiscoverySettings, pulled: Path) -> Found:
    yield from ((path.stem, ModelSettings(path=path)) for path in sorted(pulled.glob("*.gguf")))
    for folder in settings.folders:
        if folder.is_dir():
            yield from _below(folder)
        else:
            logger.warning("discovery.folders: %s is no folder", folder)
    if settings.hugging_face_cache:
        yield from _in_cache()


def _below(folder: Path) -> Found:
    """GGUF files and checkpoints in a folder and below; links to folders are not followed."""
    looked_at = 0
    for place, folders, files in os.walk(folder):
        path = Path(place)
        looked_at += len(folders) + len(files)
        if looked_at > MAX_LOOKED_AT:
            logger.warning("discovery: %s holds over %d files; the rest is not searched", folder, MAX_LOOKED_AT)
            return
        if is_checkpoint(files):
            folders.clear()
            yield path.name, ModelSettings(path=path)
            continue
        folders.sort()
        if len(path.relative_to(folder).parts) >= MAX_DEPTH:
            folders.clear()
        for file in gguf_models(path / name for name in files):
            yield _stem(file), ModelSettings(path=file)


def _in_cache() -> Found:
    """Newest snapshots in the Hugging Face cache, by `organisation/name`; of GGUF files with their own names."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        cache = scan_cache_dir()
    except CacheNotFound as error:
        logger.warning("discovery.hugging_face_cache: there is none at %s", error.cache_dir)
        return
    for repository in sorted(cache.repos, key=lambda repository: repository.repo_id):
        if repository.repo_type != "model" or not repository.revisions:
            continue
        newest = max(repository.revisions, key=lambda revision: ("main" in revision.refs, revision.last_modified))
        snapshot = newest.snapshot_path
        if is_checkpoint(entry.name for entry in snapshot.iterdir()):
            yield repository.repo_id, ModelSettings(path=snapshot)
        for file in gguf_models(snapshot.rglob("*.gguf")):
            yield f"{repository.repo_id}/{_stem(file)}", ModelSettings(path=file)


async def _at_ollama(settings: Settings, known: Mapping[str, ModelSettings]) -> list[tuple[str, ModelSettings]]:
    """Tags that the configured servers have; a server that does not answer has those that it had before."""
    if not settings.discovery.ollama:
        return []
    found = []
    for name, backend in sorted(settings.backends.items()):
        if not isinstance(backend, OllamaSettings):
            continue
        try:
            tags = await list_tags(backend)
        except RouterError as error:
            tags = [tag for tag, model in known.items() if model.ollama == tag and model.backend == name]
            logger.warning("discovery: no tags from %s, so that it keeps %d: %s", name, len(tags), error)
        for tag in tags:
            if re.fullmatch(MODEL_NAME, tag):
                found.append((tag, ModelSettings(ollama=tag, backend=name)))
            else:
                logger.warning("%r at %s is not served: that is no model name", tag[:MAX_SHOWN], name)
    return found


def is_checkpoint(names: Iterable[str]) -> bool:
    """Whether a folder with these files is a checkpoint."""
    listed = list(names)
    return "config.json" in listed and any(name.endswith(".safetensors") for name in listed)


def gguf_models(paths: Iterable[Path]) -> list[Path]:
    """The GGUF files that are models: no vision parts, and of a split model only its first part."""
    models = []
    for path in sorted(paths):
        part = SPLIT.fullmatch(path.name)
        if path.suffix == ".gguf" and not PROJECTOR.search(path.name) and (part is None or int(part["number"]) == 1):
            models.append(path)
    return models


def _stem(file: Path) -> str:
    """Name of a GGUF model: its file's, without the suffix and the number of the part."""
    part = SPLIT.fullmatch(file.name)
    return file.stem if part is None else part["name"]
