"""What every table of the settings shares: unknown keys are refused, and names are plain."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints

# Names travel in logs, health names and error metadata, so they are kept plain.
MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}"
OLLAMA_TAG = r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,255}"
ModelName = Annotated[str, StringConstraints(pattern=f"^{MODEL_NAME}$")]
BackendName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]


class Table(BaseModel):
    """A table of the settings file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
