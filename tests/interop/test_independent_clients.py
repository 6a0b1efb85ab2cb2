"""Clients that share no code with the project stream an answer: Node by the .proto files, Python by reflection."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from support.scripted import ScriptedBackend, catalog

from router.server import RouterServer
from router.settings import ServerSettings

NODE = Path(__file__).parent / "node"
PROTOS = Path(__file__).parents[2] / "protos"


@pytest.fixture
async def address():  # type: ignore[no-untyped-def]
    backend = ScriptedBackend()
    server = RouterServer(ServerSettings(listen="127.0.0.1:0", drain_grace=0.0), catalog(), {backend.name: backend})
    await server.start()
    yield server.address
    await server.drain()


async def run(*command: str, cwd: Path) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 300)
    assert process.returncode == 0, err.decode()
    return out.decode()


@pytest.mark.skipif(shutil.which("npm") is None and "CI" not in os.environ, reason="needs Node.js and npm")
async def test_a_node_client_streams_by_the_proto_files(address: str) -> None:
    if not (NODE / "node_modules").is_dir():
        await run("npm", "ci", "--no-audit", "--no-fund", "--loglevel=error", cwd=NODE)
    lines = await run("node", "stream.mjs", str(PROTOS), address, "tiny", "Hello", cwd=NODE)
    events = [json.loads(line) for line in lines.splitlines()]
    kinds = [event["event"] for event in events]
    assert (kinds[0], set(kinds[1:-1]), kinds[-1]) == ("started", {"delta"}, "finished")
    assert "".join(event["delta"]["text"] for event in events if event["event"] == "delta") == "Hello world"
    assert events[-1]["finished"]["reason"] == "FINISH_REASON_END_OF_GENERATION"


async def test_a_client_that_learns_the_contract_by_reflection_streams(address: str) -> None:
    def stream() -> list[str]:
        with grpc.insecure_channel(address) as channel:
            pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
            service = pool.FindServiceByName("mtp_router.generate.v1.GenerateService")
            method = service.FindMethodByName("StreamGenerate")
            request = message_factory.GetMessageClass(method.input_type)
            response = message_factory.GetMessageClass(method.output_type)
            call = channel.unary_stream(
                f"/{service.full_name}/{method.name}",
                request_serializer=request.SerializeToString,
                response_deserializer=response.FromString,
            )
            return [event.delta.text for event in call(request(input={"model": "tiny", "text": "Hi"}))]

    assert "".join(await asyncio.to_thread(stream)) == "Hello world"
