"""Where a checkpoint's tensors lie, from headers and index alone, and what its folder must not ask for.

No weights are read and no code is run: a folder that would need its own Python, or holds pickles only, is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp_backend.checkpoint.safetensors_header import (
    MAX_TENSORS,
    SUFFIX,
    TensorInfo,
    read_header,
    read_json,
    unreadable,
)
from mlx_mtp_backend.checkpoint.untrusted import allowed_roots
from mlx_mtp_backend.errors import EngineError, ErrorReason
from mlx_mtp_backend.families.layouts import head_name

MAX_CONFIG_BYTES = 4_000_000
MAX_TOKENIZER_CONFIG_BYTES = 8_000_000
MAX_INDEX_BYTES = 32_000_000
MAX_FILES = 2_000
MAX_HEADERS_BYTES = 128 * 2**20  # of all its files together
MAX_ENTRIES = 10_000  # of a checkpoint's folder
INDEX = "model.safetensors.index.json"
SIDE_FILES = ("mtp.safetensors", "model-mtp.safetensors")
SIDE_FOLDER = "mtp"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Keys by which a configuration has Python of its own run; what is false or empty asks for nothing.
CODE_KEYS = ("auto_map", "model_file", "trust_remote_code", "custom_pipelines")


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """Where the tensors lie. `head` maps the head's names (without prefix) to tensors and their files.

    `head_place` says where the head was found: "shards", "side file", "head_path" or "" for nowhere.
    """

    trunk: dict[str, TensorInfo]
    head: dict[str, TensorInfo]
    head_folder: Path
    head_place: str


def read_config(path: Path) -> dict[str, Any]:
    """config.json, refused if it or the tokenizer's configuration asks for code.

    Raises:
        EngineError: CHECKPOINT_UNREADABLE, CHECKPOINT_RUNS_CODE.
    """
    roots = allowed_roots(path)
    config = read_json(path / "config.json", MAX_CONFIG_BYTES, roots)
    _refuse_code(config, "config.json")
    tokenizer = path / "tokenizer_config.json"
    if os.path.lexists(tokenizer):
        _refuse_code(read_json(tokenizer, MAX_TOKENIZER_CONFIG_BYTES, roots), tokenizer.name)
    return config


def _refuse_code(config: dict[str, Any], label: str) -> None:
    levels: list[Any] = [config]
    while levels:
        level = levels.pop()
        if isinstance(level, dict):
            if found := next((key for key in CODE_KEYS if level.get(key)), None):
                detail = f"{label} sets {found}: its own Python would have to run"
                raise EngineError(ErrorReason.CHECKPOINT_RUNS_CODE, detail, field=found)
            levels += level.values()
        elif isinstance(level, list):
            levels += level


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a config, which a multimodal wrapper nests."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def find_tensors(path: Path, head_path: Path | None = None) -> CheckpointFiles:
    """Every tensor's header, the head's set apart. An explicit `head_path` wins over shards, shards over side files.

    Raises:
        EngineError: CHECKPOINT_UNREADABLE.
    """
    if head_path is not None and not head_path.exists():
        raise unreadable(head_path, "does not exist")
    trunk, shard_head = _split(_read(path, _shards(path)), bare=False)
    if head_path is not None:
        folder, names = _explicit_head(head_path)
        whole = _read(folder, names)
        only_head = not any("layers.1." in name or "embed_tokens" in name for name in whole)
        return CheckpointFiles(trunk, _split(whole, bare=only_head)[1], folder, "head_path")
    if shard_head:
        return CheckpointFiles(trunk, shard_head, path, "shards")
    side = [name for name in SIDE_FILES if os.path.lexists(path / name)]
    if (path / SIDE_FOLDER).is_dir():
        side += [f"{SIDE_FOLDER}/{name}" for name in _names(path / SIDE_FOLDER) if name.endswith(SUFFIX)]
    head = _split(_read(path, side), bare=True)[1]
    return CheckpointFiles(trunk, head, path, "side file" if head else "")


def identity(folders: Iterable[Path], names: Iterable[str]) -> str:
    """A digest of the sizes and modification times of config.json and of the named files: what tells one set of weights
    from another without reading it."""
    digest = hashlib.sha256()
    for folder in dict.fromkeys(folders):
        for name in sorted({"config.json", *names}):
            with contextlib.suppress(OSError):  # the head's files lie in another folder than the trunk's
                known = (folder / name).stat()
                digest.update(f"{name} {known.st_size} {known.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def weight_names(path: Path) -> list[str]:
    """Names of the weight files in a checkpoint's folder that a loader would read, whatever the index says.

    Raises:
        EngineError: CHECKPOINT_UNREADABLE, also where there are pickles instead.
    """
    names = list(_names(path))
    weights = sorted(n for n in names if n.startswith("model") and n.endswith(SUFFIX) and n not in SIDE_FILES)
    if weights:
        return weights
    if pickle := next((name for name in names if name.endswith(PICKLE_SUFFIXES)), None):
        why = f"holds no model*{SUFFIX}, and pickles such as {pickle[:80]} run code when they are read; convert them"
        raise unreadable(path, why)
    raise unreadable(path, f"holds no model*{SUFFIX}")


def _names(folder: Path) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in itertools.islice(entries, MAX_ENTRIES + 1)]
    except OSError as error:
        raise unreadable(folder, error.strerror or "cannot be listed") from error
    if len(names) > MAX_ENTRIES:
        raise unreadable(folder, f"holds over {MAX_ENTRIES} files")
    return iter(sorted(names))


def _shards(path: Path) -> list[str]:
    names = weight_names(path)
    if not os.path.lexists(path / INDEX):
        return names
    listed = sorted(set(_weight_map(path).values()))
    for stray in set(names) - set(listed):  # loaders read them too
        read_header(path / stray, roots=allowed_roots(path))
    return listed


def _explicit_head(head_path: Path) -> tuple[Path, list[str]]:
    """The folder and the names of the files that hold the head: of an original checkpoint, only those need be there."""
    if not head_path.is_dir():
        if head_path.suffix != SUFFIX:
            raise unreadable(head_path, f"is no {SUFFIX} file")
        return head_path.parent, [head_path.name]
    if os.path.lexists(head_path / INDEX):
        listed = _weight_map(head_path).items()
        return head_path, sorted({file for name, file in listed if head_name(name, bare=False)})
    return head_path, [name for name in _names(head_path) if name.endswith(SUFFIX)]


def _weight_map(path: Path) -> dict[str, str]:
    index = path / INDEX
    mapping = read_json(index, MAX_INDEX_BYTES, allowed_roots(path)).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise unreadable(index, "has no weight_map")
    for file in mapping.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(SUFFIX):
            raise unreadable(index, f"names a file that is not a plain {SUFFIX} name")
    return mapping


def _read(folder: Path, names: Sequence[str]) -> dict[str, TensorInfo]:
    if len(names) > MAX_FILES:
        raise unreadable(folder, f"has {len(names)} weight files")
    roots = allowed_roots(folder)
    tensors: dict[str, TensorInfo] = {}
    header_bytes = 0
    for name in names:
        found = read_header(folder / name, label=name, roots=roots)
        header_bytes += (folder / name).stat().st_size - sum(tensor.bytes for tensor in found.values())
        if header_bytes > MAX_HEADERS_BYTES or len(tensors) + len(found) > MAX_TENSORS:
            raise unreadable(folder, f"has headers of over {MAX_HEADERS_BYTES} bytes or {MAX_TENSORS} tensors")
        if twice := tensors.keys() & found.keys():
            raise unreadable(folder / name, f"repeats tensor {min(twice)[:80]!r}")
        tensors.update(found)
    return tensors


def _split(tensors: dict[str, TensorInfo], *, bare: bool) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
    trunk: dict[str, TensorInfo] = {}
    head: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        short = head_name(name, bare=bare)
        if short is None:
            trunk[name] = tensor
        else:
            head[short] = tensor
    return trunk, head
