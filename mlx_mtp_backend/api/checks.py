"""What a value must be, told by its field."""

from __future__ import annotations

from mlx_mtp_backend.errors import EngineError, ErrorReason


def require(ok: bool, field_name: str, wants: str) -> None:
    """Raises EngineError INVALID_PARAMS where a field is not what it must be."""
    if not ok:
        raise EngineError(ErrorReason.INVALID_PARAMS, f"{field_name} must be {wants}", field=field_name)
