"""Models in several GGUF files, as llama.cpp's own tool splits them: NAME-00001-of-00003.gguf and so on."""

from __future__ import annotations

import re
from pathlib import Path

SPLIT = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MAX_PARTS = 1000


class SplitError(Exception):
    """This is not how a split model is named; the message says what is wrong."""


def parts(path: Path) -> list[Path]:
    """Every part of the model whose first part is `path`; the path alone where it is in one piece.

    Raises:
        SplitError: it is not the first part, or the count makes no sense.
    """
    match = SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if int(match["number"]) != 1:
        raise SplitError(f"it is part {int(match['number'])} of {count}; name the first one")
    if not 1 <= count <= MAX_PARTS:
        raise SplitError(f"it says that it has {count} parts")
    return [path.with_name(f"{match['name']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
