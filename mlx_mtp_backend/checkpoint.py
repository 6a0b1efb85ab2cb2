"""What a checkpoint on disk is, from its headers, index and config alone: no weights are loaded, no code is run.

Capability is a matter of evidence: a config that declares a head proves nothing until its tensors are found.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp_backend.errors import EngineError, ErrorReason
from mlx_mtp_backend.families.layouts import LAYOUTS, head_name
from mlx_mtp_backend.safetensors_header import TensorInfo, read_header, read_json, unreadable

MAX_CONFIG_BYTES = 4_000_000
MAX_INDEX_BYTES = 64_000_000
MAX_FILES = 2_000
INDEX = "model.safetensors.index.json"
SIDE_FILES = ("mtp.safetensors", "model-mtp.safetensors")
SIDE_FOLDER = "mtp"
DECLARING_KEYS = ("mtp_num_hidden_layers", "num_nextn_predict_layers")
CODE_KEYS = ("auto_map", "model_file")


class MTPStatus(enum.StrEnum):
    """What the evidence says about native MTP."""

    PRESENT = "present"  # every tensor the driver needs, in the shape it needs
    INCOMPLETE = "incomplete"  # some of them
    NO_DRIVER = "no_driver"  # tensors of a head that no driver here can run
    DECLARED_BUT_ABSENT = "declared_but_absent"  # the config promises a head, the files hold none
    NONE = "none"  # neither declared nor there


@dataclass(frozen=True, slots=True)
class MTPReport:
    """The head, as far as headers tell.

    Attributes:
        declared: layers the config promises; 0 for none. `declared_by` is the key that says so.
        driver: module that would run the head, or None.
        tensors: the head's tensors that were found, with file, shape and dtype: the evidence.
        missing: tensors the driver needs that are absent or misshapen.
    """

    status: MTPStatus
    declared: int
    declared_by: str | None
    driver: str | None
    tensors: tuple[TensorInfo, ...]
    missing: tuple[str, ...]

    @property
    def evidence(self) -> tuple[str, ...]:
        return tuple(f"{t.name} {list(t.shape)} {t.dtype} in {t.file}" for t in self.tensors)


@dataclass(frozen=True, slots=True)
class Quantization:
    """How weights are stored; `source` is the config key that says so."""

    mode: str
    bits: int | None
    group_size: int | None
    source: str


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """A checkpoint. Sizes are in bytes, lengths in tokens; None where the config does not say."""

    path: str
    family: str
    mtp: MTPReport
    trunk_driver: str | None
    quantization: Quantization | None
    context_length: int | None
    vocab_size: int | None
    hidden_size: int | None
    layers: int | None
    weight_bytes: int
    files: tuple[str, ...]
    has_tokenizer: bool
    has_chat_template: bool

    def to_json(self) -> dict[str, Any]:
        """Plain types for json.dumps."""
        plain = dataclasses.asdict(self)
        plain["mtp"]["evidence"] = list(self.mtp.evidence)
        return plain


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """Where the tensors lie. `head` maps the head's names (without prefix) to tensors and their files."""

    trunk: dict[str, TensorInfo]
    head: dict[str, TensorInfo]
    head_folder: Path


def inspect_checkpoint(path: Path, head_path: Path | None = None) -> CheckpointReport:
    """Report on the checkpoint in folder `path`.

    Args:
        head_path: where else to look for the head: a safetensors file, or the folder of the original checkpoint.

    Raises:
        EngineError: CHECKPOINT_UNREADABLE, or CHECKPOINT_RUNS_CODE for a config that asks for Python of its own.
    """
    config = read_config(path)
    text = text_config(config)
    files = find_tensors(path, head_path)
    family = str(config.get("model_type", "unknown"))
    layout = LAYOUTS.get(family)
    tensors = (*files.trunk.values(), *files.head.values())
    context = text.get("max_position_embeddings")
    return CheckpointReport(
        path=str(path),
        family=family,
        mtp=_head_report(family, text, files),
        trunk_driver=layout.driver if layout else None,
        quantization=_quantization(config),
        context_length=context if isinstance(context, int) else None,
        vocab_size=_positive(text, "vocab_size"),
        hidden_size=_positive(text, "hidden_size"),
        layers=_positive(text, "num_hidden_layers"),
        weight_bytes=sum(tensor.bytes for tensor in tensors),
        files=tuple(sorted({tensor.file for tensor in tensors})),
        has_tokenizer=(path / "tokenizer.json").is_file(),
        has_chat_template=_has_template(path),
    )


def read_config(path: Path) -> dict[str, Any]:
    """config.json, refused if it asks for code."""
    config = read_json(path / "config.json", MAX_CONFIG_BYTES)
    for level in (config, text_config(config)):
        for key in CODE_KEYS:
            if level.get(key):
                detail = f"config.json sets {key}: its own Python would have to run"
                raise EngineError(ErrorReason.CHECKPOINT_RUNS_CODE, detail, field=key)
    return config


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a config, which a multimodal wrapper nests."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def find_tensors(path: Path, head_path: Path | None = None) -> CheckpointFiles:
    """Every tensor's header, the head's set apart. An explicit `head_path` wins over shards, shards over side files."""
    if head_path is not None and not head_path.exists():
        raise unreadable(head_path, "does not exist")
    trunk, shard_head = _split(_read(path, _shards(path)), bare=False)
    if head_path is not None:
        folder = head_path if head_path.is_dir() else head_path.parent
        names = _head_shards(head_path) if head_path.is_dir() else [head_path.name]
        whole = _read(folder, names)
        only_head = not any("layers.1." in name or "embed_tokens" in name for name in whole)
        return CheckpointFiles(trunk, _split(whole, bare=only_head)[1], folder)
    if shard_head:
        return CheckpointFiles(trunk, shard_head, path)
    side = [name for name in SIDE_FILES if (path / name).is_file()]
    side += [f"{SIDE_FOLDER}/{file.name}" for file in sorted((path / SIDE_FOLDER).glob("*.safetensors"))]
    return CheckpointFiles(trunk, _split(_read(path, side), bare=True)[1], path)


def _shards(path: Path) -> list[str]:
    if (path / INDEX).is_file():
        return sorted(set(_weight_map(path).values()))
    names = sorted(file.name for file in path.glob("model*.safetensors") if file.name not in SIDE_FILES)
    if not names:
        raise unreadable(path, "holds no model*.safetensors")
    return names


def _head_shards(path: Path) -> list[str]:
    """The shards that hold the head: of an original checkpoint, only those need to be on disk."""
    if not (path / INDEX).is_file():
        return sorted(file.name for file in path.glob("*.safetensors"))
    return sorted({file for name, file in _weight_map(path).items() if head_name(name, bare=False)})


def _weight_map(path: Path) -> dict[str, str]:
    index = path / INDEX
    mapping = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise unreadable(index, "has no weight_map")
    for file in mapping.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise unreadable(index, "names a file that is not a plain .safetensors name")
    return mapping


def _read(folder: Path, names: list[str]) -> dict[str, TensorInfo]:
    if len(names) > MAX_FILES:
        raise unreadable(folder, f"has {len(names)} weight files")
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        found = read_header(folder / name, label=name)
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


def _head_report(family: str, text: dict[str, Any], files: CheckpointFiles) -> MTPReport:
    declared_by = next((key for key in DECLARING_KEYS if _positive(text, key)), None)
    declared = text[declared_by] if declared_by else 0
    layout = LAYOUTS.get(family)
    found = files.head or _appended_layers(text, files.trunk)
    missing: tuple[str, ...] = ()
    if layout is not None and files.head:
        missing = _missing(layout.tensors(_dimensions(text)), files.head)
    if not found:
        status = MTPStatus.DECLARED_BUT_ABSENT if declared else MTPStatus.NONE
    elif layout is None:
        status = MTPStatus.NO_DRIVER
    else:
        status = MTPStatus.INCOMPLETE if missing else MTPStatus.PRESENT
    driver = layout.driver if layout else None
    return MTPReport(status, declared, declared_by, driver, tuple(found.values()), missing)


def _appended_layers(text: dict[str, Any], trunk: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Heads of other dialects, stored as decoder layers past the trunk's last one."""
    layers = _positive(text, "num_hidden_layers")
    if layers is None:
        return {}
    marker = f"layers.{layers}."
    return {name: tensor for name, tensor in trunk.items() if marker in name}


def _dimensions(text: dict[str, Any]) -> dict[str, Any]:
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    for key in needed:
        if _positive(text, key) is None:
            raise EngineError(ErrorReason.CHECKPOINT_UNREADABLE, f"config.json gives no usable {key}", field=key)
    return text


def _missing(wanted: dict[str, tuple[int, ...]], head: dict[str, TensorInfo]) -> tuple[str, ...]:
    problems = []
    for name, shape in wanted.items():
        tensor = head.get(name)
        if tensor is None:
            problems.append(name)
        elif tensor.shape != shape and not _is_packed(name, shape, head):
            problems.append(f"{name} (is {list(tensor.shape)}, not {list(shape)})")
    return tuple(problems)


def _is_packed(name: str, shape: tuple[int, ...], head: dict[str, TensorInfo]) -> bool:
    """An MLX-quantised matrix keeps its rows, packs its columns and has scales beside it."""
    scales = head.get(name.removesuffix("weight") + "scales")
    return scales is not None and len(shape) == 2 and head[name].shape[:1] == shape[:1] == scales.shape[:1]


def _quantization(config: dict[str, Any]) -> Quantization | None:
    for source in ("quantization", "quantization_config"):
        entry = config.get(source) or text_config(config).get(source)
        if isinstance(entry, dict):
            mode = str(entry.get("mode") or entry.get("quant_method") or "affine")
            return Quantization(mode, _positive(entry, "bits"), _positive(entry, "group_size"), source)
    return None


def _positive(config: dict[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if type(value) is int and value > 0 else None


def _has_template(path: Path) -> bool:
    if (path / "chat_template.jinja").is_file():
        return True
    settings = path / "tokenizer_config.json"
    return settings.is_file() and bool(read_json(settings, MAX_CONFIG_BYTES).get("chat_template"))
