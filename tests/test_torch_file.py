"""Test that `read_torch_file` reads what torch.save writes. For damaged or hostile shards it must raise, in bounded time and
memory."""

import pickle
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama import CheckpointError, Llama
from llama.checkpoint import packed_file, torch_file

from .hostile_zips import FRAGMENTS, resealed
from .support import random_weights, write_shards

FIRST = "consolidated.00.pth"


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_tensor_that_torch_save_writes_is_read_with_its_dtype_stride_and_values(tmp_path: Path, protocol: int) -> None:
    """Save tensors of every dtype, transposed and sliced tensors, tensors that share a storage, empty tensors and parameters,
    with each pickle protocol."""
    a = torch.arange(12.0).view(3, 4)
    tensors = {
        "a": a,
        "transposed": a.T,
        "part": a[1:, ::2],
        "scalar": a[2, 3],
        "none": torch.ones(0, 5),
        "b": torch.nn.Parameter(a),
        "named": torch.nn.Parameter(a + 1),
        "tagged": a + 2,
    }
    tensors["named"].note = tensors["tagged"].note = "attributes are not kept"
    dtypes = ("bfloat16", "float16", "float64", "int8", "uint8", "int16", "int32", "int64", "bool")
    tensors |= {dtype: a.to(getattr(torch, dtype)) for dtype in dtypes}
    torch.save(tensors, tmp_path / "tensors.pth", pickle_protocol=protocol)
    loaded = torch_file.read_torch_file(tmp_path / "tensors.pth")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].stride() == tensor.stride()
        assert torch.equal(loaded[name], tensor.detach())


def test_a_big_endian_file_raises(tmp_path: Path) -> None:
    """If a big-endian file were read as little-endian, its values would be wrong but finite."""
    torch.save({"a": torch.arange(4.0)}, tmp_path / "big.pth")
    data = (tmp_path / "big.pth").read_bytes()
    assert data.count(b"little") == 1
    (tmp_path / "big.pth").write_bytes(data.replace(b"little", b"big   "))
    with pytest.raises(ValueError, match="little-endian"):
        torch_file.read_torch_file(tmp_path / "big.pth")


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_a_state_dict_of_many_parameters_loads_with_every_protocol(tmp_path: Path, protocol: int) -> None:
    """Save an OrderedDict with metadata. Its pickle has more than 256 memo entries and, from protocol 4 on, several frames."""
    module = torch.nn.Module()
    for i in range(300):
        module.register_parameter(f"{i}_{'long name' * 20}", torch.nn.Parameter(torch.full((2, 3), float(i))))
    saved = module.state_dict(keep_vars=True)
    assert saved._metadata  # type: ignore[attr-defined]
    torch.save(saved, tmp_path / "x.pth", pickle_protocol=protocol)
    loaded = torch_file.read_torch_file(tmp_path / "x.pth")
    assert list(loaded) == list(saved) and all(torch.equal(loaded[name], saved[name]) for name in saved)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_model_loads_from_a_shard_of_every_protocol(shard: Path, small: SimpleNamespace, protocol: int) -> None:
    parameters = {name: torch.nn.Parameter(weight) for name, weight in torch.load(shard).items()}
    torch.save(parameters, shard, pickle_protocol=protocol)
    model = Llama.build(shard.parent, small.tokenizer_path, 16, 2, device="cpu").model
    assert all(torch.equal(weight, small.weights[name]) for name, weight in model.state_dict().items())


LLAMA_1_PARAMS = {"dim": 64, "multiple_of": 32, "n_heads": 8, "n_layers": 2, "norm_eps": 1e-06, "vocab_size": -1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.int64])
def test_rotary_frequencies_in_a_shard_are_ignored_whatever_their_names_and_dtype(
    tmp_path: Path, small: SimpleNamespace, dtype: torch.dtype
) -> None:
    """The model computes them itself. Names are those of LLaMA 1 and Llama 2, and of other programs."""
    weights = random_weights(LLAMA_1_PARAMS, 384, 192)
    folder = write_shards(tmp_path / "llama1", LLAMA_1_PARAMS, weights)
    tensors = {name: tensor for name, tensor in torch.load(folder / FIRST).items() if name != "rope.freqs"}
    per_layer = ("attention.inner_attention.rope.freqs", "attention.rotary_emb.inv_freq", "attention.freqs_cis")
    names = [f"layers.{i}.{name}" for i in range(2) for name in per_layer]
    names += ["rope.freqs", "freqs_cis", "freqs_cos", "freqs_sin", "inv_freq", "rotary_emb.inv_freq"]
    torch.save({name: torch.ones(4, dtype=dtype) for name in names} | tensors, folder / FIRST)
    model = Llama.build(folder, small.tokenizer_path, 16, 2, device="cpu").model
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


@pytest.fixture
def shard(small: SimpleNamespace, tmp_path: Path) -> Path:
    return write_shards(tmp_path / "model", small.params, small.weights) / FIRST


@pytest.fixture
def assert_build_raises(shard: Path, small: SimpleNamespace) -> Callable[[bytes], None]:
    """Return a function that overwrites the shard with other bytes, and checks that `Llama.build` raises CheckpointError."""

    def build(data: bytes) -> None:
        shard.unlink()
        shard.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"damaged|could run code|no plain tensor"):
            Llama.build(shard.parent, small.tokenizer_path, 16, 2, device="cpu")

    return build


def test_a_shard_whose_zip_directory_and_records_disagree_raises(
    shard: Path, assert_build_raises: Callable[[bytes], None]
) -> None:
    """Change an offset or size in the zip directory or in a record. If the shard were read, a tensor could get the values of
    another tensor."""
    original = shard.read_bytes()
    with zipfile.ZipFile(shard) as entries:
        start, offsets = entries.start_dir, {entry.filename: entry.header_offset for entry in entries.infolist()}
    one, two = offsets["consolidated.00/data/1"], offsets["consolidated.00/data/2"]
    in_directory = original.index(b"consolidated.00/data/1", start) - 46
    for place, value in ((one + 28, 64), (one + 8, 8), (in_directory + 42, two - one), (in_directory + 24, 64)):
        spoiled = bytearray(original)
        number = int.from_bytes(original[place : place + 4], "little") + value
        spoiled[place : place + 4] = (number % (1 << 32)).to_bytes(4, "little")
        assert_build_raises(bytes(spoiled))
    # Change a name in the pickle. The checksum of the pickle must reveal the change.
    place = original.index(b"feed_forward")
    assert_build_raises(original[:place] + b"F" + original[place + 1 :])


def test_a_hostile_pickle_raises_within_seconds(shard: Path, assert_build_raises: Callable[[bytes], None]) -> None:
    """Build models from shards with hostile pickles. Examples are nested tuples whose hash and repr take 3**200 steps, long
    tuples that are copied many times, colliding dict keys, and declared lengths of terabytes without data."""
    original = shard.read_bytes()
    laughs = ("laughs hashed", "laughs called", "laughs in a tensor")
    slow = ("long pid", "long arguments", "colliding keys", "keys on one probe sequence")
    for name in (*laughs, *slow, "bytearray8", "memo bomb", "stride 0", "huge tensor"):
        program = b"\x80\x02}" + b"X\1\0\0\0x" + FRAGMENTS[name]() + b"s."
        start = time.process_time()
        assert_build_raises(resealed(original, lambda record, data, new=program: new if record.endswith("data.pkl") else data))
        assert time.process_time() - start < 4, name


def test_a_tilde_in_a_path_is_the_home_folder(shard: Path, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(shard.parents[1]))
    assert packed_file.save_packed_file("~/model", "int8") == shard.parent / "int8.safetensors"
    for format in (None, "int8"):
        Llama.build("~/model", small.tokenizer_path, 16, 2, device="cpu", quantize=format)
    for missing in ("~/nothing", "~nobody-of-that-name/model"):
        with pytest.raises(CheckpointError, match=f"'{missing}'"):
            Llama.build(missing, small.tokenizer_path, 16, 2, device="cpu")


def test_a_tensor_name_changed_in_the_file_raises_because_of_the_checksum(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, 3), "b": torch.ones(2, 3)}, tmp_path / "x.pth")
    data = bytearray((tmp_path / "x.pth").read_bytes())
    position = data.index(b"X\x01\x00\x00\x00a") + 5
    data[position : position + 1] = b"c"
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        torch_file.read_torch_file(tmp_path / "x.pth")


def test_empty_tensors_are_read_with_their_shape(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, 3), "none": torch.ones(5, 0)}, tmp_path / "x.pth")
    assert torch_file.read_torch_file(tmp_path / "x.pth")["none"].shape == (5, 0)


def test_a_pickle_longer_than_the_limit_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(2, 3)}, tmp_path / "x.pth")
    monkeypatch.setattr(torch_file, "MAX_PICKLE_BYTES", 10)
    with pytest.raises(pickle.UnpicklingError, match="at most 10 are read"):
        torch_file.read_torch_file(tmp_path / "x.pth")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_ambiguous_or_encrypted_zip_files_raise(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as f:
        f.writestr("x/a", b"1")
    original = (tmp_path / "x.pth").read_bytes()
    encrypted = bytearray(original)
    encrypted[original.index(b"PK\x01\x02") + 8] |= 1
    with zipfile.ZipFile(tmp_path / "x.pth", "a") as f:
        f.writestr("x/a", b"2")
    twice = (tmp_path / "x.pth").read_bytes()
    for data, why in ((b"PK\x03\x05" + original[4:], "is not where"), (bytes(encrypted), "encrypted"), (twice, "is not where")):
        (tmp_path / "y.pth").write_bytes(data)
        with (tmp_path / "y.pth").open("rb") as f, pytest.raises(ValueError, match=why):
            torch_file.zip_records(f)
