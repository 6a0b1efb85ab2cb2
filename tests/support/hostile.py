"""Model files made to hurt: each must be refused with a reason, cheaply, without running code or reading weights."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp_backend.synthetic import Recipe, write

TERABYTE = 2**40
SHARD = "model-00003-of-00003.safetensors"


@dataclass(frozen=True)
class Case:
    """Writes the model, given a folder and a good checkpoint to copy; `says` is part of the reason for its refusal, ""
    for a model that is no danger. A heavy one takes seconds to write, and is left to `make hostile`.
    """

    name: str
    make: Callable[[Path, Path], Path]
    says: str
    heavy: bool = False


CASES: list[Case] = []

Maker = Callable[[Path, Path], Path | None]


def case(name: str, says: str, *, heavy: bool = False) -> Callable[[Maker], Maker]:
    """Adds a case; its function gets the folder and the good checkpoint, and may return another path than `m`."""

    def add(make: Maker) -> Maker:
        CASES.append(Case(name, lambda folder, good: make(folder, good) or folder / "m", says, heavy))
        return make

    return add


def good_checkpoint(folder: Path) -> Path:
    """A small checkpoint with a head, for the cases to copy."""
    return write(folder, Recipe(layers=2))


def copy(folder: Path, good: Path) -> Path:
    return Path(shutil.copytree(good, folder / "m"))


def edited(folder: Path, good: Path, name: str, **keys: Any) -> None:
    file = copy(folder, good) / name
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def sparse(path: Path, start: bytes, size: int) -> None:
    """A file of `size` bytes that takes no room beyond its start."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)


class Evil:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


MARK = "code-was-run"
EVIL_MODULE = f"import os, pathlib\nos.mkdir(pathlib.Path(__file__).parents[1] / {MARK!r})\n"


# --------------------------------------------------------------------------------------------------------------------
# safetensors


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(begin: int, end: int, shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


SHARDS = {
    "header length 2^60": (struct.pack("<Q", 2**60) + b"{}", "the limit is"),
    "four bytes": (b"abcd", "too short"),
    "cut inside its header": (safetensors({"a": tensor(0, 8)}, bytes(8))[:30], "ends inside its header"),
    "cut inside its data": (safetensors({"a": tensor(0, 8)}, bytes(4)), "where its header needs 8"),
    "overlapping offsets": (safetensors({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)), "overlap or leave a gap"),
    "offsets out of range": (safetensors({"a": tensor(0, 8), "b": tensor(8, 2**50)}, bytes(16)), "where its header"),
    "offsets that leave a gap": (safetensors({"a": tensor(0, 4), "b": tensor(8, 12)}, bytes(12)), "leave a gap"),
    "negative offsets": (safetensors({"a": tensor(-8, 0)}, b""), "no shape and offsets"),
    "shape of 2^80 elements": (safetensors({"a": tensor(0, 8, [2**40, 2**40])}, bytes(8)), "bytes do not fit"),
    "a number of a million digits": (safetensors(b'{"a":' + b"9" * 10**6 + b"}"), "not valid JSON"),
    "duplicate names": (safetensors(b'{"a":{},"a":{}}'), "names 'a' twice"),
    "JSON bomb: 16 MiB of brackets": (safetensors(b"[" * 2**24), "JSON values"),
    "JSON bomb: a million levels": (safetensors(b'{"a":' * 10**6), "not valid JSON"),
    "JSON bomb: 10 million values": (safetensors(b'{"a":[' + b"0," * 10**7 + b"0]}"), "JSON values"),
    "JSON that holds NaN": (safetensors(b'{"a": NaN}'), "holds NaN"),
    "a pickle by another name": (pickle.dumps(Evil(Path("/nowhere"))), "pickles run code"),
    "a ZIP by another name": (b"PK\x03\x04" + bytes(100), "pickles run code"),
}


def _add_shard(name: str, content: bytes, says: str) -> None:
    @case(f"safetensors: {name}", says)
    def _(folder: Path, good: Path) -> None:
        (copy(folder, good) / SHARD).write_bytes(content)


for _name, (_content, _says) in SHARDS.items():
    _add_shard(_name, _content, _says)


@case("safetensors: the same tensor in two shards", "repeats tensor")
def _(folder: Path, good: Path) -> None:
    shutil.copy(good / SHARD, copy(folder, good) / "model-00001-of-00003.safetensors")


@case("safetensors: as many tensors as there may be", "", heavy=True)
def _(folder: Path, good: Path) -> None:
    header = {f"model.visual.{number}": tensor(0, 0) for number in range(199_000)}
    (copy(folder, good) / "model.safetensors.index.json").unlink()
    (folder / "m" / "model-extra.safetensors").write_bytes(safetensors(header))


@case("safetensors: more tensors than there may be", "200000 tensors", heavy=True)
def _(folder: Path, good: Path) -> None:
    header = {f"model.visual.{number}": tensor(0, 0) for number in range(200_000)}
    (copy(folder, good) / "model.safetensors.index.json").unlink()
    (folder / "m" / "model-extra.safetensors").write_bytes(safetensors(header))


@case("safetensors: 1 TiB behind a header of 2 GiB", "the limit is")
def _(folder: Path, good: Path) -> None:
    sparse(copy(folder, good) / SHARD, struct.pack("<Q", 2**31), TERABYTE)


@case("safetensors: 1 TiB of weights behind a good header", "")
def _(folder: Path, good: Path) -> None:
    header = safetensors({"model.visual.big": tensor(0, TERABYTE)})
    sparse(copy(folder, good) / "model-extra.safetensors", header, len(header) + TERABYTE)


# --------------------------------------------------------------------------------------------------------------------
# The rest of a checkpoint's folder


@case("checkpoint: nothing wrong with it", "")
def _(folder: Path, good: Path) -> None:
    copy(folder, good)


@case("checkpoint: auto_map in config.json", "sets auto_map")
def _(folder: Path, good: Path) -> None:
    edited(folder, good, "config.json", auto_map={"AutoModel": "evil.Model"})
    (folder / "m" / "evil.py").write_text(EVIL_MODULE)


@case("checkpoint: model_file deep in config.json", "sets model_file")
def _(folder: Path, good: Path) -> None:
    edited(folder, good, "config.json", vision_config={"parts": [{"model_file": "evil.py"}]})
    (folder / "m" / "evil.py").write_text(EVIL_MODULE)


@case("checkpoint: auto_map in tokenizer_config.json", "sets auto_map")
def _(folder: Path, good: Path) -> None:
    edited(folder, good, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    (folder / "m" / "evil.py").write_text(EVIL_MODULE)


@case("checkpoint: pickles only", "pickles such as pytorch_model.bin run code")
def _(folder: Path, good: Path) -> None:
    for file in copy(folder, good).glob("*.safetensors*"):
        file.unlink()
    (folder / "m" / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(folder / MARK)))


@case("checkpoint: an index that names files elsewhere", "not a plain .safetensors name")
def _(folder: Path, good: Path) -> None:
    index = copy(folder, good) / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))


IMPOSSIBLE = {
    "no experts": ({"num_experts": 0}, "gives no usable num_experts"),
    "2^39 experts": ({"num_experts": 2**39}, "the limit is"),
    "more experts a token than there are": ({"num_experts_per_tok": 9}, "there are 8 experts"),
    "experts of no width": ({"moe_intermediate_size": 0}, "gives no usable moe_intermediate_size"),
}


def _add_mixture(name: str, sizes: dict[str, int], says: str) -> None:
    @case(f"checkpoint: a mixture of {name}", says)
    def _(folder: Path, good: Path) -> None:
        text = json.loads((good / "config.json").read_text())["text_config"]
        usual = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        edited(folder, good, "config.json", model_type="qwen3_5_moe", text_config=text | usual | sizes)


for _name, (_sizes, _says) in IMPOSSIBLE.items():
    _add_mixture(_name, _sizes, _says)


def _add_link(name: str, file: str, target: str, says: str) -> None:
    @case(f"checkpoint: {name}", says)
    def _(folder: Path, good: Path) -> None:
        link = copy(folder, good) / file
        link.unlink(missing_ok=True)
        (folder / "secret").write_text("{}")
        link.symlink_to(target)


_add_link("a shard that is a link out of it", SHARD, "../secret", "leads out of its model's folder")
_add_link("config.json that is a link out of it", "config.json", "../secret", "leads out of its model's folder")
_add_link("a template that is a link out of it", "chat_template.jinja", "../secret", "leads out of its model's folder")
_add_link("a shard that is a link to a device", SHARD, "/dev/zero", "leads out of its model's folder")
_add_link("a shard that is a link to itself", SHARD, SHARD, "symbolic links")


@case("checkpoint: a named pipe for a shard", "is a named pipe")
def _(folder: Path, good: Path) -> None:
    (copy(folder, good) / SHARD).unlink()
    os.mkfifo(folder / "m" / SHARD)


@case("checkpoint: a named pipe for a template", "is a named pipe")
def _(folder: Path, good: Path) -> None:
    os.mkfifo(copy(folder, good) / "chat_template.jinja")


@case("checkpoint: a folder for a shard", "is a folder")
def _(folder: Path, good: Path) -> None:
    (copy(folder, good) / SHARD).unlink()
    (folder / "m" / SHARD).mkdir()


@case("checkpoint: config.json of 1 TiB", "is larger than")
def _(folder: Path, good: Path) -> None:
    sparse(copy(folder, good) / "config.json", b"{", TERABYTE)


@case("checkpoint: a template of 1 TiB", "is larger than")
def _(folder: Path, good: Path) -> None:
    sparse(copy(folder, good) / "chat_template.jinja", b"x", TERABYTE)


@case("checkpoint: 10,001 files beside it", "holds over 10000 files", heavy=True)
def _(folder: Path, good: Path) -> None:
    copy(folder, good)
    for number in range(10_001):
        (folder / "m" / f"{number}.txt").touch()


# --------------------------------------------------------------------------------------------------------------------
# GGUF


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def key(name: str, code: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", code) + value


def gguf(*parts: bytes, tensors: int = 0, keys: int | None = None, data: int = 0, architecture: bool = True) -> bytes:
    """A file of these parts behind `general.architecture`; the counts are what it says, not what it has."""
    named = (key("general.architecture", 8, string("llama")),) if architecture else ()
    counted = len(named) + max(len(parts) - tensors, 0) if keys is None else keys
    header = b"GGUF" + struct.pack("<IQQ", 3, tensors, counted) + b"".join((*named, *parts))
    return header + bytes(-len(header) % 32 + data)


def placed(name: str, shape: tuple[int, ...], offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset)


def array(code: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", code, count) + data


GGUFS = {
    "nothing wrong with it": (gguf(placed("a", (8,), 0), tensors=1, data=32), ""),
    "no magic": (b"junk" * 100, "magic"),
    "cut short": (gguf(placed("a", (8,), 0), tensors=1, data=32)[:40], "cut short"),
    "2^62 tensors": (gguf(tensors=2**62), "tensors; the limit is"),
    "2^62 metadata keys": (gguf(keys=2**62), "metadata keys; the limit is"),
    "a key of 2^62 bytes": (gguf(struct.pack("<Q", 2**62)), "the limit is"),
    "a string of 2^62 bytes": (gguf(key("k", 8, struct.pack("<Q", 2**62))), "cut short"),
    "an array of 2^60 numbers": (gguf(key("k", 9, array(4, 2**60))), "cut short"),
    "an array of 2^60 strings": (gguf(key("k", 9, array(8, 2**60))), "strings"),
    "arrays in arrays": (gguf(key("k", 9, array(9, 1, array(9, 1)))), "arrays of arrays"),
    "a key twice": (gguf(key("k", 4, bytes(4)), key("k", 4, bytes(4))), "appears twice"),
    "a tensor twice": (gguf(placed("a", (8,), 0), placed("a", (8,), 32), tensors=2, data=64), "appears twice"),
    "overlapping tensors": (gguf(placed("a", (16,), 0), placed("b", (8,), 32), tensors=2, data=64), "overlap"),
    "a tensor out of range": (gguf(placed("a", (8,), 2**40), tensors=1, data=32), "beyond the end"),
    "a shape of 2^120 elements": (gguf(placed("a", (2**60, 2**60), 0), tensors=1, data=32), "beyond the end"),
    "2^31 dimensions": (gguf(string("a") + struct.pack("<I", 2**31), tensors=1), "dimensions; the limit is"),
    "an alignment of 0": (gguf(key("general.alignment", 4, bytes(4))), "alignment"),
    "no architecture": (gguf(architecture=False), "architecture is missing"),
    "2^32 layers": (gguf(key("llama.block_count", 10, struct.pack("<Q", 2**63))), ""),
}


def _add_gguf(name: str, content: bytes, says: str) -> None:
    @case(f"GGUF: {name}", says)
    def _(folder: Path, good: Path) -> Path:
        path = folder / "m.gguf"
        path.write_bytes(content)
        return path


for _name, (_content, _says) in GGUFS.items():
    _add_gguf(_name, _content, _says)


@case("GGUF: a vocabulary of 2 million empty strings", "")
def _(folder: Path, good: Path) -> Path:
    path = folder / "m.gguf"
    path.write_bytes(gguf(key("k", 9, array(8, 2_000_000, bytes(8 * 2_000_000)))))
    return path


@case("GGUF: 1 TiB behind a string that long", "header is over")
def _(folder: Path, good: Path) -> Path:
    sparse(folder / "m.gguf", gguf(key("k", 8, struct.pack("<Q", TERABYTE - 200))).rstrip(b"\0"), TERABYTE)
    return folder / "m.gguf"


@case("GGUF: a named pipe", "is a named pipe")
def _(folder: Path, good: Path) -> Path:
    os.mkfifo(folder / "m.gguf")
    return folder / "m.gguf"


@case("GGUF: a device", "is a device")
def _(folder: Path, good: Path) -> Path:
    (folder / "m.gguf").symlink_to("/dev/zero")
    return folder / "m.gguf"


@case("GGUF: a link out of its repository in the cache", "leads out of its model's folder")
def _(folder: Path, good: Path) -> Path:
    snapshot = folder / "models--org--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (folder / "secret.gguf").write_bytes(GGUFS["nothing wrong with it"][0])
    (snapshot / "m.gguf").symlink_to("../../../secret.gguf")
    return snapshot / "m.gguf"


@case("GGUF: part 1 of 99,999", "99999 parts")
def _(folder: Path, good: Path) -> Path:
    path = folder / "m-00001-of-99999.gguf"
    path.write_bytes(GGUFS["nothing wrong with it"][0])
    return path
