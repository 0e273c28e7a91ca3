"""Test saving weights to packed files and loading them. A file gives the same answers as the shards, or raises an error."""

import functools
import itertools
import json
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import CheckpointError, DeviceError, InputError, Llama, ModelArgs, Transformer
from llama.checkpoint import loading, packed_file, safetensors_file
from llama.cli.main import main
from llama.kernels import host_memory, pack, packing
from llama.kernels.blocked_linear import BlockedLinear, extension_for
from llama.kernels.packed_weight import PackedWeight

from .support import assert_raises, no_extension, write_shards


@pytest.fixture
def int4_folder(small: SimpleNamespace, tmp_path: Path) -> Path:
    """Write a checkpoint folder with two shards and the packed file int4.safetensors."""
    folder = write_shards(tmp_path / "int4", small.params, small.weights, 2)
    assert packed_file.save_packed_file(folder, "int4") == folder / "int4.safetensors"
    assert sorted(p.name for p in folder.iterdir()) == [
        "consolidated.00.pth", "consolidated.01.pth", "int4.safetensors", "params.json",
    ]  # fmt: skip
    return folder


def build(folder: Path, small: SimpleNamespace, **options: Any) -> Llama:
    return Llama.build(folder, small.tokenizer_path, 32, 2, device="cpu", **{"quantize": "int4"} | options)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_packed_file_gives_the_logits_of_its_shards_with_and_without_the_shards(
    int4_folder: Path, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, dtype: str | None
) -> None:
    """Check that loading a packed file neither quantizes nor packs weights again."""
    tokens = torch.arange(3, 63).view(2, 30)
    with monkeypatch.context() as patch:
        for function in ("quantize", "pack_rows"):
            patch.setattr(loading, function, lambda *_: pytest.fail("quantized or packed again"))
        beside_shards = build(int4_folder, small, dtype=dtype).model.forward(tokens, 0)
        for shard in int4_folder.glob("*.pth"):
            shard.rename(shard.with_suffix(".away"))
        without_shards = build(int4_folder, small, dtype=dtype).model.forward(tokens, 0)
    with pytest.raises(CheckpointError, match=r"it contains quantized weights: build with quantize='int4'"):
        build(int4_folder, small, quantize=None)
    for away in int4_folder.glob("*.away"):
        away.rename(away.with_suffix(".pth"))
    (int4_folder / "int4.safetensors").unlink()
    from_shards = build(int4_folder, small, dtype=dtype).model.forward(tokens, 0)
    assert torch.equal(from_shards, beside_shards) and torch.equal(from_shards, without_shards)


@pytest.fixture
def bf16_folder(small: SimpleNamespace, tmp_path: Path) -> Path:
    """Write a checkpoint folder with two shards in bfloat16 and the packed file bfloat16.safetensors."""
    folder = write_shards(tmp_path / "m", small.params, {name: w.bfloat16() for name, w in small.weights.items()}, 2)
    packed_file.save_packed_file(folder, "bfloat16")
    return folder


def test_a_bfloat16_file_contains_exactly_the_stored_weights(bf16_folder: Path, small: SimpleNamespace) -> None:
    model = build(bf16_folder, small, quantize=None).model
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, small.weights[name].bfloat16()), name
    (bf16_folder / "bfloat16.safetensors").rename(bf16_folder / "away")
    tokens = torch.arange(3, 63).view(2, 30)
    logits = build(bf16_folder, small, quantize=None).model.forward(tokens, 0)
    torch.testing.assert_close(model.forward(tokens, 0), logits, atol=0.05, rtol=0.05)


def test_a_bfloat16_file_without_shards_can_be_built_in_any_dtype_but_not_quantized(
    bf16_folder: Path, small: SimpleNamespace
) -> None:
    for shard in bf16_folder.glob("*.pth"):
        shard.unlink()
    weight = build(bf16_folder, small, quantize=None, dtype="float32").model.layers[1].feed_forward.w2.weight
    assert torch.equal(weight, small.weights["layers.1.feed_forward.w2.weight"].bfloat16().float())
    with pytest.raises(CheckpointError, match=r"in bfloat16: build without quantize"):
        build(bf16_folder, small)


def test_a_bfloat16_file_beside_shards_is_not_read_for_float32(bf16_folder: Path, small: SimpleNamespace) -> None:
    """Damage the packed file, so that any build that reads the file raises."""
    (bf16_folder / "bfloat16.safetensors").write_bytes(b"damaged")
    build(bf16_folder, small, quantize=None, dtype="float32")
    with pytest.raises(CheckpointError, match=r"bfloat16.safetensors: cut off, damaged"):
        build(bf16_folder, small, quantize=None)


def test_saving_float32_weights_as_bfloat16_is_refused(small: SimpleNamespace, tmp_path: Path) -> None:
    folder = write_shards(tmp_path, small.params, small.weights)
    assert_raises(lambda: packed_file.save_packed_file(folder, "bfloat16"), InputError, "stored as torch.float32")
    only_output = {name: w if name == "output.weight" else w.bfloat16() for name, w in small.weights.items()}
    folder = write_shards(tmp_path / "only_output", small.params, only_output)
    assert_raises(
        lambda: packed_file.save_packed_file(folder, "bfloat16"), InputError, "output.weight is stored as torch.float32"
    )


def test_a_bfloat16_file_with_nan_is_refused(bf16_folder: Path, small: SimpleNamespace) -> None:
    path = bf16_folder / "bfloat16.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    first = 8 + length + json.loads(data[8 : 8 + length])["layers.1.attention.wo.weight"]["data_offsets"][0]
    data[first : first + 2] = b"\xff\xff"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"layers.1.attention.wo.weight contains NaN"):
        build(bf16_folder, small, quantize=None)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_weights_stored_transposed_or_in_several_dtypes_are_quantized_correctly(
    small: SimpleNamespace, tmp_path: Path, quantize: str
) -> None:
    """Store some weights transposed, and wq in another dtype than wk and wv. The C code that packs wq, wk and wv together needs
    contiguous rows of one dtype."""
    weights = {name: w.bfloat16() for name, w in small.weights.items()}
    expected = build(write_shards(tmp_path / "contiguous", small.params, weights), small, quantize=quantize)
    transposed = write_shards(tmp_path / "transposed", small.params, weights)
    stored = torch.load(transposed / "consolidated.00.pth")
    for name in ("layers.0.attention.wo.weight", "layers.1.feed_forward.w1.weight"):
        stored[name] = stored[name].t().contiguous().t()
    stored["layers.0.attention.wq.weight"] = stored["layers.0.attention.wq.weight"].float()
    torch.save(stored, transposed / "consolidated.00.pth")
    for folder in (transposed, packed_file.save_packed_file(transposed, quantize).parent):
        tokens = torch.arange(3, 33).view(1, 30)
        assert torch.equal(build(folder, small, quantize=quantize).model.forward(tokens, 0), expected.model.forward(tokens, 0))


@pytest.mark.parametrize("format", packed_file.PACKED_FORMATS)
def test_a_packed_file_is_identical_without_compiled_code(
    bf16_folder: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    file = bf16_folder / f"{format}.safetensors"
    packed_file.save_packed_file(bf16_folder, format)
    from_compiled_code = file.read_bytes()
    monkeypatch.setattr(pack, "status", no_extension)
    packed_file.save_packed_file(bf16_folder, format)
    assert file.read_bytes() == from_compiled_code


@pytest.mark.parametrize("format", packed_file.PACKED_FORMATS)
def test_a_packed_file_is_unpacked_where_no_kernel_reads_its_blocks(
    bf16_folder: Path, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    packed_file.save_packed_file(bf16_folder, format)
    quantize = None if format == "bfloat16" else format
    weights = build(bf16_folder, small, quantize=quantize).model.state_dict()
    for module in (loading, packing):
        monkeypatch.setattr(module, "extension_for", lambda format: None)
    unpacked = build(bf16_folder, small, quantize=quantize).model
    assert not any(isinstance(p, PackedWeight) and isinstance(p.shared.kernel, BlockedLinear) for p in unpacked.parameters())
    for name, weight in unpacked.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_a_packed_file_follows_the_safetensors_format(int4_folder: Path) -> None:
    """Check the length and the JSON of the header. Tensors must follow each other without gaps, and the first one must begin at
    a multiple of 64 bytes."""
    data = (int4_folder / "int4.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert metadata["kind"] == "int4" and len(metadata["source"]) == 64
    assert all(isinstance(value, str) for value in metadata.values())
    spans = sorted(tuple(entry["data_offsets"]) for entry in header.values())
    assert spans[0][0] == 0 and spans[-1][1] == len(data) - 8 - length
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans)) and (8 + length) % 64 == 0


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


def test_the_quantize_command_writes_a_file_that_the_complete_command_uses(
    small: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_shards(tmp_path, small.params, small.weights, 2)
    assert main(["quantize", "--ckpt_dir", str(folder), "int8"]) == 0
    assert re.fullmatch(rf"{folder}/int8\.safetensors: 0\.\d+ MB\n", capsys.readouterr().out)
    model = ["--ckpt_dir", str(folder), "--tokenizer_path", str(small.tokenizer_path), "--device", "cpu", "--temperature", "0"]
    assert main(["complete", *model, "--quantize", "int8", "--max_gen_len", "4", "The quick"]) == 0
    want = build(folder, small, quantize="int8").text_completion(["The quick"], temperature=0, max_gen_len=4)
    assert capsys.readouterr().out == f"The quick\n> {want[0]['generation']}\n"
    assert main(["quantize", "--ckpt_dir", str(tmp_path / "nowhere"), "int8"]) == 1
    assert "No such file" in capsys.readouterr().err


def test_the_error_names_an_unreadable_shard(int4_folder: Path, small: SimpleNamespace) -> None:
    for content in (b"", b"<html>", (int4_folder / "consolidated.01.pth").read_bytes()[:-100]):
        (int4_folder / "consolidated.01.pth").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"consolidated.01.pth: damaged, or no PyTorch checkpoint"):
            build(int4_folder, small)


def test_fingerprints_of_shards_without_checksums_differ_for_different_weights(small: SimpleNamespace, tmp_path: Path) -> None:
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


def test_blocks_in_a_packed_file_are_aligned_and_merged_weights_are_adjacent(int4_folder: Path) -> None:
    """Check that the blocks of merged weights, and their scales, can be multiplied as one matrix in place."""
    shards = packed_file.open_packed_file(int4_folder, "int4")
    assert shards
    for suffix in ("", ".scale"):
        for names in (["attention.wq", "attention.wk", "attention.wv"], ["feed_forward.w1", "feed_forward.w3"]):
            tensors = [shards.first[f"layers.1.{name}.weight{suffix}"] for name in names]
            assert tensors[0].data_ptr() % 64 == 0
            for tensor, next_tensor in itertools.pairwise(tensors):
                assert next_tensor.data_ptr() == tensor.data_ptr() + tensor.nbytes


def kernels_in_the_file(model: Transformer, shards: dict[str, dict[str, torch.Tensor]]) -> dict[str, bool]:
    """Return for each packed weight of a model whether its blocks and scales are the memory of a mapped file."""
    memory = next(iter(next(iter(shards.values())).values())).untyped_storage().data_ptr()
    blocks = {name: p.shared.kernel.blocks for name, p in model.named_parameters() if isinstance(p, PackedWeight)}
    tensors = {name: [t for t in (b.weight, b.scales) if t is not None] for name, b in blocks.items()}
    return {name: all(t.untyped_storage().data_ptr() == memory for t in parts) for name, parts in tensors.items()}


@pytest.mark.skipif(not extension_for("int4"), reason="no kernel reads blocks on this machine")
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("format", ["int8", "int4", "bfloat16"])
def test_blocks_stay_mapped_only_if_their_pages_are_huge(
    bf16_folder: Path, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, format: str, in_place: bool
) -> None:
    if not extension_for(format):
        pytest.skip("no kernel reads bfloat16 blocks on this machine")
    opened = []
    packed_file.save_packed_file(bf16_folder, format)
    original = packed_file.open_packed_file
    monkeypatch.setattr(packed_file, "open_packed_file", lambda *args: opened.append(original(*args)) or opened[-1])
    monkeypatch.setattr(loading, "map_huge_pages", lambda _: in_place)
    tokens, quantize = torch.arange(3, 33).view(1, 30), None if format == "bfloat16" else format
    loaded = build(bf16_folder, small, quantize=quantize)
    packed_file.packed_file_path(bf16_folder, format).unlink()  # the mapping outlives the file
    found = kernels_in_the_file(loaded.model, opened[-1])
    # wk and wv of this model end within a block, so wq, wk and wv are never a view of the file.
    whole_blocks = {name: mapped for name, mapped in found.items() if not re.search(r"attention\.w[qkv]", name)}
    assert "layers.1.feed_forward.w3.weight" in found and set(whole_blocks.values()) == {in_place}
    if format != "bfloat16":  # bfloat16 weights of this size are packed only in a packed file
        from_shards = build(bf16_folder, small, quantize=quantize)
        assert torch.equal(loaded.model.forward(tokens, 0), from_shards.model.forward(tokens, 0))
    loaded.model.layers[0].feed_forward.w3.weight.mul_(2)  # an edit must leave the mapped blocks of w1 as they are
    assert torch.isfinite(loaded.model.forward(tokens, 0)).all()


@pytest.mark.skipif(not extension_for("int4"), reason="no kernel reads blocks on this machine")
def test_a_packed_file_whose_tensors_are_in_another_order_is_copied(
    int4_folder: Path, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Write the tensors in the order of earlier versions: the widest dtypes first, then by name."""
    path, tokens = int4_folder / "int4.safetensors", torch.arange(3, 33).view(1, 30)
    expected = build(int4_folder, small).model.forward(tokens, 0)
    metadata, tensors = safetensors_file.map_safetensors(path)
    header, end, data = {"__metadata__": metadata}, 0, b""
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        data += bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())
        dtype = safetensors_file.DTYPE_CODES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": (end, len(data))}
        end = len(data)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    monkeypatch.setattr(loading, "map_huge_pages", lambda _: True)
    assert torch.equal(build(int4_folder, small).model.forward(tokens, 0), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
def test_pages_are_huge_exactly_if_the_system_says_so(tmp_path: Path) -> None:
    """Write a file in pieces of 2 MB. Whether Linux maps it in huge pages depends on its version and on the file system."""
    (tmp_path / "file").write_bytes(b"")
    with (tmp_path / "file").open("ab") as f:
        for _ in range(4):
            f.write(bytes(host_memory.HUGE_PAGE))
    mapped = torch.from_file(str(tmp_path / "file"), size=4 * host_memory.HUGE_PAGE, dtype=torch.uint8)
    host_memory.read_as_huge_pages(mapped)
    huge = host_memory.map_huge_pages(mapped)
    smaps = Path("/proc/self/smaps").read_text().split(str(tmp_path / "file"), 1)[1]
    sizes = {name: int(size) * 1024 for name, size in re.findall(r"^(\w+): +(\d+) kB", smaps.split("VmFlags")[0], re.M)}
    assert sizes["Rss"] == mapped.nbytes
    assert huge == (sizes["FilePmdMapped"] >= mapped.nbytes / 2)
    small_pages = torch.zeros(1 << 16, dtype=torch.uint8)
    assert not host_memory.map_huge_pages(small_pages)


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
