"""The registry with kernels that pass, lie, crash or depend on the number of rows."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mtp_kernels import registry as module
from mtp_kernels.choice import FALLBACK
from mtp_kernels.registry import CHECK_ROWS, Case, Registry, Run
from mtp_kernels.store import write_json

INPUT = mx.random.normal((CHECK_ROWS, 16), key=mx.random.key(0)).astype(mx.float16)


def right(x: mx.array) -> mx.array:
    return x * 2


def slightly_off(x: mx.array) -> mx.array:
    return x * 2.02


def not_a_number(x: mx.array) -> mx.array:
    return x * mx.nan


def row_dependent(x: mx.array) -> mx.array:
    return x * 2 + (1e-3 if x.shape[0] > 1 else 0.0)


def crashing(x: mx.array) -> mx.array:
    raise RuntimeError("no such instruction")


def last_row_lost(x: mx.array) -> mx.array:
    return right(x) * (mx.arange(x.shape[0]) < 7)[:, None]


def case(run: Run, *, version: str = "1", shape: str = "16", platforms: tuple[str, ...] = ("cuda",)) -> Case:
    def probe(implementation: Run, rows: int) -> list[mx.array]:
        return [mx.concatenate([implementation(INPUT[i : i + rows]) for i in range(0, CHECK_ROWS, rows)])]

    return Case("double", version, shape, mx.float16, dict.fromkeys(platforms, run), right, right, probe)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry believes that it is on CUDA; the launches are the Python functions above."""
    monkeypatch.setattr(module, "platform", lambda: "cuda")


@pytest.mark.usefixtures("gpu")
def test_a_kernel_that_passes_runs() -> None:
    registry = Registry()
    assert registry.resolve(case(right)) is right
    (entry,) = registry.status()["kernels"]
    assert (entry["implementation"], entry["rows_equal"], entry["error"]) == ("cuda", True, 0.0)
    assert registry.fallbacks == 0


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (slightly_off, "differs from its reference"),
        (not_a_number, "differs from its reference by inf"),
        (last_row_lost, "differs from its reference"),
        (row_dependent, "rows of one pass differ from those of smaller passes"),
        (crashing, "failed: no such instruction"),
    ],
)
def test_a_kernel_that_fails_is_replaced_and_counted(run: Run, reason: str) -> None:
    registry = Registry()
    chosen = registry.resolve(case(run))
    assert chosen is right
    status = registry.status()
    assert status["fallbacks"] == 1
    assert status["kernels"][0]["implementation"] == FALLBACK
    assert reason in status["kernels"][0]["reason"]
    json.dumps(status)


def test_without_a_gpu_the_fallback_runs_unchecked() -> None:
    registry = Registry()
    assert registry.resolve(case(crashing)) is right
    assert registry.status()["kernels"][0]["reason"] == "no GPU"


@pytest.mark.usefixtures("gpu")
def test_a_platform_without_the_kernel_falls_back() -> None:
    registry = Registry()
    assert registry.resolve(case(crashing, platforms=("metal",))) is right
    assert registry.status()["kernels"][0]["reason"] == "not built for cuda"


@pytest.mark.usefixtures("gpu")
def test_an_unproved_kernel_runs_once_checked_and_says_so() -> None:
    registry = Registry()
    assert registry.resolve(replace(case(right), unproved=frozenset({"cuda"}))) is right
    assert registry.status()["kernels"][0]["reason"] == "checked on this device; unproved elsewhere"


class Counting:
    """A correct kernel that counts its calls."""

    calls = 0

    def __call__(self, x: mx.array) -> mx.array:
        self.calls += 1
        return right(x)


@pytest.mark.usefixtures("gpu")
def test_checks_run_once_a_version_and_shape(tmp_path: Path) -> None:
    run, store = Counting(), tmp_path / "deep" / "checks.json"
    first = Registry(store)
    first.resolve(case(run))
    seen = run.calls
    first.resolve(case(run))
    assert Registry(store).resolve(case(run)) is run
    assert run.calls == seen
    Registry(store).resolve(case(run, version="2"))
    Registry(store).resolve(case(run, shape="32"))
    assert run.calls == 3 * seen


@pytest.mark.usefixtures("gpu")
def test_another_mlx_version_checks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, store = Counting(), tmp_path / "checks.json"
    Registry(store).resolve(case(run))
    seen = run.calls
    monkeypatch.setattr(module, "MLX_VERSION", "99")
    Registry(store).resolve(case(run))
    assert run.calls == 2 * seen


@pytest.mark.usefixtures("gpu")
def test_a_stored_failure_stays_a_failure_and_a_crash_is_tried_again(tmp_path: Path) -> None:
    store = tmp_path / "checks.json"
    Registry(store).resolve(case(row_dependent))
    assert Registry(store).resolve(case(row_dependent)) is right
    Registry(store).resolve(case(crashing, shape="crash"))
    assert Registry(store).resolve(case(right, shape="crash")) is right
    assert Registry(store).status()["kernels"] == []


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"a": {"kernel": "x"}}'])
def test_an_unreadable_store_counts_as_empty(tmp_path: Path, text: str) -> None:
    store = tmp_path / "checks.json"
    store.write_text(text)
    assert Registry(store).resolve(case(right)) is right


@pytest.mark.usefixtures("gpu")
def test_a_store_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "folder").write_text("a file")
    run = Counting()
    registry = Registry(tmp_path / "folder" / "checks.json")
    assert registry.resolve(case(run)) is run
    assert registry.resolve(case(run)) is run
    assert "checks.json cannot be written" in caplog.text


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "store.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    other = file.with_name("folder")
    other.mkdir()
    with pytest.raises(OSError, match="folder"):
        write_json(other, {})
    assert sorted(path.name for path in file.parent.iterdir()) == ["folder", "store.json"]


def test_two_processes_that_write_do_not_disturb_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "store.json"
    real = Path.replace

    def while_another_writes(source: Path, target: Path) -> Path:
        if os.getpid() != 1:
            monkeypatch.setattr(os, "getpid", lambda: 1)
            write_json(file, {"other": 1})
        return real(source, target)

    monkeypatch.setattr(Path, "replace", while_another_writes)
    write_json(file, {"own": 1})
    assert json.loads(file.read_text()) == {"own": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["store.json"]
