"""What has come of one stream so far, and the check that it keeps the contract's order. No I/O."""

from __future__ import annotations

from mtp_router.generate import v1

from router.client.errors import ProtocolError


class AnswerRecord:
    """Takes the events of one stream in order: progress*, started, delta*, finished."""

    def __init__(self) -> None:
        self._started: v1.GenerationStarted | None = None
        self._finished: v1.GenerationFinished | None = None
        self._text: list[str] = []
        self._reasoning_text: list[str] = []

    @property
    def started(self) -> v1.GenerationStarted | None:
        """What answers and why; None before the first token."""
        return self._started

    @property
    def finished(self) -> v1.GenerationFinished | None:
        """How the answer ended, with its statistics; None before its end."""
        return self._finished

    @property
    def text(self) -> str:
        """The answer's text so far."""
        return "".join(self._text)

    @property
    def reasoning_text(self) -> str:
        """The text of the model's thinking so far."""
        return "".join(self._reasoning_text)

    def _observe(self, event: v1.StreamGenerateResponse) -> bool:
        """Takes the next event. False: the event is of a kind that this client does not know."""
        kind = event.WhichOneof("event")
        if kind is None:
            return False
        if self._finished is not None:
            raise ProtocolError(f"the server sent {kind} after finished")
        if kind == "started":
            if self._started is not None:
                raise ProtocolError("the server sent started twice")
            self._started = event.started
        elif kind != "progress" and self._started is None:
            raise ProtocolError(f"the server sent {kind} before started")
        if kind == "delta":
            self._text.append(event.delta.text)
            self._reasoning_text.append(event.delta.reasoning_text)
        elif kind == "finished":
            self._finished = event.finished
        return True

    def _end(self) -> None:
        """The stream ended with status OK."""
        if self._finished is None:
            raise ProtocolError("the server ended the stream without finished: the text may be incomplete")
