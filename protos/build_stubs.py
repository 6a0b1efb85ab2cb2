"""Build hook of the stub wheel: runs protoc over mtp_router/**/*.proto into a temporary folder and packs the result."""

from __future__ import annotations

import shutil
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2
from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "mtp_router/generate/v1"
HEADER = '"""The contract of mtp-router: every message, enum, stub and servicer of `mtp_router.generate.v1`."""\n\n'


class StubBuildHook(BuildHookInterface):
    """Adds the generated modules to the wheel, so that generated code never stands in the source tree."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generates the stubs; `build_data["force_include"]` carries them into the wheel."""
        self.folder = Path(tempfile.mkdtemp(prefix="mtp-router-stubs-"))
        generate(Path(self.root), self.folder)
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                build_data["force_include"][str(path)] = str(path.relative_to(self.folder))

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Removes the temporary folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def generate(root: Path, out: Path) -> None:
    """Runs protoc on every contract file under `root`. Raises RuntimeError where protoc fails."""
    sources = sorted(str(path.relative_to(root)) for path in (root / PACKAGE).glob("*.proto"))
    descriptors = out / PACKAGE / "descriptors.binpb"
    descriptors.parent.mkdir(parents=True)
    bundled = distribution("grpcio-tools").locate_file("grpc_tools/_proto")
    command = [
        "protoc",
        f"-I{root}",
        f"-I{root / 'third_party'}",
        f"-I{bundled}",
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--plugin=protoc-gen-mypy={_script('protoc-gen-mypy')}",
        f"--plugin=protoc-gen-mypy_grpc={_script('protoc-gen-mypy_grpc')}",
        f"--mypy_out={out}",
        f"--mypy_grpc_out={out}",
        f"--descriptor_set_out={descriptors}",
        *sources,
    ]
    if protoc.main(command) != 0:
        raise RuntimeError("protoc failed; see its messages above")
    (out / PACKAGE / "__init__.py").write_text(HEADER + _exports(descriptors.read_bytes()))


def _script(name: str) -> str:
    """Path of a console script of the build environment, which need not be on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} is not installed beside {sys.executable}")
    return found


def _exports(descriptors: bytes) -> str:
    """Import lines that lift every public name out of the generated modules."""
    lines, names = [], []
    for file in descriptor_pb2.FileDescriptorSet.FromString(descriptors).file:
        module = Path(file.name).stem + "_pb2"
        public = [message.name for message in file.message_type]
        for enum in file.enum_type:
            public += [enum.name, *(value.name for value in enum.value)]
        lines += [f"from .{module} import {name} as {name}\n" for name in public]
        names += public
        for service in file.service:
            public = [f"{service.name}Stub", f"{service.name}Servicer", f"add_{service.name}Servicer_to_server"]
            lines += [f"from .{module}_grpc import {name} as {name}\n" for name in public]
            names += public
    return "".join(lines) + "\n__all__ = [\n" + "".join(f'    "{name}",\n' for name in sorted(names)) + "]\n"
