"""Compiles the shipped Metal texts for the host and runs them there, lane by lane, on watched memory.

The text is the one that MLX generates around a kernel's header and body for the arrays of a launch, taken from MLX.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from tests.metal_host.mlx_source import generated, parameters

HERE = Path(__file__).parent
COMPILER = "clang++-19"
CACHE = Path(tempfile.gettempdir()) / f"metal-host-{os.getuid()}"
# MLX compiles Metal 3.1, which is C++14.
_WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-attributes", "-Wno-unused", "-Wno-unused-parameter"]
_LANGUAGE = ["-std=c++14", "-nostdinc", "-Wdouble-promotion", *_WARNINGS]
# Calls before each load and store, also of what is written just after; they reach our runtime, not clang's.
_WATCHED = "-fsanitize=thread -fno-sanitize-link-runtime -mllvm -tsan-instrument-func-entry-exit=0"
_WATCHED += " -mllvm -tsan-instrument-read-before-write"
_CHECKED = "-fsanitize=array-bounds,shift,signed-integer-overflow,integer-divide-by-zero -fno-sanitize-recover=all"
_RUN = f"-O1 -fPIC -shared -nostdlib -ffp-contract=off -fno-stack-protector {_WATCHED} {_CHECKED}".split()
_ATTRIBUTES = {
    "thread_position_in_grid": "in_grid",
    "thread_position_in_threadgroup": "in_threadgroup",
    "threadgroup_position_in_grid": "threadgroup",
    "threads_per_threadgroup": "threads",
    "threads_per_grid": "grid",
    "threadgroups_per_grid": "groups",
    "thread_index_in_threadgroup": "index",
    "thread_index_in_simdgroup": "lane",
    "simdgroup_index_in_threadgroup": "simdgroup",
    "simdgroups_per_threadgroup": "simdgroups",
}
_SCALARS = ("index", "lane", "simdgroup", "simdgroups")
# The typed text is only checked: nothing calls an inline function, so no code is made of it.
_SOURCE = """#define TYPED
namespace typed {{
#include "{names}"
#line 1 "generated.metal"
{typed}
}}
#undef TYPED
#include "{names}"
#line 1 "generated.metal"
{text}
struct Position {{
  uint in_grid[3], in_threadgroup[3], threadgroup_[3], threads[3], grid[3], groups[3];
  uint index, lane, simdgroup, simdgroups;
}};
extern "C" char __start_threadgroup_memory[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_threadgroup_memory[] __attribute__((weak, visibility("hidden")));
extern "C" char* host_shared(int end) {{ return end ? __stop_threadgroup_memory : __start_threadgroup_memory; }}
extern "C" __attribute__((no_sanitize("thread"))) void host_lane(void** buffers, const Position& at) {{
  {kernel}({arguments});
}}
"""


class MetalFault(RuntimeError):
    """A lane did what it must not: the text says which and what."""


class MetalSyntaxError(ValueError):
    """The text does not compile; with typed address spaces or without."""


@dataclass(frozen=True, eq=False)
class Host:
    """A stand-in for `mx.fast.metal_kernel`; see `mtp_kernels.launch.metal_through`.

    Attributes:
        swaps: (old, new) pairs to plant a bug; each old text must occur once in some kernel's text, and never twice.
        flags: further compiler flags.
        swapped: how often each swap was made.
        launched: kernels launched, by name without digest.
    """

    swaps: tuple[tuple[str, str], ...] = ()
    flags: tuple[str, ...] = ()
    swapped: dict[str, int] = field(default_factory=dict)
    launched: dict[str, int] = field(default_factory=dict)

    def __call__(
        self, *, name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, header: str
    ) -> HostLaunch:
        for old, new in self.swaps:
            found = header.count(old) + source.count(old)
            if found > 1:
                raise AssertionError(f"{name} holds {found} times, not once: {old!r}")
            self.swapped[old] = self.swapped.get(old, 0) + found
            header, source = header.replace(old, new), source.replace(old, new)
        return HostLaunch(self, name, tuple(input_names), tuple(output_names), source, header)


@dataclass(frozen=True)
class HostLaunch:
    """One kernel; see `mtp_kernels.launch.Launch`."""

    host: Host
    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
    ) -> list[mx.array]:
        text = self.generated(inputs, output_shapes, output_dtypes)
        buffers = self._buffers(text, inputs, output_shapes, output_dtypes)
        results = run(text, self.host.flags, buffers, grid, threadgroup)
        kind = re.sub(r"^mtp_|_[0-9a-f]{12}$", "", self.name)
        self.host.launched[kind] = self.host.launched.get(kind, 0) + 1
        return [
            _to_mlx(data, shape, dtype)
            for data, shape, dtype in zip(results, output_shapes, output_dtypes, strict=True)
        ]

    def generated(
        self, inputs: Sequence[mx.array], shapes: Sequence[tuple[int, ...]], dtypes: Sequence[mx.Dtype]
    ) -> str:
        """The text that MLX would give to Metal's compiler after its preamble."""
        forms = tuple((a.shape, a.dtype) for a in inputs)
        return generated(
            self.name,
            self.input_names,
            self.output_names,
            self.source,
            self.header,
            forms,
            tuple(shapes),
            tuple(dtypes),
        )

    def _buffers(
        self, text: str, inputs: Sequence[mx.array], shapes: Sequence[tuple[int, ...]], dtypes: Sequence[mx.Dtype]
    ) -> list[Buffer]:
        given = dict(zip(self.input_names, inputs, strict=True))
        sizes = {
            name: int(np.prod(shape)) * dtype.size
            for name, shape, dtype in zip(self.output_names, shapes, dtypes, strict=True)
        }
        buffers = []
        for name in [p["name"] for p in parameters(text) if p["index"]]:
            if name in sizes:
                buffers.append(Buffer(name, bytes(sizes[name]), output=True))
            elif name in given:
                buffers.append(Buffer(name, _to_bytes(given[name])))
            else:
                array, what = name.rsplit("_", 1)
                shape = given[array].shape
                facts = {"shape": np.array(shape, np.int32), "ndim": np.array(len(shape), np.int32)}
                facts["strides"] = np.cumprod([1, *shape[:0:-1]])[::-1].astype(np.int64)  # inputs are made contiguous
                buffers.append(Buffer(name, facts[what].tobytes()))
        return buffers


@dataclass(frozen=True)
class Buffer:
    """One argument that points into memory."""

    name: str
    data: bytes
    output: bool = False


def run(
    text: str,
    flags: tuple[str, ...],
    buffers: Sequence[Buffer],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
) -> list[bytes]:
    """Checks, compiles and runs a generated text; what each output buffer then holds.

    Raises:
        MetalSyntaxError: it does not compile.
        MetalFault: a lane read or wrote where it must not, raced with another, or missed a barrier.
    """
    runtime, library = _runtime(), ctypes.CDLL(str(compiled(text, flags)))
    at = []
    for i, b in enumerate(buffers):
        at.append(runtime.mtl_buffer(i, b.data, len(b.data), int(b.output), b.name.encode()))
        if not at[-1]:
            raise MemoryError(f"no room for {b.name}, {len(b.data)} bytes")
    error = ctypes.create_string_buffer(1024)
    library.host_shared.restype = ctypes.c_void_p
    shared = [ctypes.c_void_p(library.host_shared(end)) for end in (0, 1)]
    sizes = [(ctypes.c_uint32 * 3)(*size) for size in (grid, threadgroup)]
    if runtime.mtl_launch(library.host_lane, *shared, len(buffers), *sizes, error, len(error)):
        raise MetalFault(error.value.decode())
    return [ctypes.string_at(a, len(b.data)) for a, b in zip(at, buffers, strict=True) if b.output]


def compiled(text: str, flags: tuple[str, ...] = ()) -> Path:
    """A library with the kernel, from an earlier run where nothing has changed."""
    # A macro cannot tell a variable in threadgroup memory, which all lanes share, from a pointer into it.
    text = re.sub(r"(?m)((?:^|[;{}])\s*)(threadgroup [^*&;=(]*\[)", r"\1threadgroup_variable \2", text)
    names = HERE / "metal_names.h"
    whole = _SOURCE.format(
        names=names, typed=text.replace("[[kernel]] void", "[[kernel]] inline void"), text=text, **_call(text)
    )
    digest = hashlib.sha256("\0".join([whole, names.read_text(), *_LANGUAGE, *_RUN, *flags]).encode()).hexdigest()[:24]
    library = CACHE / f"{digest}.so"
    if library.exists():
        return library
    CACHE.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        source, linked = (Path(folder) / f"kernel.{end}" for end in ("cpp", "so"))
        source.write_text(whole)
        _clang([*_LANGUAGE, *_RUN, *flags, str(source), "-o", str(linked)])
        linked.replace(library)
    return library


def _call(text: str) -> dict[str, str]:
    """The kernel's name, and its arguments from buffers and a lane's position."""
    kernel = re.search(r"\[\[kernel\]\] void (\w+)\(", text)
    assert kernel, text
    arguments = []
    for number, p in enumerate(p for p in parameters(text)):
        if p["index"]:
            assert int(p["index"]) == number, text
            pointer = p["type"].rstrip("&* ") + "*"
            arguments.append(("*" if p["type"].endswith("&") else "") + f"({pointer})buffers[{number}]")
        else:
            name = _ATTRIBUTES[p["what"]]
            three = f"{{at.{name}[0], at.{name}[1], at.{name}[2]}}".replace("at.threadgroup[", "at.threadgroup_[")
            arguments.append(f"at.{name}" if name in _SCALARS else f"uint3{three}")
    return {"kernel": kernel[1], "arguments": ", ".join(arguments)}


def available() -> str | None:
    """None where kernels run on the host, else what to do."""
    if sys.platform != "linux":
        return "the host harness runs on Linux; on a Mac, benchmarks/gpu_checks.py runs the kernels themselves"
    if shutil.which(COMPILER):
        return None
    return f"{COMPILER} is not installed; on Debian: apt-get install clang-19"


def _clang(arguments: list[str]) -> None:
    done = subprocess.run([COMPILER, *arguments], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise MetalSyntaxError(done.stderr[:2000])


@functools.cache
def _runtime() -> ctypes.CDLL:
    source = HERE / "runtime.cpp"
    library = CACHE / f"runtime-{hashlib.sha256(source.read_bytes()).hexdigest()[:24]}.so"
    if not library.exists():
        CACHE.mkdir(mode=0o700, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        _clang(["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", str(source), "-lm", "-o", str(partial)])
        partial.replace(library)
    runtime = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    runtime.mtl_buffer.restype = ctypes.c_void_p
    runtime.mtl_buffer.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p]
    return runtime


def _to_bytes(array: mx.array) -> bytes:
    flat = array.flatten()
    return np.array(flat.view(mx.uint16) if flat.dtype == mx.bfloat16 else flat).tobytes()


def _to_mlx(data: bytes, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.array(np.frombuffer(data, np.uint8)).view(dtype).reshape(shape)
