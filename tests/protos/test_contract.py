"""The contract: names agree with the domain, stubs are typed and installed apart."""

from __future__ import annotations

from enum import Enum
from importlib.metadata import files
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from mtp_router.generate import v1

from router import domain
from router.services.errors import CODES


@pytest.mark.parametrize(
    ("wire", "ours", "prefix"),
    [
        (v1.ErrorReason, domain.ErrorReason, "ERROR_REASON_"),
        (v1.FinishReason, domain.FinishReason, "FINISH_REASON_"),
        (v1.Replay, domain.Replay, "REPLAY_"),
        (v1.Capability, domain.Capability, "CAPABILITY_"),
        (v1.BackendKind, domain.BackendKind, "BACKEND_KIND_"),
        (v1.BackendState, domain.BackendState, "BACKEND_STATE_"),
        (v1.ModelState, domain.ModelState, "MODEL_STATE_"),
        (v1.ReasoningMode, domain.ReasoningMode, "REASONING_MODE_"),
        (v1.SpeculationMode, domain.SpeculationMode, "SPECULATION_MODE_"),
        (v1.Priority, domain.Priority, "PRIORITY_"),
        (v1.Role, domain.Role, "ROLE_"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_enums_agree(wire: object, ours: type[Enum], prefix: str) -> None:
    assert set(wire.keys()) - {f"{prefix}UNSPECIFIED"} == {prefix + item.name for item in ours}  # type: ignore[attr-defined]


def test_every_reason_has_a_status_code() -> None:
    assert set(CODES) == set(domain.ErrorReason)


def test_numbers_with_a_default_know_whether_they_are_set() -> None:
    for message in (v1.SamplingParameters, v1.Speculation, v1.Reasoning):
        for field in message.DESCRIPTOR.fields:
            if not field.is_repeated and field.enum_type is None:
                assert field.has_presence, f"{message.DESCRIPTOR.name}.{field.name}"


def test_the_wheel_carries_types_sources_and_descriptors() -> None:
    listed = {Path(str(file)).name for file in files("mtp-router-protos") or []}
    assert {"py.typed", "generate_pb2.pyi", "generate_service_pb2_grpc.pyi", "generate.proto"} <= listed
    packed = descriptor_pb2.FileDescriptorSet.FromString((Path(v1.__file__).parent / "descriptors.binpb").read_bytes())
    assert {file.package for file in packed.file} == {"mtp_router.generate.v1"}


def test_generated_code_is_not_in_the_source_tree() -> None:
    root = Path(__file__).parents[2]
    assert not list((root / "protos" / "mtp_router").rglob("*.py"))
    assert root not in Path(v1.__file__).parents or ".venv" in v1.__file__
