"""Quantized weights in a file: as good as the shards they were made from, or refused."""

import functools
import itertools
import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import CheckpointError, DeviceError, InputError, Llama, ModelArgs, Transformer
from llama.checkpoint import loading, packed_file
from llama.cli.main import main
from llama.kernels import pack, packing
from llama.kernels.blocked_linear import BlockedLinear
from llama.kernels.packed_weight import PackedWeight

from .support import assert_raises, no_extension, write_shards


@pytest.fixture
def kept(small: SimpleNamespace, tmp_path: Path) -> Path:
    """A folder of two shards, and int4.safetensors."""
    folder = write_shards(tmp_path / "kept", small.params, small.weights, 2)
    assert packed_file.save_packed_file(folder, "int4") == folder / "int4.safetensors"
    assert sorted(p.name for p in folder.iterdir()) == [
        "consolidated.00.pth", "consolidated.01.pth", "int4.safetensors", "params.json",
    ]  # fmt: skip
    return folder


def build(folder: Path, small: SimpleNamespace, **options: Any) -> Llama:
    return Llama.build(folder, small.tokenizer_path, 32, 2, device="cpu", **{"quantize": "int4"} | options)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_saved_file_answers_as_the_shards_it_was_made_from(
    kept: Path, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, dtype: str | None
) -> None:
    tokens = torch.arange(3, 63).view(2, 30)
    with monkeypatch.context() as patch:
        for again in ("quantize", "pack_rows"):
            patch.setattr(loading, again, lambda *_: pytest.fail("quantized or packed again"))
        from_file = build(kept, small, dtype=dtype).model.forward(tokens, 0)
        for shard in kept.glob("*.pth"):
            shard.rename(shard.with_suffix(".away"))
        alone = build(kept, small, dtype=dtype).model.forward(tokens, 0)
    with pytest.raises(CheckpointError, match=r"it contains quantized weights: build with quantize='int4'"):
        build(kept, small, quantize=None)
    for away in kept.glob("*.away"):
        away.rename(away.with_suffix(".pth"))
    (kept / "int4.safetensors").unlink()
    assert torch.equal(build(kept, small, dtype=dtype).model.forward(tokens, 0), from_file) and torch.equal(alone, from_file)


@pytest.fixture
def in_bfloat16(small: SimpleNamespace, tmp_path: Path) -> Path:
    """A folder of two shards in bfloat16, and bfloat16.safetensors."""
    folder = write_shards(tmp_path / "m", small.params, {name: w.bfloat16() for name, w in small.weights.items()}, 2)
    packed_file.save_packed_file(folder, "bfloat16")
    return folder


def test_weights_saved_as_they_are_make_the_same_model(in_bfloat16: Path, small: SimpleNamespace) -> None:
    model = build(in_bfloat16, small, quantize=None).model
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, small.weights[name].bfloat16()), name
    (in_bfloat16 / "bfloat16.safetensors").rename(in_bfloat16 / "away")
    tokens = torch.arange(3, 63).view(2, 30)
    logits = build(in_bfloat16, small, quantize=None).model.forward(tokens, 0)
    torch.testing.assert_close(model.forward(tokens, 0), logits, atol=0.05, rtol=0.05)


def test_weights_saved_as_they_are_serve_any_dtype_where_there_are_no_shards(in_bfloat16: Path, small: SimpleNamespace) -> None:
    for shard in in_bfloat16.glob("*.pth"):
        shard.unlink()
    weight = build(in_bfloat16, small, quantize=None, dtype="float32").model.layers[1].feed_forward.w2.weight
    assert torch.equal(weight, small.weights["layers.1.feed_forward.w2.weight"].bfloat16().float())
    with pytest.raises(CheckpointError, match=r"in bfloat16: build without quantize"):
        build(in_bfloat16, small)


def test_a_bfloat16_file_is_not_read_for_float32(in_bfloat16: Path, small: SimpleNamespace) -> None:
    """The file is damaged, so that reading it would raise."""
    (in_bfloat16 / "bfloat16.safetensors").write_bytes(b"damaged")
    build(in_bfloat16, small, quantize=None, dtype="float32")
    with pytest.raises(CheckpointError, match=r"bfloat16.safetensors: cut off, damaged"):
        build(in_bfloat16, small, quantize=None)


def test_weights_of_more_digits_are_not_saved_in_bfloat16(small: SimpleNamespace, tmp_path: Path) -> None:
    folder = write_shards(tmp_path, small.params, small.weights)
    assert_raises(lambda: packed_file.save_packed_file(folder, "bfloat16"), InputError, "stored as torch.float32")
    one = {name: w if name == "output.weight" else w.bfloat16() for name, w in small.weights.items()}
    folder = write_shards(tmp_path / "one", small.params, one)
    assert_raises(lambda: packed_file.save_packed_file(folder, "bfloat16"), InputError, "output.weight is stored as torch.float32")


def test_a_bfloat16_file_that_holds_nan_is_refused(in_bfloat16: Path, small: SimpleNamespace) -> None:
    path = in_bfloat16 / "bfloat16.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    first = 8 + length + json.loads(data[8 : 8 + length])["layers.1.attention.wo.weight"]["data_offsets"][0]
    data[first : first + 2] = b"\xff\xff"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"layers.1.attention.wo.weight contains NaN"):
        build(in_bfloat16, small, quantize=None)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_weights_stored_in_any_order_and_of_several_dtypes_are_quantized(
    small: SimpleNamespace, tmp_path: Path, quantize: str
) -> None:
    """Transposed in the file, or wq in another dtype than wk: C is given rows of one dtype, side by side."""
    weights = {name: w.bfloat16() for name, w in small.weights.items()}
    plain = build(write_shards(tmp_path / "plain", small.params, weights), small, quantize=quantize)
    odd = write_shards(tmp_path / "odd", small.params, weights)
    stored = torch.load(odd / "consolidated.00.pth")
    for name in ("layers.0.attention.wo.weight", "layers.1.feed_forward.w1.weight"):
        stored[name] = stored[name].t().contiguous().t()
    stored["layers.0.attention.wq.weight"] = stored["layers.0.attention.wq.weight"].float()
    torch.save(stored, odd / "consolidated.00.pth")
    for folder in (odd, packed_file.save_packed_file(odd, quantize).parent):
        tokens = torch.arange(3, 33).view(1, 30)
        assert torch.equal(build(folder, small, quantize=quantize).model.forward(tokens, 0), plain.model.forward(tokens, 0))


@pytest.mark.parametrize("kind", packed_file.PACKED_FORMATS)
def test_the_file_is_the_same_without_compiled_code(in_bfloat16: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    file = in_bfloat16 / f"{kind}.safetensors"
    packed_file.save_packed_file(in_bfloat16, kind)
    compiled = file.read_bytes()
    monkeypatch.setattr(pack, "status", no_extension)
    packed_file.save_packed_file(in_bfloat16, kind)
    assert file.read_bytes() == compiled


@pytest.mark.parametrize("kind", packed_file.PACKED_FORMATS)
def test_a_file_is_taken_apart_where_no_kernel_reads_blocks(
    in_bfloat16: Path, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    packed_file.save_packed_file(in_bfloat16, kind)
    asked = None if kind == "bfloat16" else kind
    weights = build(in_bfloat16, small, quantize=asked).model.state_dict()
    for module in (loading, packing):
        monkeypatch.setattr(module, "extension_for", lambda kind: None)
    apart = build(in_bfloat16, small, quantize=asked).model
    assert not any(isinstance(p, PackedWeight) and isinstance(p.shared.kernel, BlockedLinear) for p in apart.parameters())
    for name, weight in apart.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_the_file_is_one_that_others_can_read(kept: Path) -> None:
    """safetensors: length, JSON, numbers without holes, each aligned."""
    data = (kept / "int4.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    about = header.pop("__metadata__")
    assert about["kind"] == "int4" and len(about["source"]) == 64 and all(isinstance(v, str) for v in about.values())
    spans = sorted(tuple(entry["data_offsets"]) for entry in header.values())
    assert spans[0][0] == 0 and spans[-1][1] == len(data) - 8 - length
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans)) and (8 + length) % 64 == 0


def test_a_shard_beside_it_that_is_no_zip_any_more(kept: Path, small: SimpleNamespace) -> None:
    shard = kept / "consolidated.01.pth"
    whole = shard.read_bytes()
    for damaged in (whole[:-30], whole.replace(b"data.pkl", b"data\xff\xff\xff\xff"), b"PK\5\6" * 20):
        shard.unlink()
        shard.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"consolidated.01.pth: damaged, or no PyTorch checkpoint"):
            build(kept, small)


def test_a_file_made_from_other_weights_is_refused(kept: Path, small: SimpleNamespace, tmp_path: Path) -> None:
    other = {name: w.clone() for name, w in small.weights.items()}
    other["layers.1.feed_forward.w2.weight"][0, 0] += 1
    folder = write_shards(tmp_path / "other", small.params, other, 2)
    (folder / "int4.safetensors").write_bytes((kept / "int4.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"int4.safetensors: made from other weights than the shards beside it"):
        build(folder, small)
    build(folder, small, quantize="int8")  # which has no file: from the shards
    for shard in folder.glob("*.pth"):
        shard.unlink()
    (folder / "params.json").write_text(json.dumps(small.params | {"n_layers": 1}))
    with pytest.raises(CheckpointError, match=r"n_layers=1, but the shards contain 2"):
        build(folder, small)


@pytest.mark.parametrize(
    "damage",
    ["cut", "empty", "header", "about", "kind", "offsets", "overlap", "dtype", "missing", "nan", "zeros", "other", "deep"],
)
def test_a_damaged_file_is_refused(kept: Path, small: SimpleNamespace, damage: str) -> None:
    path = kept / "int4.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    name = "layers.0.attention.wo.weight"
    if damage == "kind":
        header["__metadata__"]["kind"] = "int8"
    elif damage == "offsets":
        header[name]["data_offsets"] = [0, 1 << 40]
    elif damage == "dtype":
        header[name]["dtype"] = "I8"
    elif damage == "missing":
        del header[name + ".scale"]
    elif damage == "other":
        header["other"] = header[name]
    elif damage == "about":
        header["__metadata__"] = None
    elif damage == "overlap":
        header[name]["data_offsets"] = header[name.replace(".0.", ".1.")]["data_offsets"]
    elif damage in ("nan", "zeros"):
        first, last = header[name + ".scale"]["data_offsets"]
        rest[first:last] = (b"\xff" if damage == "nan" else b"\0") * (last - first)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    whole = len(text).to_bytes(8, "little") + text + bytes(rest)
    kinds = {
        "cut": data[:-40],
        "empty": b"",
        "header": b"\xff" * len(data),
        "deep": (10**5).to_bytes(8, "little") + b"[" * 10**5,
    }
    path.write_bytes(kinds.get(damage, whole))
    with pytest.raises(CheckpointError, match=r"int4.safetensors|wo.weight.scale: not all scales are finite"):
        build(kept, small)


def test_saving_leaves_nothing_half_done(small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shards(tmp_path, small.params, small.weights)
    usage = shutil.disk_usage(folder)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(CheckpointError, match=r"would take 0\.\d+ MB, but 0\.001 MB are free"):
            packed_file.save_packed_file(folder, "int8")

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(packed_file, "_tensors_to_write", full)
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


def test_the_commands(small: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_shards(tmp_path, small.params, small.weights, 2)
    assert main(["quantize", "--ckpt_dir", str(folder), "int8"]) == 0
    assert re.fullmatch(rf"{folder}/int8\.safetensors: 0\.\d+ MB\n", capsys.readouterr().out)
    model = ["--ckpt_dir", str(folder), "--tokenizer_path", str(small.tokenizer_path), "--device", "cpu", "--temperature", "0"]
    assert main(["complete", *model, "--quantize", "int8", "--max_gen_len", "4", "The quick"]) == 0
    want = build(folder, small, quantize="int8").text_completion(["The quick"], temperature=0, max_gen_len=4)
    assert capsys.readouterr().out == f"The quick\n> {want[0]['generation']}\n"
    assert main(["quantize", "--ckpt_dir", str(tmp_path / "nowhere"), "int8"]) == 1
    assert "No such file" in capsys.readouterr().err


def test_shards_that_cannot_be_read_are_named(kept: Path, small: SimpleNamespace) -> None:
    for content in (b"", b"<html>", (kept / "consolidated.01.pth").read_bytes()[:-100]):
        (kept / "consolidated.01.pth").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"consolidated.01.pth: damaged, or no PyTorch checkpoint"):
            build(kept, small)


def test_other_weights_are_told_where_writers_leave_the_checksums_out(small: SimpleNamespace, tmp_path: Path) -> None:
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this torch always writes checksums")
    torch.serialization.set_crc32_options(False)
    try:
        doubled = {name: 2 * w for name, w in small.weights.items()}
        folders = [write_shards(tmp_path / str(i), small.params, w) for i, w in enumerate((small.weights, doubled))]
    finally:
        torch.serialization.set_crc32_options(True)
    assert len({packed_file.shards_fingerprint(folder) for folder in folders}) == 2
    assert packed_file.shards_fingerprint(folders[0]) == packed_file.shards_fingerprint(folders[0])


def test_two_who_save_do_not_meet(small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins, and fails, while the first is at it; ranks are refused."""
    folder, plain, met = write_shards(tmp_path, small.params, small.weights), packed_file._tensors_to_write, []

    def meeting(*args: Any) -> Any:
        if not met:
            met.append(True)
            with monkeypatch.context() as patch:
                patch.setattr(packed_file.os, "getpid", lambda: -1)
                patch.setattr(packed_file, "_tensors_to_write", lambda *_: pytest.fail("the second"))
                with pytest.raises(pytest.fail.Exception):
                    packed_file.save_packed_file(folder, "int8")
        return plain(*args)

    monkeypatch.setattr(packed_file, "_tensors_to_write", meeting)
    packed_file.save_packed_file(folder, "int8")
    build(folder, small, quantize="int8")
    assert met and sorted(p.name for p in folder.iterdir()) == ["consolidated.00.pth", "int8.safetensors", "params.json"]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DeviceError, match="run it without torchrun"):
        packed_file.save_packed_file(folder, "int8")


def test_a_file_of_another_layout_is_refused(small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(small.folder, tmp_path / "m")
    with monkeypatch.context() as patch:
        patch.setattr(packed_file, "LAYOUT", "another")
        packed_file.save_packed_file(folder, "int8")
    assert_raises(lambda: packed_file.open_packed_file(folder, "int8"), CheckpointError, "its layout is 'another', 'int8'")


def test_a_shard_of_many_records_is_no_shard(small: SimpleNamespace, tmp_path: Path) -> None:
    """Of each, 4 kB would be read, wherever it says that it begins."""
    folder = shutil.copytree(small.folder, tmp_path / "m")
    packed_file.save_packed_file(folder, "int8")
    with zipfile.ZipFile(folder / "consolidated.00.pth", "w") as archive:
        for i in range(packed_file.MAX_ZIP_RECORDS + 1):
            archive.writestr(f"archive/data/{i}", b"")
    assert_raises(lambda: packed_file.open_packed_file(folder, "int8"), CheckpointError, "more than 10,000 records")


def test_what_a_header_says_is_cut_short(small: SimpleNamespace, tmp_path: Path) -> None:
    path = packed_file.save_packed_file(shutil.copytree(small.folder, tmp_path / "m"), "int8")
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    norm, end = header["norm.weight"], max(entry["data_offsets"][1] for name, entry in header.items() if name[0] != "_")
    for change, part in (
        ({"__metadata__": header["__metadata__"] | {"layout": "9" * 1_000_000}}, "its layout is"),
        ({"x" * 1_000_000: {"dtype": "I8", "shape": [0], "data_offsets": [end, end]}}, "params.json makes none"),
        ({"norm.weight": norm | {"shape": [1] * 300_000 + norm["shape"]}}, "norm.weight' is (torch."),
    ):
        text = json.dumps(header | change).encode()
        text += b" " * (-(8 + len(text)) % 64)
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
        build = functools.partial(Llama.build, path.parent, small.tokenizer_path, 16, 2, device="cpu", quantize="int8")
        assert_raises(build, CheckpointError, part)


def test_wide_numbers_come_first(small: SimpleNamespace) -> None:
    """So that each lies where its size says, with nothing in between."""
    with torch.device("meta"):
        model = Transformer(ModelArgs(**{**small.params, "vocab_size": 384}))
    sizes = [dtype.itemsize for dtype, _ in packed_file.file_layout(model, torch.bfloat16, "int8").values()]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("at", ["first", "last"])
def test_a_shard_touched_while_it_is_saved(
    small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    folder = shutil.copytree(small.folder, tmp_path / "m")
    written, seen, when = packed_file._tensors_to_write, [], 1 if at == "first" else len(small.weights)

    def touched(name: str, *args: Any) -> Any:
        seen.append(name)
        if len(seen) == when:
            os.utime(folder / "consolidated.00.pth", ns=(0, 5))
        return written(name, *args)

    monkeypatch.setattr(packed_file, "_tensors_to_write", touched)
    assert_raises(lambda: packed_file.save_packed_file(folder, "int8"), CheckpointError, "while it was being read")
    assert len(seen) == when and not (folder / "int8.safetensors").exists()


def test_a_header_of_any_length_and_dtypes_of_any_kind_are_refused(
    small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(small.folder, tmp_path / "m")
    path = packed_file.save_packed_file(folder, "int8")
    with monkeypatch.context() as patch:
        patch.setattr(packed_file, "MAX_HEADER_BYTES", 64)
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
