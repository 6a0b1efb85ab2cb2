"""What a model's files show of it: one function per format, from headers alone."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

from mlx_mtp_backend import CheckpointReport, EngineError, MTPStatus, inspect_checkpoint
from mlx_mtp_backend.checkpoint.untrusted import RefusedFileError, allowed_roots, read_untrusted
from router.domain import Capability, CapabilityFact, HeadFacts, ModelFacts, ModelFormat
from router.gguf import GgufError, read_gguf_header
from router.gguf_header import GgufHeader
from router.gguf_split import SplitError, parts

THINKING_SWITCH = "enable_thinking"  # the variable by which chat templates switch thinking
MAX_TEXT = 400  # characters of evidence
MAX_FILES = 10_000  # of a checkpoint's folder that are looked at for changes
MAX_TEMPLATE_BYTES = 8 * 2**20  # tokenizer configs of large vocabularies reach a few megabytes

logger = logging.getLogger(__name__)

Facts = Mapping[Capability, CapabilityFact]


def read_facts(path: Path, head_path: Path | None = None) -> ModelFacts:
    """What the GGUF file or checkpoint folder at `path` shows; a problem instead where it cannot be read.

    Args:
        head_path: where else a checkpoint's head may lie.
    """
    stamp = _stamp(path, head_path)
    try:
        facts = _checkpoint_facts(path, head_path) if path.is_dir() else _gguf_facts(path)
    except Exception:
        logger.exception("cannot make sense of %s", path)
        return ModelFacts(problem=f"{_text(path.name)} cannot be made sense of; the log has the details", stamp=stamp)
    return replace(
        facts,
        stamp=stamp,
        architecture=_text(facts.architecture),
        quantization=_text(facts.quantization),
        problem=_text(facts.problem),
        capabilities={
            capability: replace(fact, evidence=_text(fact.evidence)) for capability, fact in facts.capabilities.items()
        },
    )


def unasked_facts(name: str, kept: ModelFormat) -> ModelFacts:
    """Of a model that a server keeps, before it was asked."""
    unknown = CapabilityFact(None, f"the server that keeps {_text(name)} has not been asked about it yet")
    return ModelFacts(format=kept, capabilities=dict.fromkeys(Capability, unknown))


def _stamp(path: Path, head_path: Path | None) -> tuple[tuple[str, int, int], ...]:
    """Path, size and time in ns of every file: where these are the same, so is what the files say."""
    files: list[Path] = []
    for place in (path, head_path):
        if place is None:
            continue
        with contextlib.suppress(OSError, SplitError):
            files += islice(place.iterdir(), MAX_FILES) if place.is_dir() else parts(place)
    stamp = []
    for file in sorted(files):
        with contextlib.suppress(OSError):
            status = file.stat()
            stamp.append((str(file), status.st_size, status.st_mtime_ns))
    return tuple(stamp)


def _text(value: str) -> str:
    """Text out of a file, made fit to be sent: no lone surrogates, no endless lines."""
    return value[:MAX_TEXT].encode("utf-8", "replace").decode()


def _gguf_facts(path: Path) -> ModelFacts:
    file = path
    try:
        headers = []
        for file in parts(path):
            headers.append(read_gguf_header(file))
    except SplitError as error:
        return ModelFacts(problem=f"{path.name} cannot be served: {error}")
    except FileNotFoundError:
        return ModelFacts(problem=f"{file.name} does not exist")
    except OSError as error:
        return ModelFacts(problem=f"{file.name} cannot be read: {error.strerror}")
    except GgufError as error:
        return ModelFacts(problem=f"{file.name} is not a usable GGUF file: {error}")
    header = replace(  # of a split model, the first part has the metadata and each its own tensors
        headers[0],
        tensors={name: tensor for part in headers for name, tensor in part.tensors.items()},
        file_bytes=sum(part.file_bytes for part in headers),
    )
    template = header.chat_template
    return ModelFacts(
        format=ModelFormat.GGUF,
        architecture=header.architecture,
        quantization=header.quantization,
        context_length=header.context_length,
        size_bytes=header.file_bytes,
        cache_bytes=header.cache_bytes,
        capabilities=_gguf_capabilities(header),
        head=HeadFacts(
            declared_layers=header.mtp_layers,
            present=header.mtp_layers > 0 and header.mtp_tensor is not None,
            driver="llama.cpp" if header.mtp_layers else "",
            place="file" if header.mtp_tensor is not None else "",
        ),
        reasoning_switch=THINKING_SWITCH in template,
    )


def _gguf_capabilities(header: GgufHeader) -> Facts:
    has_template = bool(header.chat_template)
    return {
        Capability.CHAT: CapabilityFact(
            has_template, f"tokenizer.chat_template is {'present' if has_template else 'absent'}"
        ),
        Capability.MTP: _gguf_head(header),
        Capability.REASONING: reasoning_fact(header.chat_template),
        Capability.TOOLS: _tools(header.chat_template),
        Capability.JSON_SCHEMA: CapabilityFact(True, "llama.cpp turns JSON Schema into a grammar"),
        Capability.LOGPROBS: CapabilityFact(True, "llama.cpp returns them per token"),
        Capability.COUNT_TOKENS: CapabilityFact(True, "llama.cpp tokenizes without generating"),
        Capability.TOKEN_PROMPT: CapabilityFact(True, "llama.cpp takes token ids"),
    }


def _gguf_head(header: GgufHeader) -> CapabilityFact:
    key, heads, tensor = f"{header.architecture}.nextn_predict_layers", header.mtp_layers, header.mtp_tensor
    if not heads:
        return CapabilityFact(False, f"no {key} in the file's metadata")
    if tensor is None:
        return CapabilityFact(False, f"{key} = {heads} is declared, but no nextn.eh_proj tensor is in the file")
    return CapabilityFact(True, f"{key} = {heads} and tensor {tensor}")


def _checkpoint_facts(path: Path, head_path: Path | None) -> ModelFacts:
    try:
        report = inspect_checkpoint(path, head_path)
    except EngineError as error:
        return ModelFacts(format=ModelFormat.CHECKPOINT, problem=f"{path.name}: {error.detail}")
    try:
        template = _checkpoint_template(path)
    except RefusedFileError as error:
        return ModelFacts(format=ModelFormat.CHECKPOINT, problem=f"{path.name}: its chat template {error}")
    problem = ""
    if report.trunk_driver is None:
        problem = f"{path.name}: the engine has no driver for model_type {report.family!r}"
    elif report.refusal is not None:
        problem = f"{path.name}: {report.refusal}"
    elif report.context_length is None:
        problem = f"{path.name}: config.json gives no max_position_embeddings"
    elif not report.has_tokenizer:
        problem = f"{path.name} has no tokenizer.json"
    elif head_path is not None and report.mtp.status is not MTPStatus.PRESENT:
        problem = f"{path.name}: {head_path.name}, its head_path, holds no head for it: {head_evidence(report)}"
    elif report.mtp.status is MTPStatus.INCOMPLETE:
        problem = f"{path.name}: its head cannot be used: {head_evidence(report)}; head_path can name a whole one"
    return ModelFacts(
        format=ModelFormat.CHECKPOINT,
        architecture=report.family,
        quantization=_checkpoint_quantization(report),
        context_length=report.context_length,
        size_bytes=report.weight_bytes,
        cache_bytes=report.cache.bytes_per_token if report.cache else None,
        experts=(report.experts.count, report.experts.per_token) if report.experts else None,
        capabilities=_checkpoint_capabilities(report, template),
        head=HeadFacts(
            declared_layers=report.mtp.declared,
            present=report.mtp.status is MTPStatus.PRESENT,
            driver=report.mtp.driver or "",
            place=report.mtp.place,
            grafted=report.mtp.place == "head_path",
        ),
        reasoning_switch=THINKING_SWITCH in template,
        problem=problem,
    )


def _checkpoint_capabilities(report: CheckpointReport, template: str) -> Facts:
    return {
        Capability.CHAT: CapabilityFact(bool(template), f"a chat template is {'present' if template else 'absent'}"),
        Capability.MTP: CapabilityFact(report.mtp.status is MTPStatus.PRESENT, head_evidence(report)),
        Capability.REASONING: reasoning_fact(template),
        Capability.TOOLS: CapabilityFact(False, "the MLX engine does not pass tools through yet"),
        Capability.JSON_SCHEMA: CapabilityFact(True, "the MLX engine masks what a format does not allow"),
        Capability.LOGPROBS: CapabilityFact(True, "the MLX engine returns them per token"),
        Capability.COUNT_TOKENS: CapabilityFact(True, "the tokenizer counts without generating"),
        Capability.TOKEN_PROMPT: CapabilityFact(True, "the MLX engine takes token ids"),
    }


def head_evidence(report: CheckpointReport) -> str:
    """One sentence on a checkpoint's multi-token-prediction head, with the key and a tensor that show it."""
    mtp = report.mtp
    declared = f"{mtp.declared_by} = {mtp.declared}" if mtp.declared_by else "nothing declared in config.json"
    match mtp.status:
        case MTPStatus.PRESENT:
            return f"{declared}; {len(mtp.tensors)} tensors, such as {mtp.evidence[0]}"
        case MTPStatus.INCOMPLETE:
            lacking = f"{len(mtp.missing)} tensors are absent, misshapen or not readable"
            return f"{declared}, but {lacking}, such as {mtp.missing[0]}"
        case MTPStatus.NO_DRIVER:
            return f"{declared}; {len(mtp.tensors)} tensors are there, but no driver for {report.family}"
        case MTPStatus.DECLARED_BUT_ABSENT:
            return f"declared but absent: {declared}, and no tensor of a head is in the files"
        case MTPStatus.NONE:
            return f"{declared}, and no tensor of a head in the files"


def _checkpoint_quantization(report: CheckpointReport) -> str:
    stored = report.quantization
    if stored is None:
        return "none"
    bits = f" {stored.bits}-bit" if stored.bits else ""
    group = f" group {stored.group_size}" if stored.group_size else ""
    return f"{stored.mode}{bits}{group}"


def _checkpoint_template(path: Path) -> str:
    """The chat template's text, from its own file or from the tokenizer's config; "" where there is none.

    Raises:
        RefusedFileError: as `read_untrusted`.
    """
    plain = _read_text(path / "chat_template.jinja")
    if plain:
        return plain
    for name in ("chat_template.json", "tokenizer_config.json"):
        try:
            template = json.loads(_read_text(path / name) or "{}").get("chat_template", "")
        except (ValueError, RecursionError, AttributeError):
            continue
        if isinstance(template, list):  # several named templates
            template = "\n".join(str(item.get("template", "")) for item in template if isinstance(item, dict))
        if isinstance(template, str) and template:
            return template
    return ""


def _read_text(path: Path) -> str:
    try:
        return read_untrusted(path, MAX_TEMPLATE_BYTES, allowed_roots(path.parent)).decode(errors="replace")
    except OSError:
        return ""


def _tools(template: str) -> CapabilityFact:
    reads = re.search(r"\btools\b", template) is not None
    return CapabilityFact(reads, "the chat template " + ("reads tools" if reads else "knows no tools"))


def reasoning_fact(template: str) -> CapabilityFact:
    """Whether a chat template knows thinking."""
    if THINKING_SWITCH in template:
        return CapabilityFact(True, f"the chat template reads {THINKING_SWITCH}")
    if "<think>" in template:
        return CapabilityFact(True, f"the chat template writes <think> and has no {THINKING_SWITCH} switch")
    return CapabilityFact(False, "the chat template knows no thinking")
