"""The official client, made safe for a service, and its failures as the router's errors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator

import httpx
import ollama
from ollama import ResponseError

from router.backends.llama_answer import prompt_too_long
from router.backends.llama_request import invalid
from router.backends.ollama_answer import broken_stream, nested_error
from router.backends.one_shot import OneShot
from router.domain import ErrorReason, GenerationRequest, RouterError
from router.settings import OllamaSettings

logger = logging.getLogger(__name__)

WRITE_TIMEOUT = 30.0
QUESTION_TIMEOUT = 10.0
MAX_LINE_BYTES = 16 * 2**20  # a list of many tags is one line; nothing else comes near
RETRY_AFTER = 1.0
MAX_LOGGED = 400  # characters of what Ollama said


class LineTooLongError(httpx.RemoteProtocolError):
    """The server sent more without a line's end than any answer of Ollama has."""


def new_client(settings: OllamaSettings) -> ollama.AsyncClient:
    """A client for one server: no redirects, no proxies, bounded lines; the caller times silence."""
    return ollama.AsyncClient(
        settings.host,
        follow_redirects=False,
        trust_env=False,
        timeout=httpx.Timeout(None, connect=settings.connect_timeout, write=WRITE_TIMEOUT),
        transport=_Bounded(OneShot(httpx.create_ssl_context())),
    )


async def list_tags(settings: OllamaSettings) -> list[str]:
    """Tags of the models that a server has. Raises RouterError where it cannot be asked."""
    client = new_client(settings)
    try:
        with failures("the server"):
            async with asyncio.timeout(QUESTION_TIMEOUT):
                listed = await client.list()
    except TimeoutError:
        raise RouterError(ErrorReason.BACKEND_STALLED, "Ollama does not answer") from None
    finally:
        await client.close()  # type: ignore[no-untyped-call]
    return sorted(model.model for model in listed.models if model.model)


@contextlib.contextmanager
def failures(tag: str, request: GenerationRequest | None = None) -> Iterator[None]:
    """Turns whatever the client raises in the block, before the first token, into a RouterError."""
    try:
        yield
    except ResponseError as error:
        logger.warning("Ollama answered %s for %s: %s", error.status_code, tag, error.error[:MAX_LOGGED])
        raise refusal(error, tag, request) from None
    except LineTooLongError:
        raise broken_stream() from None
    except (ConnectionError, httpx.HTTPError):
        raise unreachable() from None
    except (ValueError, TypeError, AttributeError, RecursionError):  # its JSON, or its shape, is not Ollama's
        raise broken_stream() from None


@contextlib.contextmanager
def interruptions(tag: str) -> Iterator[None]:
    """As `failures`, once tokens have come: nothing that happens then can be tried again."""
    try:
        yield
    except ResponseError as error:
        logger.warning("Ollama broke off the answer of %s: %s", tag, error.error[:MAX_LOGGED])
        raise RouterError(ErrorReason.BACKEND_FAILED, "Ollama broke off the answer") from None
    except (ConnectionError, httpx.HTTPError):
        raise RouterError(ErrorReason.BACKEND_FAILED, "Ollama went away in the middle of the answer") from None
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise broken_stream() from None


def refusal(error: ResponseError, tag: str, request: GenerationRequest | None = None) -> RouterError:
    """The router's error for one that Ollama reported; its text stays here."""
    text = error.error
    nested = nested_error(text)
    if nested.get("type") == "exceed_context_size_error":
        return _too_long(nested.get("n_prompt_tokens"), nested.get("n_ctx"))
    if "requires more system memory" in text:
        return RouterError(
            ErrorReason.MEMORY_BUDGET, f"Ollama lacks the memory for {tag!r}", metadata={"tag": tag}, retry_after=None
        )
    match error.status_code:
        case 404:
            problem = f"Ollama has no model {tag!r}; `ollama pull {tag}` there fetches it"
            return RouterError(ErrorReason.MODEL_LOAD_FAILED, problem, metadata={"tag": tag})
        case 429 | 503:
            return RouterError(ErrorReason.QUEUE_FULL, "Ollama takes no more requests now", retry_after=RETRY_AFTER)
        case 401 | 403:
            return RouterError(ErrorReason.BACKEND_UNAVAILABLE, "Ollama wants a key that the router does not have")
        case status if 300 <= status < 400:
            return RouterError(
                ErrorReason.BACKEND_UNAVAILABLE, "something at Ollama's address sends requests elsewhere"
            )
    if "invalid format" in text or (
        error.status_code == httpx.codes.BAD_REQUEST and request and request.response_format
    ):
        kind = request.response_format.kind.value if request and request.response_format else "json_schema"
        return invalid(f"response_format.{kind}", "Ollama cannot follow this rule")
    if error.status_code == httpx.codes.BAD_REQUEST or text.startswith("option "):
        return RouterError(ErrorReason.INVALID_REQUEST, "Ollama refused the request")
    if error.status_code == -1:
        return RouterError(
            ErrorReason.BACKEND_UNAVAILABLE, "Ollama failed before the first token", retry_after=RETRY_AFTER
        )
    problem = f"Ollama could not load or run {tag!r}; its log says why"
    return RouterError(ErrorReason.MODEL_LOAD_FAILED, problem, metadata={"tag": tag})


def unreachable() -> RouterError:
    """The error for a server that is not there, or went away before the first token."""
    return RouterError(ErrorReason.BACKEND_UNAVAILABLE, "Ollama cannot be reached", retry_after=RETRY_AFTER)


def _too_long(prompt_tokens: object, context_length: object) -> RouterError:
    if isinstance(prompt_tokens, int) and isinstance(context_length, int):
        return prompt_too_long(prompt_tokens, context_length)
    return broken_stream()


class _Bounded(httpx.AsyncBaseTransport):
    """Gives up on a response whose line has no end."""

    def __init__(self, inner: httpx.AsyncBaseTransport) -> None:
        self._inner = inner

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._inner.handle_async_request(request)
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _BoundedStream(response.stream)
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


class _BoundedStream(httpx.AsyncByteStream):
    def __init__(self, inner: httpx.AsyncByteStream) -> None:
        self._inner = inner

    async def __aiter__(self) -> AsyncIterator[bytes]:
        length = 0
        async for piece in self._inner:
            end = piece.rfind(b"\n")
            length = length + len(piece) if end < 0 else len(piece) - end - 1
            if length > MAX_LINE_BYTES:
                raise LineTooLongError("a line has no end")
            yield piece

    async def aclose(self) -> None:
        await self._inner.aclose()
