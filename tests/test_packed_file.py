"""Test saving weights to packed files and loading them: a file gives the same answers as the shards."""

import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama import CheckpointError, Transformer
from llama.checkpoint import loading, packed_file, safetensors_file
from llama.cli.main import main
from llama.kernels import host_memory, pack, packing
from llama.kernels.blocked_linear import BlockedLinear, extension_for
from llama.kernels.packed_weight import PackedWeight

from . import packed_folders
from .packed_folders import build
from .support import no_extension, write_shards

int4_folder, bf16_folder = packed_folders.int4_folder, packed_folders.bf16_folder  # fixtures


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
