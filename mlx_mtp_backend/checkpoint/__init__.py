"""What a checkpoint on disk is, from its headers, index and config alone: no weights are loaded, no code is run.

Capability is a matter of evidence: a config that declares a head proves nothing until its tensors are found.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp_backend.checkpoint.files import (
    MAX_TOKENIZER_CONFIG_BYTES,
    CheckpointFiles,
    find_tensors,
    identity,
    read_config,
    text_config,
)
from mlx_mtp_backend.checkpoint.safetensors_header import TensorInfo, read_json
from mlx_mtp_backend.checkpoint.storage import Quantization, quantization, refusal, unread
from mlx_mtp_backend.checkpoint.untrusted import allowed_roots
from mlx_mtp_backend.errors import EngineError, ErrorReason
from mlx_mtp_backend.families.layouts import MAX_EXPERTS, HeadLayout, layout_of
from mlx_mtp_backend.load.footprint import CacheFootprint, cache_footprint, positive

DECLARING_KEYS = ("mtp_num_hidden_layers", "num_nextn_predict_layers")


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
        missing: tensors the driver needs that are absent, misshapen or stored in a way that it does not read.
        place: where they were found: "shards", "side file", "head_path", or "" for nowhere.
    """

    status: MTPStatus
    declared: int
    declared_by: str | None
    driver: str | None
    tensors: tuple[TensorInfo, ...]
    missing: tuple[str, ...]
    place: str = ""

    @property
    def evidence(self) -> tuple[str, ...]:
        return tuple(f"{t.name} {list(t.shape)} {t.dtype} in {t.file}" for t in self.tensors)


@dataclass(frozen=True, slots=True)
class Experts:
    """Routed experts of each layer, and how many of them a token is given to."""

    count: int
    per_token: int


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """A checkpoint. Sizes are in bytes, lengths in tokens; None where the config does not say.

    `weight_bytes` counts every expert: all are held, however few a token is given to. `identity` changes when
    configuration or weights do, see checkpoint.files.identity. `refusal` tells why the engine cannot read
    the trunk's weights as they are stored, and what to do; None where it can.
    """

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
    identity: str
    has_tokenizer: bool
    has_chat_template: bool
    cache: CacheFootprint | None = None
    experts: Experts | None = None
    refusal: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain types for json.dumps."""
        plain = dataclasses.asdict(self)
        plain["mtp"]["evidence"] = list(self.mtp.evidence)
        return plain


def inspect_checkpoint(path: Path, head_path: Path | None = None) -> CheckpointReport:
    """Report on the checkpoint in folder `path`.

    Args:
        head_path: where else to look for the head: a safetensors file, or the folder of the original checkpoint.

    Raises:
        EngineError: CHECKPOINT_UNREADABLE, also for numbers in the config that cannot be; or CHECKPOINT_RUNS_CODE for
            a config that asks for Python of its own.
    """
    config = read_config(path)
    text = text_config(config)
    files = find_tensors(path, head_path)
    family = str(config.get("model_type", "unknown"))
    layout = layout_of(family, text)
    tensors = (*files.trunk.values(), *files.head.values())
    experts = _experts(text) if layout is not None and layout.experts else None
    mtp = _head_report(layout, text, files)
    stored = quantization(config, text)
    return CheckpointReport(
        path=str(path),
        family=family,
        mtp=mtp,
        trunk_driver=layout.driver if layout else None,
        quantization=stored,
        context_length=positive(text, "max_position_embeddings"),
        vocab_size=positive(text, "vocab_size"),
        hidden_size=positive(text, "hidden_size"),
        layers=positive(text, "num_hidden_layers"),
        weight_bytes=sum(tensor.bytes for tensor in tensors),
        files=tuple(sorted({tensor.file for tensor in tensors})),
        identity=identity([path, files.head_folder], {tensor.file for tensor in tensors}),
        has_tokenizer=(path / "tokenizer.json").is_file(),
        has_chat_template=_has_template(path),
        cache=cache_footprint(text, 1 if mtp.status is MTPStatus.PRESENT else 0),
        experts=experts,
        refusal=refusal(unread(files.trunk, stored), stored),
    )


def _experts(text: dict[str, Any]) -> Experts:
    count, per_token = _sizes(text, ("num_experts", "num_experts_per_tok"))
    if count > MAX_EXPERTS:
        raise _unusable("num_experts", f"of {count}: the limit is {MAX_EXPERTS}")
    if per_token > count:
        raise _unusable("num_experts_per_tok", f"of {per_token}: there are {count} experts")
    return Experts(count, per_token)


def _head_report(layout: HeadLayout | None, text: dict[str, Any], files: CheckpointFiles) -> MTPReport:
    declared_by = next((key for key in DECLARING_KEYS if positive(text, key)), None)
    declared = text[declared_by] if declared_by else 0
    found = files.head or _appended_layers(text, files.trunk)
    missing: tuple[str, ...] = ()
    if layout is not None and files.head:
        _sizes(text, layout.sizes if text.get("head_dim") is None else (*layout.sizes, "head_dim"))
        foreign = (f"{tensor.name} (stored as {tensor.dtype}, which is not read)" for tensor in unread(files.head))
        missing = (*foreign, *_missing(layout.tensors(text, files.head), files.head))
    if not found:
        status = MTPStatus.DECLARED_BUT_ABSENT if declared else MTPStatus.NONE
    elif layout is None:
        status = MTPStatus.NO_DRIVER
    else:
        status = MTPStatus.INCOMPLETE if missing else MTPStatus.PRESENT
    driver = layout.driver if layout else None
    place = files.head_place or ("shards" if found else "")
    return MTPReport(status, declared, declared_by, driver, tuple(found.values()), missing, place)


def _appended_layers(text: dict[str, Any], trunk: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Heads of other dialects, stored as decoder layers past the trunk's last one."""
    layers = positive(text, "num_hidden_layers")
    if layers is None:
        return {}
    marker = f"layers.{layers}."
    return {name: tensor for name, tensor in trunk.items() if marker in name}


def _sizes(text: dict[str, Any], keys: tuple[str, ...]) -> list[int]:
    """These numbers of a text config, which must be above 0."""
    sizes = []
    for key in keys:
        size = positive(text, key)
        if size is None:
            raise _unusable(key)
        sizes.append(size)
    return sizes


def _unusable(key: str, why: str = "") -> EngineError:
    detail = f"config.json gives no usable {key}" + (f", but one {why}" if why else "")
    return EngineError(ErrorReason.CHECKPOINT_UNREADABLE, detail, field=key)


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
    """An MLX-quantised matrix, or stack of them, keeps its rows, packs its columns and has scales beside it."""
    scales = head.get(name.removesuffix("weight") + "scales")
    return scales is not None and len(shape) > 1 and head[name].shape[:-1] == shape[:-1] == scales.shape[:-1]


def _has_template(path: Path) -> bool:
    if (path / "chat_template.jinja").is_file():
        return True
    settings = path / "tokenizer_config.json"
    if not settings.is_file():
        return False
    return bool(read_json(settings, MAX_TOKENIZER_CONFIG_BYTES, allowed_roots(path)).get("chat_template"))
