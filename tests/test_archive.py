"""Shards as torch.save writes them, and as damage leaves them: what they say of themselves is not believed."""

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
from .support import write_shards

FIRST = "consolidated.00.pth"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_reads(tmp_path: Path, protocol: int) -> None:
    """Tensors of every dtype and stride, shared storages, and none at all, by every protocol of pickle."""
    a = torch.arange(12.0).view(3, 4)
    tensors = {
        "a": a,
        "turned": a.T,
        "part": a[1:, ::2],
        "scalar": a[2, 3],
        "none": torch.ones(0, 5),
        "b": torch.nn.Parameter(a),
        "named": torch.nn.Parameter(a + 1),
        "tagged": a + 2,
    }
    tensors["named"].note = tensors["tagged"].note = "attributes are not kept"
    kinds = ("bfloat16", "float16", "float64", "int8", "uint8", "int16", "int32", "int64", "bool")
    tensors |= {kind: a.to(getattr(torch, kind)) for kind in kinds}
    torch.save(tensors, tmp_path / "tensors.pth", pickle_protocol=protocol)
    found = torch_file.read_torch_file(tmp_path / "tensors.pth")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].stride() == tensor.stride()
        assert torch.equal(found[name], tensor.detach())


def test_numbers_of_another_byte_order(tmp_path: Path) -> None:
    """They would be other numbers, and finite."""
    torch.save({"a": torch.arange(4.0)}, tmp_path / "big.pth")
    data = (tmp_path / "big.pth").read_bytes()
    assert data.count(b"little") == 1
    (tmp_path / "big.pth").write_bytes(data.replace(b"little", b"big   "))
    with pytest.raises(ValueError, match="little-endian"):
        torch_file.read_torch_file(tmp_path / "big.pth")


def test_an_entry_that_is_no_weight_may_be_anything(shard: Path, small: SimpleNamespace) -> None:
    """rope.freqs is computed here."""
    tensors = torch.load(shard)
    torch.save(tensors | {"rope.freqs": torch.ones(8, dtype=torch.complex64)}, shard)
    Llama.build(shard.parent, small.tokenizer_path, 16, 2, device="cpu")


@pytest.fixture
def shard(small: SimpleNamespace, tmp_path: Path) -> Path:
    return write_shards(tmp_path / "model", small.params, small.weights) / FIRST


@pytest.fixture
def refused(shard: Path, small: SimpleNamespace) -> Callable[[bytes], None]:
    def build(data: bytes) -> None:
        shard.unlink()
        shard.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"damaged|could run code|no plain tensor"):
            Llama.build(shard.parent, small.tokenizer_path, 16, 2, device="cpu")

    return build


def test_a_record_is_where_the_zip_says_twice(shard: Path, refused: Callable[[bytes], None]) -> None:
    """Else the numbers of one tensor, or half of one's and half of another's, would be taken for those of the next."""
    whole = shard.read_bytes()
    with zipfile.ZipFile(shard) as entries:
        start, at = entries.start_dir, {entry.filename: entry.header_offset for entry in entries.infolist()}
    one, two = at["consolidated.00/data/1"], at["consolidated.00/data/2"]
    in_directory = whole.index(b"consolidated.00/data/1", start) - 46
    for place, value in ((one + 28, 64), (one + 8, 8), (in_directory + 42, two - one), (in_directory + 24, 64)):
        spoiled = bytearray(whole)
        number = int.from_bytes(whole[place : place + 4], "little") + value
        spoiled[place : place + 4] = (number % (1 << 32)).to_bytes(4, "little")
        refused(bytes(spoiled))
    place = whole.index(b"feed_forward")  # in the pickle, whose checksum tells
    refused(whole[:place] + b"F" + whole[place + 1 :])


def test_a_pickle_takes_no_more_time_or_memory_than_it_has_bytes(shard: Path, refused: Callable[[bytes], None]) -> None:
    """Tuples of tuples, whose hash and whose text take 3 ** 200 steps; what is copied or sought again and again; and lengths
    that nothing follows."""
    whole = shard.read_bytes()
    laughs = ("laughs hashed", "laughs called", "laughs in a tensor")
    slow = ("long pid", "long arguments", "colliding keys", "keys on one way")
    for name in (*laughs, *slow, "bytearray8", "memo bomb", "stride 0", "huge tensor"):
        program = b"\x80\x02}" + b"X\1\0\0\0x" + FRAGMENTS[name]() + b"s."
        begun = time.process_time()
        refused(resealed(whole, lambda record, data, new=program: new if record.endswith("data.pkl") else data))
        assert time.process_time() - begun < 4, name


def test_paths_may_begin_at_home(shard: Path, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(shard.parents[1]))
    assert packed_file.save_packed_file("~/model", "int8") == shard.parent / "int8.safetensors"
    for kind in (None, "int8"):
        Llama.build("~/model", small.tokenizer_path, 16, 2, device="cpu", quantize=kind)
    for nowhere in ("~/nothing", "~nobody-of-that-name/model"):
        with pytest.raises(CheckpointError, match=f"'{nowhere}'"):
            Llama.build(nowhere, small.tokenizer_path, 16, 2, device="cpu")


def test_a_changed_name_does_not_match_the_checksum(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, 3), "b": torch.ones(2, 3)}, tmp_path / "x.pth")
    data = bytearray((tmp_path / "x.pth").read_bytes())
    at = data.index(b"X\x01\x00\x00\x00a") + 5
    data[at : at + 1] = b"c"
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        torch_file.read_torch_file(tmp_path / "x.pth")


def test_tensors_of_nothing_are_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, 3), "none": torch.ones(5, 0)}, tmp_path / "x.pth")
    assert torch_file.read_torch_file(tmp_path / "x.pth")["none"].shape == (5, 0)


def test_a_pickle_of_any_length_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(2, 3)}, tmp_path / "x.pth")
    monkeypatch.setattr(torch_file, "MAX_PICKLE_BYTES", 10)
    with pytest.raises(pickle.UnpicklingError, match="bytes say what it holds"):
        torch_file.read_torch_file(tmp_path / "x.pth")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zips_that_say_two_things(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as f:
        f.writestr("x/a", b"1")
    whole = (tmp_path / "x.pth").read_bytes()
    encrypted = bytearray(whole)
    encrypted[whole.index(b"PK\x01\x02") + 8] |= 1
    with zipfile.ZipFile(tmp_path / "x.pth", "a") as f:
        f.writestr("x/a", b"2")
    twice = (tmp_path / "x.pth").read_bytes()
    for data, why in ((b"PK\x03\x05" + whole[4:], "is not where"), (bytes(encrypted), "encrypted"), (twice, "is not where")):
        (tmp_path / "y.pth").write_bytes(data)
        with (tmp_path / "y.pth").open("rb") as f, pytest.raises(ValueError, match=why):
            torch_file.zip_records(f)
