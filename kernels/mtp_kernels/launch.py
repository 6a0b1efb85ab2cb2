"""From a kernel's source text to a callable launch.

A CUDA kernel here is a file of device functions (`kernel.cu`) and a one-statement body that names the template
arguments. MLX looks compiled code up by kernel name alone, so the name carries a digest of everything compiled.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Hashable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol, cast

import mlx.core as mx

SHARED_MEMORY_BYTES = 232_448
"""Shared memory that one block may use on compute capability 9.0 (227 KiB)."""


class Launch(Protocol):
    """What `mx.fast.cuda_kernel` returns."""

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
    ) -> list[mx.array]: ...


class MetalCompiler(Hashable, Protocol):
    """What `mx.fast.metal_kernel` is."""

    def __call__(
        self, *, name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, header: str
    ) -> Launch: ...


_other_compiler: ContextVar[MetalCompiler | None] = ContextVar("other_compiler", default=None)


@contextlib.contextmanager
def metal_through(compiler: MetalCompiler) -> Iterator[None]:
    """While the context lasts, `compiler` builds Metal kernels in MLX's place and `platform` says metal."""
    token = _other_compiler.set(compiler)
    try:
        yield
    finally:
        _other_compiler.reset(token)


METAL_TYPES = {mx.bfloat16: "bfloat16_t", mx.float16: "half", mx.float32: "float"}
CUDA_TYPES = {mx.bfloat16: "__nv_bfloat16", mx.float16: "__half", mx.float32: "float"}


@functools.cache
def source_text(package_file: str, name: str) -> str:
    """Text of `name` beside the module at `package_file`."""
    return (Path(package_file).parent / name).read_text(encoding="utf-8")


def version_of(*texts: str) -> str:
    """Short digest that changes with any of the texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


@functools.cache
def cuda_launch(
    name: str,
    package_file: str,
    body: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    shared_memory: int = 0,
    threads: int = 0,
    common: tuple[str, ...] = (),
    source: str = "kernel.cu",
) -> Launch:
    """Callable for one CUDA kernel, compiled at its first evaluation.

    The device functions of `source` beside `package_file`, and the `common` texts of this package before them, are
    included by path: MLX hashes the text that it is given at every launch, which for whole kernels takes longer than
    anything else on the host. `shared_memory` is dynamic shared memory in bytes. MLX asks for more than 48,000 bytes
    only once for each name, so the name carries that figure too. `threads` bounds a block: without it the compiler may
    give a thread more registers than a large block has, and MLX's signature says none, so the word that opens it is
    defined anew.
    """
    files = [*(Path(__file__).parent / name for name in common), Path(package_file).with_name(source)]
    header = "".join(f'#include "{file.resolve().as_posix()}"\n' for file in files)
    if threads:
        header += f"#undef __global__\n#define __global__ __attribute__((global)) __launch_bounds__({threads}, 1)\n"
    texts = [source_text(str(file), file.name) for file in files]
    digest = version_of(*texts, body, ",".join(inputs), ",".join(outputs), str(shared_memory), str(threads))
    kernel = mx.fast.cuda_kernel(
        name=f"mtp_{name}_{digest}",
        input_names=list(inputs),
        output_names=list(outputs),
        source=body,
        header=header,
        shared_memory=shared_memory,
    )
    return cast(Launch, kernel)


def metal_launch(name: str, header: str, body: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Launch:
    """Callable for one Metal kernel, compiled at its first evaluation."""
    compiler = _other_compiler.get() or cast(MetalCompiler, mx.fast.metal_kernel)
    return _metal_launch(compiler, name, header, body, inputs, outputs)


@functools.cache
def _metal_launch(
    compiler: MetalCompiler, name: str, header: str, body: str, inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> Launch:
    digest = version_of(header, body, ",".join(inputs), ",".join(outputs))
    return compiler(name=f"mtp_{name}_{digest}", input_names=inputs, output_names=outputs, source=body, header=header)


def stands_in() -> bool:
    """Whether something runs launches in MLX's place: at once, on copies of their arrays."""
    return _other_compiler.get() is not None


def host_ints(array: mx.array) -> list[int]:
    """The integers of a one-dimensional array, evaluated."""
    return cast(list[int], array.tolist())


def platform() -> str:
    """`cuda`, `metal` or `cpu`: where custom kernels run."""
    return "metal" if _other_compiler.get() else _device_platform()


@functools.cache
def _device_platform() -> str:
    if mx.default_device() != mx.Device(mx.gpu):
        return "cpu"
    if mx.cuda.is_available():
        return "cuda"
    return "metal" if mx.metal.is_available() else "cpu"


@functools.cache
def multiprocessors() -> int:
    """Multiprocessors of the default device; 132 (H100) where MLX does not say. Sizes grids, never results."""
    info = mx.device_info()
    return int(info.get("multi_processor_count", info.get("multiprocessor_count", 132)))
