"""Settings of models, and of the sampling that a request leaves open."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from router.settings.table import OLLAMA_TAG, BackendName, ModelName, Table

DEFAULT_DRAFT_DEPTH = 3  # where a backend drafts a fixed number of tokens


class SamplingSettings(Table):
    """`[sampling]` and `[models.NAME.sampling]`: what a request gets where it leaves a number unset."""

    temperature: float | None = Field(None, ge=0.0, le=10.0)
    top_p: float | None = Field(None, ge=1e-6, le=1.0)
    top_k: int | None = Field(None, ge=0, le=1_000_000)
    min_p: float | None = Field(None, ge=0.0, lt=1.0)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10.0)
    presence_penalty: float | None = Field(None, ge=-10.0, le=10.0)
    frequency_penalty: float | None = Field(None, ge=-10.0, le=10.0)
    max_output_tokens: int | None = Field(None, ge=1, le=1_048_576)

    @field_validator("temperature")
    @classmethod
    def _not_tiny(cls, value: float | None) -> float | None:
        if value is not None and 0.0 < value < 1e-6:
            raise ValueError("must be 0 or at least 1e-6")
        return value


class ModelSettings(Table):
    """`[models.NAME]`: one model to serve."""

    path: Path | None = Field(
        None,
        description="GGUF file or checkpoint folder; relative to the settings file, else to the data folder",
    )
    ollama: Annotated[str, StringConstraints(pattern=f"^{OLLAMA_TAG}$")] | None = Field(
        None, description="tag of a model that Ollama keeps, instead of a path"
    )
    llama_server: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="alias or file name by which a llama-server serves the model, instead of a path; checked there",
    )
    gguf: Path | None = Field(
        None, description="the same model as GGUF, for where its checkpoint has no head or no fast device"
    )
    head_path: Path | None = Field(
        None, description="where a checkpoint's head lies, if not in it: a safetensors file or the original's folder"
    )
    aliases: tuple[ModelName, ...] = ()
    fallbacks: tuple[ModelName, ...] = Field(
        (), max_length=8, description="models that answer in its place, in this order, where it cannot be served"
    )
    backend: BackendName | None = Field(None, description="backend to use; unset: chosen by what the files can do")
    context_length: int | None = Field(
        None, ge=16, le=2**24, description="tokens of context, at most the model's own; unset: up to 8192"
    )
    speculation: Literal["auto", "off"] = Field("auto", description="draft with the checkpoint's head where it has one")
    draft_depth: Annotated[int, Field(ge=1, le=16)] | Literal["auto"] = Field(
        "auto",
        description="tokens drafted a round where a request does not say; auto: what pays on the MLX engine, else 3",
    )
    keep_alive: float | None = Field(
        None, ge=0.0, description="seconds that it stays loaded while idle, instead of scheduler.keep_alive"
    )
    pin: bool = Field(False, description="once loaded it stays, however much its memory is needed")
    preload: bool = Field(False, description="load it when the server starts")
    sampling: SamplingSettings = SamplingSettings()

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        places = [self.path, self.ollama, self.llama_server]
        if sum(place is not None for place in places) != 1:
            raise ValueError("needs one of path, ollama or llama_server, and only one")
        if self.path is None and (self.gguf is not None or self.head_path is not None):
            raise ValueError("gguf and head_path go with a path")
        if self.path is None and (self.keep_alive is not None or self.pin):
            raise ValueError("keep_alive and pin go with a path: another server keeps this model as it is told there")
        return self

    @property
    def fixed_draft_depth(self) -> int:
        """Tokens drafted a round where the backend cannot choose."""
        return DEFAULT_DRAFT_DEPTH if self.draft_depth == "auto" else self.draft_depth

    @property
    def kept_as(self) -> str:
        """The name by which another server keeps it; "" for one with a path."""
        return self.ollama or self.llama_server or ""
