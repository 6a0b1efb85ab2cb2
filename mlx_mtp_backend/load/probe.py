"""What MLX finds on this machine, as one JSON object: `python -m mlx_mtp_backend.load.probe`.

A process of its own: MLX may abort where a driver is broken, and a BLAS is interposed once and for all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_mtp_backend.errors import EngineError
from mlx_mtp_backend.load import blas


def probe(*, openblas: bool = False, kernel_checks: Path | None = None) -> dict[str, Any]:
    """Device, BLAS and stored kernel checks.

    Args:
        openblas: try to interpose OpenBLAS; `blas_problem` says why it did not work.
        kernel_checks: see EngineOptions.
    """
    problem = None
    if openblas:
        try:
            blas.interpose()
        except EngineError as error:
            problem = f"{error.reason.value}: {error}"
    import mlx.core as mx
    from mtp_kernels.launch import platform
    from mtp_kernels.registry import Registry, device_name

    return {
        "mlx": version("mlx"),
        "platform": platform(),
        "device": device_name(),
        "metal": mx.metal.is_available(),
        "cuda": mx.cuda.is_available(),
        "blas": "openblas" if blas.interposed() else "stock",
        "blas_problem": problem,
        "kernel_checks": [dataclasses.asdict(choice) for choice in Registry(kernel_checks).stored()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--openblas", action="store_true")
    parser.add_argument("--kernel-checks", type=Path)
    arguments = parser.parse_args()
    print(json.dumps(probe(openblas=arguments.openblas, kernel_checks=arguments.kernel_checks)))


if __name__ == "__main__":
    main()
