"""Puts a fast BLAS in place of the one that MLX's CPU wheel links on Linux.

The wheel links reference BLAS. A library with the same plain symbol names that is loaded globally first takes its
place for the whole process. It is much faster and it breaks row invariance, so replies then say BEST_EFFORT.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path

from mlx_mtp_backend.errors import EngineError, ErrorReason

PACKAGE = "ngsolve_openblas"

_library: ctypes.CDLL | None = None


def interpose() -> Path:
    """Load the OpenBLAS of package ngsolve-openblas with global symbols.

    Returns:
        the library's path.

    Raises:
        EngineError: BLAS_TOO_LATE once MLX is imported, BLAS_MISSING where the package, or a library it needs, is not
            installed.
    """
    global _library
    path = _find()
    if _library is None:
        if "mlx.core" in sys.modules:
            raise EngineError(ErrorReason.BLAS_TOO_LATE, "MLX is imported already; interpose the BLAS first")
        try:
            _library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:  # it needs the system's libgfortran.so.5 (Debian and Ubuntu: libgfortran5)
            raise EngineError(ErrorReason.BLAS_MISSING, f"OpenBLAS cannot be loaded: {error}") from error
    return path


def interposed() -> bool:
    """Whether `interpose` took effect in this process."""
    return _library is not None


def _find() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        for library in sorted(folder.rglob("lib*openblas*.so*")):
            return library
    raise EngineError(ErrorReason.BLAS_MISSING, "no OpenBLAS found; install ngsolve-openblas")
