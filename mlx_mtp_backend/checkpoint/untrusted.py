"""Opens and parses files that may come from anywhere: regular files only, symbolic links followed only to where they
may lead, sizes and counts bounded before anything is built from them.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class RefusedFileError(Exception):
    """A file that is not read; the message says why, and holds none of its content."""


def allowed_roots(folder: Path) -> tuple[Path, ...]:
    """Where the symbolic links of a model in `folder` may lead: the folder itself, and for a snapshot in a Hugging
    Face cache (`models--org--name/snapshots/REVISION`) its `models--org--name`, which holds the blobs.
    """
    real = Path(os.path.realpath(folder))
    repository = real.parent.parent
    if real.parent.name == "snapshots" and repository.name.startswith("models--"):
        return real, repository
    return (real,)


def links_may_lead(path: Path) -> tuple[Path, ...] | None:
    """Where a symbolic link that is itself the model may lead: out of a Hugging Face cache's repository never, else
    anywhere (None), since a person has put it there.
    """
    for folder in Path(os.path.abspath(path)).parents:
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            return (Path(os.path.realpath(folder.parent.parent)),)
    return None


def resolve(path: Path, roots: Sequence[Path]) -> Path:
    """`path` without symbolic links. Raises RefusedFileError where they lead out of every one of `roots`."""
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(root) for root in roots):
        raise RefusedFileError("is a symbolic link that leads out of its model's folder")
    return real


@contextmanager
def open_untrusted(path: Path, roots: Sequence[Path] | None = None) -> Iterator[BinaryIO]:
    """The regular file at `path`, never waiting for a writer.

    Args:
        roots: resolved folders that its symbolic links may lead into; None: anywhere, for a path that a person named.

    Raises:
        RefusedFileError: it is no regular file, leads out of `roots`, or changed while it was read.
        OSError: it cannot be opened or read.
    """
    real = Path(os.path.realpath(path)) if roots is None else resolve(path, roots)
    before = os.stat(real)
    _refuse_special(before)  # before it is opened: opening a device may already do something
    # O_NOFOLLOW and O_NONBLOCK: it may have been replaced by a link or a named pipe since.
    descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    with os.fdopen(descriptor, "rb") as file:
        opened = os.fstat(descriptor)
        _refuse_special(opened)
        if identity(opened) != identity(before):
            raise RefusedFileError("changed while it was opened")
        yield file
        if identity(os.fstat(descriptor)) != identity(opened):
            raise RefusedFileError("changed while it was read")


def read_untrusted(path: Path, limit: int, roots: Sequence[Path] | None = None) -> bytes:
    """A file of at most `limit` bytes, whole. Raises as `open_untrusted`, and RefusedFileError for a larger one."""
    with open_untrusted(path, roots) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise RefusedFileError(f"is larger than {limit} bytes")
        return file.read(size)  # one that grows meanwhile is refused at the end of the block


def identity(status: os.stat_result) -> tuple[int, int, int, int]:
    """What tells one state of a file from another: device, inode, bytes, time of change in nanoseconds."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _refuse_special(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a special file")
        raise RefusedFileError(f"is {kind}, not a regular file")


def parse_object(text: bytes, max_values: int) -> dict[str, Any]:
    """A JSON object of at most `max_values` values.

    Raises:
        RefusedFileError: it is something else, too many values, NaN or infinite, or names a key twice.
    """
    # A value needs a comma or a bracket before it, so that counting those bounds the memory that parsing takes.
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > max_values:
        raise RefusedFileError(f"holds over {max_values} JSON values")
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RefusedFileError("is not valid JSON") from error
    if not isinstance(value, dict):
        raise RefusedFileError("is not a JSON object")
    return value


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise RefusedFileError(f"names {key[:80]!r} twice")
        found[key] = value
    return found


def _no_constant(name: str) -> None:
    raise RefusedFileError(f"holds {name}, which is not JSON")
