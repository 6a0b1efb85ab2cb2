"""What routing knows: the facts of a model, what backends offer and how they fare, and the route it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum

from router.domain.errors import ErrorReason, RouterError


class BackendKind(StrEnum):
    """Which kind of backend answers; the values are those of the settings file."""

    MLX = "mlx"
    LLAMA_CPP = "llama_cpp"
    OLLAMA = "ollama"


class Capability(Enum):
    """What a model may be able to do."""

    CHAT = "chat"
    MTP = "mtp"
    REASONING = "reasoning"
    TOOLS = "tools"
    JSON_SCHEMA = "json_schema"
    LOGPROBS = "logprobs"
    COUNT_TOKENS = "count_tokens"
    TOKEN_PROMPT = "token_prompt"


@dataclass(frozen=True, slots=True)
class CapabilityFact:
    """Whether a model can do one thing (None: not known yet), and the file, key or tensor that shows it."""

    supported: bool | None
    evidence: str


class ModelFormat(Enum):
    """What a model's files are."""

    GGUF = "gguf"
    CHECKPOINT = "checkpoint"  # a folder of safetensors files with a config.json
    OLLAMA = "ollama"  # kept by an Ollama server under a tag
    LLAMA_SERVER = "llama_server"  # served by a llama-server that somebody else started


@dataclass(frozen=True, slots=True)
class HeadFacts:
    """A multi-token-prediction head: layers that are declared, whether their tensors are there (None: not told), what
    runs them ("": nothing here), where they lie ("": nowhere), whether they are another checkpoint's, and what its
    check found amiss when it was loaded ("": nothing, or it was not loaded).
    """

    declared_layers: int
    present: bool | None
    driver: str = ""
    place: str = ""
    grafted: bool = False
    warning: str = ""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model's files without loading them.

    `reasoning_switch` tells whether thinking can be switched on and off; `problem`, why the model cannot be served;
    `cache_bytes`, what a token of context takes in the key and value caches; `experts`, of a layer and how many of them
    a token goes to, None where its layers are dense or not known; `stamp`, when which files were written.
    """

    format: ModelFormat = ModelFormat.GGUF
    architecture: str = ""
    quantization: str = ""
    context_length: int | None = None
    size_bytes: int | None = None
    cache_bytes: int | None = None
    capabilities: Mapping[Capability, CapabilityFact] = field(default_factory=dict)
    reasoning_switch: bool = False
    problem: str = ""
    head: HeadFacts | None = None
    experts: tuple[int, int] | None = None
    stamp: tuple[tuple[str, int, int], ...] = ()

    def can(self, capability: Capability) -> bool:
        """Whether the capability is shown to be there; False where it is not known."""
        fact = self.capabilities.get(capability)
        return fact is not None and fact.supported is True

    def knows_not(self, capability: Capability) -> bool:
        """Whether the capability was asked about and the answer does not tell."""
        fact = self.capabilities.get(capability)
        return fact is not None and fact.supported is None


@dataclass(frozen=True, slots=True)
class Route:
    """What answers a request, and why in one sentence.

    `fallback_cause` tells why the requested model itself could not, where one of its fallbacks answers.
    """

    requested_model: str
    model: str
    backend: str
    kind: BackendKind
    reason: str
    fallback_cause: ErrorReason | None = None


@dataclass(frozen=True, slots=True)
class Drafting:
    """How a backend drafts for a model: `fixed_depth` tokens a round for every request, or, if None, as asked."""

    fixed_depth: int | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """What a backend offers to routing: its kind, why it cannot be used here if so, and what to know of it.

    `failed` tells that it could be used before: a restart may help. `external` tells that it serves what it was started
    with, not files of this machine.
    """

    kind: BackendKind
    refusal: str = ""
    remark: str = ""
    failed: bool = False
    external: bool = False

    @property
    def serves(self) -> ModelFormat:
        """The models that it takes."""
        match self.kind:
            case BackendKind.MLX:
                return ModelFormat.CHECKPOINT
            case BackendKind.OLLAMA:
                return ModelFormat.OLLAMA
            case BackendKind.LLAMA_CPP:
                return ModelFormat.LLAMA_SERVER if self.external else ModelFormat.GGUF


class ModelState(Enum):
    """Whether a model is in memory."""

    COLD = "cold"
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"
    FAILED = "failed"


class BackendState(Enum):
    """Whether a backend can take requests."""

    READY = "ready"
    STARTING = "starting"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """Health of one backend. `retry_after` is set where it is down and will be tried again.

    `suspect_heads` names the models in memory whose prediction head looks wrong (see `HeadFacts.warning`).
    """

    name: str
    kind: BackendKind
    state: BackendState
    version: str = ""
    error: RouterError | None = None
    active_requests: int = 0
    queued_requests: int = 0
    loaded_models: tuple[str, ...] = ()
    suspect_heads: tuple[str, ...] = ()
    restarts: int = 0
    retry_after: float | None = None
