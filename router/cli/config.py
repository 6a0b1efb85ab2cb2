"""`mtp-router config`: the settings in force, and where each comes from."""

from __future__ import annotations

import argparse
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from router.cli.connection import read_settings
from router.cli.failures import OK
from router.settings import (
    CONFIG_VARIABLE,
    ENV_PREFIX,
    HOME_VARIABLE,
    data_home,
    default_config_path,
    effective_settings,
)

Keys = tuple[str, ...]


def run(arguments: argparse.Namespace) -> int:
    """Prints the settings as TOML with comments, or as one JSON object."""
    settings = effective_settings(read_settings(arguments))
    file: Path = arguments.config or default_config_path()
    origins = Origins(file)
    if arguments.json:
        leaves = {".".join(path): origins.of(path) for path, _ in _leaves(settings)}
        source = str(file) if file.is_file() else None
        print(json.dumps({"settings": settings, "origins": leaves, "file": source, "data_home": str(data_home())}))
        return OK
    print(f"# settings file: {file}" + ("" if file.is_file() else " (does not exist)"))
    print(f"# pulled models: {data_home() / 'models'}")
    print("\n".join(toml_lines(settings, origins)))
    return OK


class Origins:
    """Tells where settings come from: the environment, the file, or the defaults."""

    def __init__(self, file: Path) -> None:
        data = tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self._in_file = {path for path, _ in _leaves(data)}
        self._variables: dict[Keys, str] = {}
        for name in os.environ:
            if name.startswith(ENV_PREFIX) and name not in (HOME_VARIABLE, CONFIG_VARIABLE):
                self._variables[tuple(name.removeprefix(ENV_PREFIX).lower().split("__"))] = name

    def of(self, path: Keys) -> str:
        """Name of the environment variable that sets a value, "file", or "default"."""
        lowered = tuple(part.lower() for part in path)
        for length in range(len(path), 0, -1):
            if lowered[:length] in self._variables:
                return self._variables[lowered[:length]]
        return "file" if path in self._in_file else "default"


def _leaves(table: Mapping[str, Any], above: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def toml_lines(table: Mapping[str, Any], origins: Origins, above: Keys = ()) -> Iterator[str]:
    """The table as TOML, values before sub-tables; a comment names every origin but the defaults."""
    values = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    if above and (values or not table):
        yield ""
        yield f"[{'.'.join(map(_key, above))}]"
    for key, value in values.items():
        origin = origins.of((*above, key))
        yield f"{_key(key)} = {_value(value)}" + ("" if origin == "default" else f"  # {origin}")
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from toml_lines(value, origins, (*above, key))


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)


def _value(value: Any) -> str:
    """A string, number, boolean or list in TOML, where each is written as in JSON but for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
