"""Test which packed files are refused, and that a save that fails leaves no file."""

import functools
import itertools
import json
import os
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import CheckpointError, DeviceError, InputError, Llama, ModelArgs, NonFiniteError, Transformer
from llama.checkpoint import loading, packed_file, safetensors_file

from . import packed_folders
from .packed_folders import build
from .support import assert_raises, write_shards

int4_folder, bf16_folder = packed_folders.int4_folder, packed_folders.bf16_folder  # fixtures


def test_saving_float32_weights_as_bfloat16_is_refused(small: SimpleNamespace, tmp_path: Path) -> None:
    folder = write_shards(tmp_path, small.params, small.weights)
    assert_raises(lambda: packed_file.save_packed_file(folder, "bfloat16"), InputError, "stored as torch.float32")
    only_output = {name: w if name == "output.weight" else w.bfloat16() for name, w in small.weights.items()}
    folder = write_shards(tmp_path / "only_output", small.params, only_output)
    assert_raises(
        lambda: packed_file.save_packed_file(folder, "bfloat16"), InputError, "output.weight is stored as torch.float32"
    )


def test_a_bfloat16_file_with_nan_fails_at_the_first_token(bf16_folder: Path, small: SimpleNamespace) -> None:
    """Loading does not read all weights of a file that was checked before it was written."""
    path = bf16_folder / "bfloat16.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    first = 8 + length + json.loads(data[8 : 8 + length])["layers.1.attention.wo.weight"]["data_offsets"][0]
    data[first : first + 2] = b"\xff\xff"
    path.write_bytes(data)
    llama = build(bf16_folder, small, quantize=None)
    assert_raises(lambda: llama.generate([[1, 5]], 3), NonFiniteError, "not finite; the weights are damaged")


def test_a_damaged_shard_beside_a_packed_file_is_refused(int4_folder: Path, small: SimpleNamespace) -> None:
    shard = int4_folder / "consolidated.01.pth"
    content = shard.read_bytes()
    for damaged in (content[:-30], content.replace(b"data.pkl", b"data\xff\xff\xff\xff"), b"PK\5\6" * 20):
        shard.unlink()
        shard.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"consolidated.01.pth: damaged, or no PyTorch checkpoint"):
            build(int4_folder, small)


def test_a_packed_file_made_from_other_weights_or_another_model_is_refused(
    int4_folder: Path, small: SimpleNamespace, tmp_path: Path
) -> None:
    other = {name: w.clone() for name, w in small.weights.items()}
    other["layers.1.feed_forward.w2.weight"][0, 0] += 1
    folder = write_shards(tmp_path / "other", small.params, other, 2)
    (folder / "int4.safetensors").write_bytes((int4_folder / "int4.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"int4.safetensors: made from other weights than the shards beside it"):
        build(folder, small)
    build(folder, small, quantize="int8")  # there is no int8 file, so the shards are read
    for shard in folder.glob("*.pth"):
        shard.unlink()
    (folder / "params.json").write_text(json.dumps(small.params | {"n_layers": 1}))
    with pytest.raises(CheckpointError, match=r"n_layers=1, but the shards contain 2"):
        build(folder, small)


@pytest.mark.parametrize(
    "damage",
    ["cut", "empty", "header", "metadata", "format", "offsets", "overlap", "dtype", "missing", "nan", "zeros", "extra", "deep"],
)
def test_a_damaged_packed_file_is_refused(int4_folder: Path, small: SimpleNamespace, damage: str) -> None:
    path = int4_folder / "int4.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    name = "layers.0.attention.wo.weight"
    if damage == "format":
        header["__metadata__"]["kind"] = "int8"
    elif damage == "offsets":
        header[name]["data_offsets"] = [0, 1 << 40]
    elif damage == "dtype":
        header[name]["dtype"] = "I8"
    elif damage == "missing":
        del header[name + ".scale"]
    elif damage == "extra":
        header["extra"] = header[name]
    elif damage == "metadata":
        header["__metadata__"] = None
    elif damage == "overlap":
        header[name]["data_offsets"] = header[name.replace(".0.", ".1.")]["data_offsets"]
    elif damage in ("nan", "zeros"):
        first, last = header[name + ".scale"]["data_offsets"]
        rest[first:last] = (b"\xff" if damage == "nan" else b"\0") * (last - first)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    whole = len(text).to_bytes(8, "little") + text + bytes(rest)
    damaged = {
        "cut": data[:-40],
        "empty": b"",
        "header": b"\xff" * len(data),
        "deep": (10**5).to_bytes(8, "little") + b"[" * 10**5,
    }
    path.write_bytes(damaged.get(damage, whole))
    with pytest.raises(CheckpointError, match=r"int4.safetensors|wo.weight.scale: not all scales are finite"):
        build(int4_folder, small)


def test_a_failed_save_leaves_no_file(small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test saving with too little free space, to a disk that becomes full, and with weights that contain NaN."""
    folder = write_shards(tmp_path, small.params, small.weights)
    usage = shutil.disk_usage(folder)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(CheckpointError, match=r"would take 0\.\d+ MB, but 0\.001 MB are free"):
            packed_file.save_packed_file(folder, "int8")

    def raise_disk_full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", raise_disk_full)
        with pytest.raises(CheckpointError, match=r"cannot be written: No space left on device"):
            packed_file.save_packed_file(folder, "int8")
    assert sorted(p.name for p in folder.iterdir()) == ["consolidated.00.pth", "params.json"]
    other = {name: w.clone() for name, w in small.weights.items()}
    other["output.weight"][3, 3] = float("nan")
    write_shards(folder, small.params, other)
    with pytest.raises(CheckpointError, match=r"output.weight contains NaN"):
        packed_file.save_packed_file(folder, "int8")
    with pytest.raises(CheckpointError, match=r"output.weight contains NaN"):
        build(folder, small)


def test_the_error_names_an_unreadable_shard(int4_folder: Path, small: SimpleNamespace) -> None:
    for content in (b"", b"<html>", (int4_folder / "consolidated.01.pth").read_bytes()[:-100]):
        (int4_folder / "consolidated.01.pth").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"consolidated.01.pth: damaged, or no PyTorch checkpoint"):
            build(int4_folder, small)


def test_two_processes_that_save_at_the_same_time_do_not_harm_each_other(
    small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pretend that a second process starts to save, and fails, while the first one is writing. Also check that saving on
    several ranks is refused."""
    folder, check_finite, second_saves = write_shards(tmp_path, small.params, small.weights), loading.check_finite, []

    def save_meanwhile(*args: Any) -> Any:
        if not second_saves:
            second_saves.append(True)
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: -1)
                patch.setattr(loading, "check_finite", lambda *_: pytest.fail("the second process fails"))
                with pytest.raises(pytest.fail.Exception):
                    packed_file.save_packed_file(folder, "int8")
        return check_finite(*args)

    monkeypatch.setattr(loading, "check_finite", save_meanwhile)
    packed_file.save_packed_file(folder, "int8")
    build(folder, small, quantize="int8")
    assert second_saves and sorted(p.name for p in folder.iterdir()) == [
        "consolidated.00.pth",
        "int8.safetensors",
        "params.json",
    ]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DeviceError, match="run it without torchrun"):
        packed_file.save_packed_file(folder, "int8")


def test_a_packed_file_of_another_layout_is_refused(
    small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(small.folder, tmp_path / "m")
    with monkeypatch.context() as patch:
        patch.setattr(packed_file, "LAYOUT", "another")
        packed_file.save_packed_file(folder, "int8")
    assert_raises(lambda: packed_file.open_packed_file(folder, "int8"), CheckpointError, "its layout is 'another', 'int8'")


def test_a_shard_with_too_many_zip_records_is_refused(small: SimpleNamespace, tmp_path: Path) -> None:
    """Refuse a shard with more than 10,000 zip records, because the fingerprint of the shards reads 4 kB of each record."""
    folder = shutil.copytree(small.folder, tmp_path / "m")
    packed_file.save_packed_file(folder, "int8")
    with zipfile.ZipFile(folder / "consolidated.00.pth", "w") as archive:
        for i in range(packed_file.MAX_ZIP_RECORDS + 1):
            archive.writestr(f"archive/data/{i}", b"")
    assert_raises(lambda: packed_file.open_packed_file(folder, "int8"), CheckpointError, "more than 10,000 records")


def test_errors_shorten_long_values_in_the_header_of_a_packed_file(small: SimpleNamespace, tmp_path: Path) -> None:
    path = packed_file.save_packed_file(shutil.copytree(small.folder, tmp_path / "m"), "int8")
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    norm, end = header["norm.weight"], max(entry["data_offsets"][1] for name, entry in header.items() if name[0] != "_")
    for change, part in (
        ({"__metadata__": header["__metadata__"] | {"layout": "9" * 1_000_000}}, "its layout is"),
        ({"x" * 1_000_000: {"dtype": "I8", "shape": [0], "data_offsets": [end, end]}}, "params.json makes none"),
        ({"norm.weight": norm | {"shape": [1] * 300_000 + norm["shape"]}}, "cut off, damaged"),
    ):
        text = json.dumps(header | change).encode()
        text += b" " * (-(8 + len(text)) % 64)
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
        build = functools.partial(Llama.build, path.parent, small.tokenizer_path, 16, 2, device="cpu", quantize="int8")
        assert_raises(build, CheckpointError, part)


@pytest.mark.parametrize("weight", ["first", "last"])
def test_a_shard_that_changes_while_weights_are_saved_is_refused(
    small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: str
) -> None:
    folder = shutil.copytree(small.folder, tmp_path / "m")
    check_finite, n_checks = loading.check_finite, itertools.count(1)
    touched_at = 1 if weight == "first" else len(small.weights)

    def touch_shard(*args: Any) -> Any:
        if next(n_checks) == touched_at:
            os.utime(folder / "consolidated.00.pth", ns=(0, 5))
        return check_finite(*args)

    monkeypatch.setattr(loading, "check_finite", touch_shard)
    assert_raises(lambda: packed_file.save_packed_file(folder, "int8"), CheckpointError, "while it was being read")
    assert next(n_checks) == touched_at + 1 and not (folder / "int8.safetensors").exists()


def test_a_header_that_is_too_long_and_tensors_of_unsupported_dtypes_are_refused(
    small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(small.folder, tmp_path / "m")
    path = packed_file.save_packed_file(folder, "int8")
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_file, "MAX_HEADER_BYTES", 64)
        assert_raises(lambda: packed_file.open_packed_file(folder, "int8"), CheckpointError, "cut off, damaged")
    shards = packed_file.open_packed_file(folder, "int8")
    assert shards is not None
    with torch.device("meta"):
        model = Transformer(ModelArgs(**{**small.params, "vocab_size": 384}))
    packed_file.check_packed_file(model, shards)
    for name, tensor in shards[path.name].items():
        if tensor.ndim == 1 or name == "tok_embeddings.weight":
            shards[path.name][name] = tensor.to(torch.int8)
    assert_raises(lambda: packed_file.check_packed_file(model, shards), CheckpointError, "tok_embeddings.weight")
