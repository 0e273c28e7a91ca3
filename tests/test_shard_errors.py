"""An invalid file of a checkpoint raises a CheckpointError that names the fault and the way out, and its code is never run."""

import math
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import CheckpointError, Llama, Tokenizer
from llama.checkpoint import packed_file

from . import changed_checkpoints
from .changed_checkpoints import EMBEDDING, FIRST, NORM, ONE_MODEL, SECOND, TOKENIZER, W2, AssertBuildRaises, change_tensors
from .support import random_weights, run, train_tokenizer, write_shards

halves, copy = changed_checkpoints.halves, changed_checkpoints.copy  # fixtures
assert_build_raises = changed_checkpoints.assert_build_raises  # a fixture


@pytest.mark.parametrize(
    "name, size",
    [(FIRST, n) for n in (1, 2, 10, 64, 0.1, 0.5, 0.9, -100, -1)] + [(TOKENIZER, n) for n in (2, 10, 0.5, -10)],
)
def test_truncated_files_raise(assert_build_raises: AssertBuildRaises, copy: Path, name: str, size: float) -> None:
    original = (copy / name).read_bytes()
    (copy / name).write_bytes(original[: int(size * len(original)) if 0 < size < 1 else int(size)])
    assert_build_raises(copy, str(copy / name), "cut off", "fetch", "again")


def test_other_zip_files_and_json_in_place_of_a_shard_raise(assert_build_raises: AssertBuildRaises, copy: Path) -> None:
    """One of the files is a shard that was compressed again: if it were memory-mapped, its weights would be wrong."""
    with zipfile.ZipFile(copy / FIRST) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    (copy / FIRST).write_text('{"error": "no access"}')
    assert_build_raises(copy, str(copy / FIRST), "it is JSON")
    (copy / FIRST).write_bytes(b"PK\x03\x04" + bytes(1000))
    assert_build_raises(copy, str(copy / FIRST), "damaged", "1,004 bytes", "checklist.chk")
    for content in ({"readme.txt": b"hello"}, files):
        with zipfile.ZipFile(copy / FIRST, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in content.items():
                archive.writestr(name, data)
        assert_build_raises(copy, str(copy / FIRST), "another kind of zip")


class Bomb:
    """An object that calls a function when it is unpickled."""

    def __init__(self, call: Callable, *arguments: Any) -> None:
        self.call = call, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("call", ["open", "os.system"])
@pytest.mark.parametrize("how", ["zip", "inside", "old", "2", "3", "4", "5"])
def test_code_in_a_shard_is_never_run(
    assert_build_raises: AssertBuildRaises, copy: Path, tmp_path: Path, call: str, how: str
) -> None:
    marker = tmp_path / "marker"
    bomb = Bomb(open, str(marker), "w") if call == "open" else Bomb(os.system, f"touch '{marker}'")
    if how.isdigit():
        (copy / FIRST).write_bytes(pickle.dumps(bomb, protocol=int(how)))
    else:
        content = {**torch.load(copy / FIRST), "bomb": bomb} if how == "inside" else bomb
        torch.save(content, copy / FIRST, _use_new_zipfile_serialization=how != "old")
    parts = ["could run code"] if how in ("zip", "inside") else ["a bare pickle", "before 1.6", "torch.save() it again"]
    assert_build_raises(copy, str(copy / FIRST), *parts)
    assert not marker.exists()
    torch.load(copy / FIRST, weights_only=False) if not how.isdigit() else pickle.loads((copy / FIRST).read_bytes())
    assert marker.exists()  # the file does run code if it is loaded without protection


PLAIN = "tensors by name and nothing else"


@pytest.mark.parametrize(
    "change, parts",
    [
        (lambda t: list(t.values()), ("contains a list", PLAIN)),
        (lambda t: {"model": t}, ("'model' is no plain tensor", PLAIN)),
        (lambda t: t.update(step=5), ("'step' is no plain tensor", PLAIN)),
        (lambda t: t.update({5: torch.ones(1)}), ("5 is no plain tensor", PLAIN)),
        (lambda t: t.update({EMBEDDING: t[EMBEDDING].to_sparse()}), (f"'{EMBEDDING}' is no plain tensor", PLAIN)),
        (lambda t: t.update({EMBEDDING: t[EMBEDDING].to("meta")}), (f"'{EMBEDDING}' is no plain tensor", PLAIN)),
        (lambda t: t.update({W2: torch.ones(1).expand(64, 192)}), (f"'{W2}' is no plain tensor", PLAIN)),
        (lambda t: t.update({W2: torch.complex(t[W2], t[W2]).conj().imag}), (f"'{W2}' is no plain tensor", PLAIN)),
        (lambda t: t.update({W2: t[W2].to(torch.int8)}), (W2, "torch.int8", "bfloat16, float16 and float32", "convert")),
        (lambda t: t.update({W2: t[W2].double()}), (W2, "torch.float64", "bfloat16, float16 and float32")),
        (lambda t: t.update({NORM: t[NORM] > 1}), (NORM, "torch.bool", "bfloat16, float16 and float32")),
        (lambda t: t.clear(), ("n_layers=2", "contain 0 layers")),
        (lambda t: t.update({"layers." + "9" * 5000: torch.ones(1)}), ("n_layers=2", "contain 3 layers")),
        (lambda t: {k: v for k, v in t.items() if k != W2}, (FIRST, f"lacks {W2}", "damaged", "every .pth file")),
        (lambda t: {k: v for k, v in t.items() if "norm" not in k}, (FIRST, "lacks", "and 2 more")),
        (
            lambda t: t.update(lora=torch.ones(1)),
            (FIRST, "contains unknown lora", "if it can do without them", "torch.save() it again"),
        ),
        (lambda t: t.update({"rope.freqs.weight": torch.ones(1)}), (FIRST, "contains unknown rope.freqs.weight")),
        (lambda t: t.update({"x" * 200_000: torch.ones(1)}), (FIRST, "contains unknown xxxx")),
        (lambda t: t.update({"\x1b[2J": torch.ones(1)}), (FIRST, r"contains unknown \x1b[2J")),
        (lambda t: t.update({W2: t[W2].T.contiguous()}), (f"{W2} is (192, 64)", "(64, 192)", ONE_MODEL)),
        (lambda t: t.update({NORM: torch.ones(1, 64)}), (f"{NORM} is (1, 64)", "(64,)", ONE_MODEL)),
        (lambda t: t.update({EMBEDDING: torch.tensor(1.0)}), (f"{EMBEDDING} is ()", "(384, 64)", ONE_MODEL)),
        (lambda t: t.update({EMBEDDING: torch.ones(400, 64)}), ("output.weight is (384, 64)", "(400, 64)", "same rows")),
    ],
)
def test_a_shard_with_other_contents_than_the_models_tensors_raises(
    assert_build_raises: AssertBuildRaises, copy: Path, change: Callable[[dict], Any], parts: tuple
) -> None:
    change_tensors(copy / FIRST, change)
    assert_build_raises(copy, *parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [EMBEDDING, W2, NORM, "norm.weight", "output.weight"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_nan_or_infinity_in_any_weight_raises(
    assert_build_raises: AssertBuildRaises, tmp_path: Path, halves: Path, dtype: torch.dtype, name: str, value: float
) -> None:
    """Damage the last value of a weight in the second shard; if it is a norm, in both shards, as norms must be equal."""
    folder = shutil.copytree(halves, tmp_path / "model")
    for file in (FIRST, SECOND):

        def change(tensors: dict, spoil: bool = file == SECOND or "norm" in name) -> dict:
            tensors = {k: v.to(dtype) for k, v in tensors.items()}
            tensors[name].view(-1)[-1] = value if spoil else 1
            return tensors

        change_tensors(folder / file, change)
    assert_build_raises(folder, name, "NaN or infinity", "checklist.chk", reads=True)


def test_weights_too_large_for_the_dtype_raise(
    assert_build_raises: AssertBuildRaises, copy: Path, small: SimpleNamespace
) -> None:
    change_tensors(copy / FIRST, lambda tensors: tensors.update({W2: tensors[W2] * 1e6}))
    assert_build_raises(copy, W2, "too large for torch.float16", "'bfloat16'", reads=True, dtype="float16")
    model = Llama.build(copy, small.tokenizer_path, 16, 2, device="cpu", dtype="bfloat16").model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_unusual_but_valid_checkpoints_load(copy: Path, small: SimpleNamespace) -> None:
    """Load mixed dtypes, weights whose sum overflows, nn.Parameters, an OrderedDict, strided tensors, and JSON with a BOM."""

    def check(change: Callable[[dict], Any], dtype: torch.dtype) -> None:
        change_tensors(copy / FIRST, change)
        stored = torch.load(copy / FIRST)
        llama = Llama.build(copy, small.tokenizer_path, 16, 2, device="cpu")
        model = llama.model
        assert {p.dtype for p in model.parameters()} == {llama.engine.forward().cache.data.dtype} == {dtype}
        assert all(torch.equal(weight, stored[name].to(dtype)) for name, weight in model.state_dict().items())
        assert not any(p.requires_grad for p in model.parameters())

    check(lambda t: OrderedDict((k, torch.nn.Parameter(v)) for k, v in t.items()), torch.float32)
    check(lambda t: t.update({W2: t[W2].T.contiguous().T}), torch.float32)
    (copy / "params.json").write_bytes(b"\xef\xbb\xbf" + (copy / "params.json").read_bytes())
    check(lambda t: {k: v.detach().half() for k, v in t.items()}, torch.float16)
    check(lambda t: t.update({W2: torch.full((64, 192), 60000.0).half()}), torch.float16)
    check(lambda t: {k: v.bfloat16() for k, v in t.items()}, torch.bfloat16)
    check(
        lambda t: t.update({NORM: t[NORM].float(), W2: t[W2].half()}), torch.bfloat16
    )  # the embeddings determine the dtype of the model


def test_a_tokenizer_with_another_vocabulary_size_raises(
    assert_build_raises: AssertBuildRaises, tmp_path: Path, llama: Llama, small: SimpleNamespace, halves: Path
) -> None:
    path = train_tokenizer(tmp_path / TOKENIZER, 400)
    for folder in (small.folder, halves):
        assert_build_raises(
            folder, EMBEDDING, "(384, ", "tokenizer has 400 tokens", "model's own tokenizer.model", tokenizer_path=path
        )
    with pytest.raises(CheckpointError, match=r"vocabulary of 384, .* 400 tokens"):
        Llama(llama.model, Tokenizer(path))


UNABLE_TO_MMAP = "unable to mmap 303809 bytes from file <consolidated.00.pth>: {} ({})"
NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: Error code 12 (Cannot ...)"
)


@pytest.mark.parametrize(
    "error, parts",
    [
        (RuntimeError(UNABLE_TO_MMAP.format("Cannot allocate memory", 12)), ("Cannot allocate memory", "raise `ulimit -v`")),
        (RuntimeError("unable to open file <x> in read-only mode: Too many open files (24)"), ("Too many", "`ulimit -n`")),
        (RuntimeError("unable to open file <x> in read-only mode: Permission denied (13)"), ("Permission denied",)),
        (RuntimeError(NO_MEMORY), ("Cannot allocate memory", "raise `ulimit -v`")),
        (MemoryError(), ("Cannot allocate memory", "raise `ulimit -v`")),
        (OSError(5, "Input/output error"), ("Input/output error", "check the disk or the network")),
        (OSError(116, "Stale file handle"), ("Stale file handle",)),
    ],
    ids=lambda value: f"{value!r:.40}" if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("file", [FIRST, "int8.safetensors"])
def test_an_error_of_the_system_keeps_its_reason_and_is_not_called_damage(
    copy: Path, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, file: str, error: Exception, parts: tuple
) -> None:
    quantize = None if file == FIRST else "int8"
    if quantize:
        packed_file.save_packed_file(copy, quantize)

    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(torch.UntypedStorage, "from_file", fail)
    with pytest.raises(CheckpointError) as caught:
        Llama.build(copy, small.tokenizer_path, 16, 2, device="cpu", quantize=quantize)
    message = str(caught.value)
    assert [part for part in (file, "cannot be read", *parts) if part not in message] == []
    assert "damaged" not in message and "fetch" not in message and "make it again" not in message


def test_an_error_of_the_disk_while_a_zip_is_read_is_not_called_damage(
    assert_build_raises: AssertBuildRaises, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(zipfile.ZipFile, "infolist", fail)
    assert_build_raises(copy, f"{FIRST}: cannot be read: Input/output error; check the disk")


BUILD_WITH_LITTLE_ADDRESS_SPACE = """
import resource, sys
from llama import Llama, LlamaError
folder, tokenizer, tiny = sys.argv[1:]
Llama.build(tiny, tokenizer, 16, 1, device="cpu")  # loads all code before the limit is set
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize:"))
resource.setrlimit(resource.RLIMIT_AS, (used + (20 << 20),) * 2)
try:
    Llama.build(folder, tokenizer, 16, 1, device="cpu")
except LlamaError as e:
    print(e)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_too_little_address_space_for_a_shard_raises_with_the_way_out(tmp_path: Path, small: SimpleNamespace) -> None:
    params = small.params | {"dim": 512}
    folder = write_shards(tmp_path / "big", params, random_weights(params, 384, 1376))  # a shard of 24.8 MB
    done = run("-c", BUILD_WITH_LITTLE_ADDRESS_SPACE, folder, small.tokenizer_path, small.folder)
    assert f"{FIRST}: cannot be read: Cannot allocate memory; raise `ulimit -v`" in done.stdout, done.stderr
