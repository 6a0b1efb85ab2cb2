"""Settings: file and environment, unknown keys refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from router.settings import describe_problem, effective_settings, load_settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MTP_ROUTER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MTP_ROUTER_CONFIG", raising=False)


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "mtp-router.toml"
    file.write_text(text)
    return file


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, '[server]\nlisten = "127.0.0.1:1"\nadmin = false\n')
    monkeypatch.setenv("MTP_ROUTER_SERVER__LISTEN", "127.0.0.1:2")
    settings = load_settings(file)
    assert settings.server.listen == "127.0.0.1:2"
    assert settings.server.admin is False


def test_model_paths_start_at_the_settings_file(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, '[models.a]\npath = "sub/x.gguf"\n[models.b]\npath = "/abs/y.gguf"\n'))
    assert settings.models["a"].path == tmp_path / "sub/x.gguf"
    assert settings.models["b"].path == Path("/abs/y.gguf")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[server]\nlistn = 'x'\n", "listn"),
        ("[sever]\n", "sever"),
        ("[models.a]\npath='x'\n[models.a.sampling]\nheat=1\n", "heat"),
        ("[models.a]\npath='x'\n[models.a.sampling]\ntemperature=-1\n", "temperature"),
        ("[models.'a b']\npath='x'\n", "pattern"),
        ("[models.a]\npath='x'\naliases=['b']\n[models.b]\npath='y'\n", "stands for both"),
        ("[models.a]\npath='x'\nbackend='nowhere'\n", "no backend 'nowhere'"),
        ("[models.a]\npath='x'\nfallbacks=['a']\n", "cannot answer in its own place"),
        ("[models.a]\npath='x'\naliases=['b']\nfallbacks=['b']\n", "cannot answer in its own place"),
        ("[models.a]\nollama='no such name'\n", "models.a.ollama"),
        ("[backends.x]\nkind='vllm'\n", "vllm"),
        ("[server]\nlisten='0.0.0.0:1'\n", "allow_remote"),
        ("[server]\nlisten='[::]:1'\n", "allow_remote"),
        ("[server]\nlisten='example.org:1'\n", "allow_remote"),
        ("[server]\nlisten='nonsense'\n", "host:port"),
        ("[server]\nlisten='127.0.0.1:70000'\n", "host:port"),
        ("[server\n", "Expected ']'"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("[", r"\[").replace("]", r"\]")):
        load_settings(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[server]\nlistn = 'x'\n", "server.listn: there is no such setting; is 'listen' meant?"),
        ("[models.a]\npth = 'x'\n", "models.a.pth: there is no such setting; is 'path' meant?"),
        ("[models.a]\npath='x'\nmodels=3\n", "models.a.models: there is no such setting in this table"),
        ("zzz = 1\n", "zzz: there is no such setting"),
        ("[backends.x]\nurl='y'\n", "backends.x: kind must be one of llama_cpp, mlx, ollama, llama_server"),
        ("[backends.x]\nkind='y'\n", "backends.x: kind must be one of llama_cpp, mlx, ollama, llama_server"),
        ("[models.a]\npath='x'\naliases='b'\n", "models.a.aliases: must be a list"),
        ("[models.a]\npath=3\n", "models.a.path: must be a path"),
        ("models=3\n", "models: must be a table"),
        ("[backends.mlx]\nopenblass=1\n", "backends.mlx.openblass: there is no such setting; is 'openblas' meant?"),
        ("[backends.x]\nkind='ollama'\nhost=1\n", "backends.x.host: Input should be a valid string"),
        ("[models.a]\npath='x'\ndraft_depth='b'\n", "models.a.draft_depth: Input should be a valid integer"),
        ("[models.a]\npath='x'\ndraft_depth='b'\n", ", or Input should be 'auto'"),
        ("[models.a]\npath='x'\nollama='b'\n", "models.a: needs one of path, ollama or llama_server, and only one"),
        ("[models.'a b']\npath='x'\n", "models.a b: this name cannot be used: letters and digits, then"),
        ("[models]\na=3\n", "models.a: must be a table"),
        ("backends=3\n", "backends: must be a table"),
        ("[backends]\nmlx=3\n", "backends.mlx: must be a table"),
        ("server=3\n", "server: must be a table"),
    ],
)
def test_what_is_wrong_is_said_in_the_words_of_the_file(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  described below
        load_settings(write(tmp_path, text))
    assert said in describe_problem(caught.value)


@pytest.mark.parametrize(
    ("data", "said"), [(b"\xff\xfe", "is not UTF-8 text, from byte 0 on"), (b"[server\n", "is not TOML: Expected ']'")]
)
def test_a_file_that_cannot_be_parsed_is_named(tmp_path: Path, data: bytes, said: str) -> None:
    file = tmp_path / "mtp-router.toml"
    file.write_bytes(data)
    with pytest.raises(ValueError, match="mtp-router") as caught:
        load_settings(file)
    assert f"{file} {said}" in describe_problem(caught.value)


@pytest.mark.parametrize("listen", ["localhost:1", "127.0.0.2:1", "[::1]:1", "unix:/tmp/x.sock"])
def test_loopback_needs_no_permission(tmp_path: Path, listen: str) -> None:
    assert load_settings(write(tmp_path, f"[server]\nlisten='{listen}'\n")).server.listen == listen


def test_an_open_address_can_be_allowed(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, "[server]\nlisten='0.0.0.0:1'\nallow_remote=true\n"))
    assert settings.server.listen == "0.0.0.0:1"


@pytest.mark.parametrize("variable", ["MTP_ROUTER_SERVER__LISTN", "MTP_ROUTER_SEVER__LISTEN", "MTP_ROUTER_LISTEN"])
def test_a_misspelt_variable_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "127.0.0.1:1")
    with pytest.raises(ValueError, match=r"(?i)list|variable"):
        load_settings(write(tmp_path, ""))


def test_a_named_file_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        load_settings(tmp_path / "absent.toml")
    monkeypatch.setenv("MTP_ROUTER_CONFIG", str(tmp_path / "absent.toml"))
    with pytest.raises(FileNotFoundError):
        load_settings()


def test_effective_settings_are_plain_data(tmp_path: Path) -> None:
    shown = effective_settings(load_settings(write(tmp_path, "[models.a]\npath='x.gguf'\n")))
    assert shown["models"]["a"]["path"] == str(tmp_path / "x.gguf")
    assert shown["backends"]["llama_cpp"]["kind"] == "llama_cpp"


@pytest.mark.parametrize("document", ["README.md", "docs/models.md"])
def test_the_settings_in_the_documents_can_be_read(document: str, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / document).read_text()
    blocks = re.findall(r"^```toml\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        load_settings(write(tmp_path, block))
