"""Puts a fast BLAS in place of the one that MLX's CPU wheel links on Linux.

The wheel links reference BLAS. A library with the same plain symbol names that is loaded globally first takes its
place for the whole process. It is much faster and it breaks row invariance, so replies then say BEST_EFFORT.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import tempfile
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
            _library = _load(path)
        except OSError as error:
            detail = f"OpenBLAS cannot be loaded: {error}; installing libgfortran5 (Debian, Ubuntu) may help"
            raise EngineError(ErrorReason.BLAS_MISSING, detail) from error
    return path


def _load(path: Path) -> ctypes.CDLL:
    """The library with global symbols.

    It needs libgfortran.so.5, which many systems lack and MLX's wheel carries under a name of its own. The linker looks
    beside the library, so a folder of links, needed only while it loads, puts the one beside the other.
    """
    try:
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        carried = _carried_fortran()
        if not carried:
            raise
    with tempfile.TemporaryDirectory() as folder:
        for name, target in {path.name: path, **carried}.items():
            (Path(folder) / name).symlink_to(target)
        return ctypes.CDLL(str(Path(folder) / path.name), mode=ctypes.RTLD_GLOBAL)


def _carried_fortran() -> dict[str, Path]:
    """libgfortran and what it needs from the libraries beside MLX's package, under the names that are asked for."""
    spec = importlib.util.find_spec("mlx")
    for package in (spec.submodule_search_locations or []) if spec else []:
        for fortran in sorted(Path(package).parent.glob("mlx_*.libs/libgfortran*.so.5*")):
            beside = {file.name: file for file in fortran.parent.glob("libquadmath*.so*")}
            return {"libgfortran.so.5": fortran} | beside
    return {}


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
