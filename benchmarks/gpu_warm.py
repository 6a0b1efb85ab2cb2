"""Compiles MLX's slow operations in processes of their own: `python benchmarks/gpu_warm.py OPERATION`.

MLX keeps what its own operations compile to on disk, some of them after a minute of one core. Each process has a
folder of its own, whose files are moved to MLX's when it is done: MLX writes them where another could read half of one.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
# Where MLX looks for it by itself.
_DEFAULT = Path(tempfile.gettempdir()) / "mlx" / importlib.metadata.version("mlx") / "ptx"
FOLDER = Path(os.environ.setdefault("MLX_PTX_CACHE_DIR", str(_DEFAULT)))

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx_lm.models.switch_layers import SwitchGLU  # noqa: E402

from benchmarks.gpu_models import BITS, GROUP_SIZE, SHAPES, Shape, build  # noqa: E402

_PATIENCE = 240  # seconds; whatever has not been compiled by then is compiled where it is used


def operations(shape: Shape) -> list[str]:
    """What the measurements of a shape compile, each of it for itself."""
    names = [f"{shape.name} products {rows}" for rows in (256, 2048)]
    if shape.experts:
        names += [f"{shape.name} {kind}" for kind in ("products 1024", "router 1024", "experts 1024", "experts 1")]
    return names


def compile_operation(name: str) -> None:
    """Runs an operation once; `name` is one of `operations`."""
    shape_name, kind, count = name.split()
    shape, rows = SHAPES[shape_name], int(count)
    {"products": _products, "router": _router, "experts": _experts}[kind](shape, rows)


def _products(shape: Shape, rows: int) -> None:
    """mlx-lm's pass through a layer of each kind and the output matrix, without experts."""
    model = build(replace(shape, layers=4, experts=0, top=0), head=False)
    mx.eval(model.text(mx.zeros((1, rows), mx.int32), cache=model.text.make_cache())[:, -1])


def _router(shape: Shape, rows: int) -> None:
    for features in (shape.experts, 1):
        packed = mx.quantize(mx.random.normal((features, shape.hidden)).astype(mx.bfloat16), 64, 8)
        mx.eval(mx.quantized_matmul(_rows(shape, rows), *packed, True, 64, 8))


def _experts(shape: Shape, rows: int) -> None:
    experts = SwitchGLU(shape.hidden, shape.intermediate, shape.experts)
    experts.set_dtype(mx.bfloat16)
    nn.quantize(experts, GROUP_SIZE, BITS)
    chosen = mx.broadcast_to(mx.arange(shape.top), (1, rows, shape.top))
    mx.eval(experts(_rows(shape, rows), chosen))


def _rows(shape: Shape, rows: int) -> mx.array:
    return mx.random.normal((1, rows, shape.hidden)).astype(mx.bfloat16)


class Compiling:
    """Processes that compile operations while this one does something else."""

    def __init__(self, names: Sequence[str]) -> None:
        self._started, self._home = time.perf_counter(), Path(tempfile.mkdtemp())
        self._running: dict[str, subprocess.Popen[str]] = {}
        for number, name in enumerate(names):
            own = self._home / str(number)
            if FOLDER.is_dir():
                shutil.copytree(FOLDER, own)
            own.mkdir(exist_ok=True)
            self._running[name] = subprocess.Popen(
                [sys.executable, __file__, name],
                env=os.environ | {"MLX_PTX_CACHE_DIR": str(own)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def finish(self) -> None:
        """Waits for all, takes over what they compiled, and prints what those had to say that failed."""
        for number, (name, process) in enumerate(self._running.items()):
            try:
                said, _ = process.communicate(timeout=max(1, self._started + _PATIENCE - time.perf_counter()))
            except subprocess.TimeoutExpired:
                process.kill()
                said, _ = process.communicate()
            if process.returncode:
                print(f"compiling {name} ended with {process.returncode}:\n{said}", flush=True)
            else:
                _take_over(self._home / str(number))
        shutil.rmtree(self._home)
        print(f"operations compiled {time.perf_counter() - self._started:.0f} s after the start", flush=True)


def _take_over(own: Path) -> None:
    """Code last: whoever finds it finds its names too."""
    files = (file for file in own.rglob("*") if file.is_file())
    for file in sorted(files, key=lambda file: file.suffix not in (".txt", ".cu")):
        place = FOLDER / file.relative_to(own)
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            beside = place.with_name(f"{place.name}.{os.getpid()}")
            shutil.copyfile(file, beside)
            beside.replace(place)


if __name__ == "__main__":
    compile_operation(sys.argv[1])
