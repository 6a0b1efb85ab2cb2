"""The text that `mx.fast.metal_kernel` generates around a kernel, taken from MLX itself."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

_PARAMETER = re.compile(r"^  (?P<type>.+?) ?(?P<name>\w+) \[\[(?P<what>\w+)(?:\((?P<index>\d+)\))?\]\]", re.MULTILINE)


@functools.cache
def generated(
    name: str,
    input_names: tuple[str, ...],
    output_names: tuple[str, ...],
    source: str,
    header: str,
    forms: tuple[tuple[tuple[int, ...], mx.Dtype], ...],
    shapes: tuple[tuple[int, ...], ...],
    dtypes: tuple[mx.Dtype, ...],
) -> str:
    """The text that MLX would give to Metal's compiler after its preamble.

    MLX prints it while it records a launch for export, which it does without Metal too.
    """
    kernel = mx.fast.metal_kernel(
        name=name, input_names=input_names, output_names=output_names, source=source, header=header
    )

    def launch(*inputs: mx.array) -> list[mx.array]:
        return kernel(
            inputs=list(inputs),
            output_shapes=list(shapes),
            output_dtypes=list(dtypes),
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
            verbose=True,
        )

    with tempfile.TemporaryDirectory() as folder, _standard_output() as printed:
        mx.export_function(str(Path(folder) / "launch.mlxfn"), launch, *(mx.zeros(s, d) for s, d in forms))
    text = printed[0]
    return text[text.index("```\n") + 4 : text.rindex("\n```")]


@contextlib.contextmanager
def _standard_output() -> Iterator[list[str]]:
    """What C++ code writes to standard output."""
    printed: list[str] = []
    with tempfile.TemporaryFile() as file:
        kept = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            yield printed
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        file.seek(0)
        printed.append(file.read().decode())


def parameters(text: str) -> list[dict[str, str]]:
    """The parameters of the kernel that MLX generated: type, name, attribute and buffer index."""
    signature = text[text.rindex("[[kernel]] void ") :]
    return [m.groupdict() for m in _PARAMETER.finditer(signature[: signature.index(") {\n")])]
