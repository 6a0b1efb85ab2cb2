"""Plants a bug in the real code: rewrites a line of a module, re-runs its source, and puts everything back.

A promise is worth something only if a test fails when the code that keeps it is broken; here the code is broken on
purpose, in place, and the test's own check is run against it.
"""

import contextlib
import enum
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType

PACKAGES = ("mlx_mtp_backend", "tests.conformance")


@contextlib.contextmanager
def planted(module: ModuleType, old: str, new: str) -> Iterator[None]:
    """Replace the one occurrence of `old` in the module's source while the context lasts.

    Everything that the package or these tests imported from the module by name is replaced as well.
    """
    source = inspect.getsource(module)
    if source.count(old) != 1:
        raise AssertionError(f"{module.__name__} holds {source.count(old)} times, not once: {old!r}")
    broken = ModuleType(module.__name__)
    broken.__dict__.update({k: v for k, v in vars(module).items() if k.startswith("__")})
    exec(compile(source.replace(old, new), str(module.__file__), "exec"), broken.__dict__)
    # Enums stay the same object: the package compares their members by identity.
    swaps = {
        id(value): getattr(broken, name)
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and not isinstance(value, enum.EnumType)
    }
    undo: list[tuple[ModuleType, str, object]] = []
    try:
        for user in [m for name, m in sys.modules.items() if name.startswith(PACKAGES)]:
            for name, value in list(vars(user).items()):
                if id(value) in swaps:
                    undo.append((user, name, value))
                    setattr(user, name, swaps[id(value)])
        yield
    finally:
        for user, name, value in undo:
            setattr(user, name, value)
