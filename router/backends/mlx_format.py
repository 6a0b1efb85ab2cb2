"""Response formats on their way to the MLX engine: what they bind; and what takes time before a request can start."""

from __future__ import annotations

import mlx_mtp_backend as engine
from mlx_mtp_backend.language.text import ModelText
from router.backends.mlx_answer import router_error
from router.backends.thinking import CLOSE, ThinkSplitter
from router.domain import Capability, ErrorReason, FormatKind, GenerationRequest, ReasoningMode, RouterError

KINDS = {
    FormatKind.JSON_SCHEMA: engine.FormatKind.JSON_SCHEMA,
    FormatKind.JSON_OBJECT: engine.FormatKind.JSON_SCHEMA,
    FormatKind.REGEX: engine.FormatKind.REGEX,
    FormatKind.GRAMMAR: engine.FormatKind.LARK,
}


def response_format(
    text: ModelText, request: GenerationRequest, splitter: ThinkSplitter | None, model: str
) -> engine.ResponseFormat | None:
    """The request's response format as the engine takes it, which compiles it.

    Args:
        splitter: knows whether the prompt makes the model start in thought.

    Raises:
        RouterError: CAPABILITY_UNAVAILABLE where the answer cannot be told from the thought before it.
    """
    if request.response_format is None:
        return None
    kind = request.response_format.kind
    rule = '{"type": "object"}' if kind is FormatKind.JSON_OBJECT else request.response_format.rule
    return engine.ResponseFormat(KINDS[kind], rule, after=_thought_end(text, request, splitter, model))


def read_vocabulary(text: ModelText, model: str) -> None:
    """Makes tokens' bytes ready to be told. May take a second: call it off the event loop. Raises RouterError."""
    try:
        text.token_bytes(0)
    except engine.EngineError as error:
        raise router_error(error, model) from None


def _thought_end(text: ModelText, request: GenerationRequest, splitter: ThinkSplitter | None, model: str) -> int | None:
    """The token that ends the thought a reply starts in, if it does: the format binds the answer after it."""
    close = text.encode(CLOSE)
    in_thought = splitter is not None and splitter.thinking
    if in_thought and len(close) == 1:
        return close[0]
    if not in_thought and request.reasoning is not ReasoningMode.ON:
        return None
    why = "the end of its thoughts is not one token" if in_thought else "its template does not open a thought"
    raise RouterError(
        ErrorReason.CAPABILITY_UNAVAILABLE,
        f"model {model!r} cannot think before an answer in a response format: {why}",
        metadata={"model": model, "capability": Capability.REASONING.name},
    )
