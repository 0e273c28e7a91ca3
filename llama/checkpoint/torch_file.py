"""What torch.save wrote, mapped, with nothing in it run.

Such a file is a zip of uncompressed records. One, `data.pkl`, is a pickle that says which tensor lies where; each of the
others is one storage. `torch.load` believes much of what a file says, also with `weights_only`: that a record is as long
as its directory says, that a pickle's tuples can be hashed in time, that so many bytes are to be allocated; and it does
not read protocols 4 and 5. Here a pickle can make names, numbers and descriptions of tensors, and all that these claim is
held against the file.
"""

import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

MAX_PICKLE_BYTES = 1 << 19  # five times that of a 70B shard; bounds the time and memory that the worst one takes
MAX_ARGUMENTS = 16  # of one call: a pickle may pass the same long tuple again and again
# What torch.save's pickles are made of, in protocols 2 to 5; other opcodes, which allocate what they name or call what they
# like, are not known.
_OPCODES = b"\x80}]()\x85\x86\x87tNK\x88\x89GJM\x8aXqrhjcQRuseab." + b"\x95\x8c\x94\x93"
_STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


class ZipRecord(NamedTuple):
    first: int  # byte of the file
    size: int
    crc: int  # 0: the writer left it out


class StorageSpec(NamedTuple):
    dtype: torch.dtype
    record: str
    numel: int


class TensorSpec(NamedTuple):
    """A tensor, before it is mapped."""

    storage: StorageSpec
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read_torch_file(path: Path) -> Any:
    """What was saved; a dict, if it was one, of mapped tensors, with None for whatever is no plain tensor.

    Raises pickle.UnpicklingError for what would call anything, and ValueError, KeyError and others for damage.
    """
    with path.open("rb") as f:
        found = zip_records(f)
        (pickled,) = (name for name in found if name.count("/") == 1 and name.endswith("/data.pkl"))
        first, size, crc = found[pickled]
        if size > MAX_PICKLE_BYTES:
            raise pickle.UnpicklingError(f"{size:,} bytes say what it holds, where {MAX_PICKLE_BYTES:,} are enough")
        f.seek(first)
        data = f.read(size)
        if crc and crc != zlib.crc32(data):
            raise ValueError("data.pkl does not match its checksum")
        order = found.get(pickled.removesuffix("data.pkl") + "byteorder")
        if order is not None and (f.seek(order.first), f.read(min(order.size, 16)))[1] != b"little":
            raise ValueError("its numbers are not little-endian")
        saved = _Unpickler(BytesIO(data)).load()
        if not isinstance(saved, dict):
            return saved
        mapped = torch.UntypedStorage.from_file(str(path), False, f.seek(0, 2))
    folder = pickled.removesuffix("data.pkl")

    def tensor(described: Any) -> torch.Tensor | None:
        if not isinstance(described, TensorSpec):
            return None
        (dtype, name, numel), *place = described
        first, size, _ = found[f"{folder}data/{name}"]
        if size != numel * dtype.itemsize:
            raise ValueError(f"data/{name} has {size} bytes")
        return torch.empty(0, dtype=dtype, device="cpu").set_(mapped[first : first + size], *place)  # type: ignore[call-overload]

    return {name: tensor(value) for name, value in saved.items()}


def zip_records(f: BinaryIO) -> dict[str, ZipRecord]:
    """The records of a zip by name: the directory's word, if that before and behind each record is the same."""
    found: dict[str, ZipRecord] = {}
    with zipfile.ZipFile(f) as archive:
        entries = archive.infolist()
    end = f.seek(0, 2)
    for entry in entries:
        name, size, flags = entry.orig_filename, entry.file_size, entry.flag_bits
        f.seek(entry.header_offset)
        signature, method, name_size, extra_size = struct.unpack("<4s4xH16xHH", f.read(30))
        same = f.read(name_size) == name.encode("utf-8" if flags & 0x800 else "cp437")
        first = f.seek(extra_size, 1)
        if flags & 8 and size:  # what follows such a record; else it begins elsewhere
            f.seek(first + size)
            same = same and f.read(8) == b"PK\x07\x08" + entry.CRC.to_bytes(4, "little")
        if not same or signature != b"PK\x03\x04" or name in found:
            raise ValueError(f"{name!r:.80} is not where the directory says")
        if method or entry.compress_type or flags & 1 or entry.compress_size != size or first + size > end:
            raise ValueError(f"{name!r:.80} is compressed, encrypted or cut off")
        found[name] = ZipRecord(first, size, entry.CRC)
    return found


class _NameDict(dict[Any, Any]):
    def __setitem__(self, key: Any, value: Any) -> None:
        # The hash of a tuple may take for ever, and larger numbers may be chosen such that each is sought among all.
        if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < 1 << 12):
            raise ValueError("a key is no name")
        super().__setitem__(key, value)


def _storage(tag: Any, dtype: Any, record: Any, where: Any, numel: Any, *_: Any) -> StorageSpec | None:
    if not isinstance(dtype, torch.dtype):
        return None
    if tag != "storage" or not isinstance(record, str) or not _are_counts([numel]):
        raise ValueError("no storage")
    return StorageSpec(dtype, record, numel)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, odd: Any = None) -> TensorSpec | None:
    if not isinstance(storage, StorageSpec) or odd:  # such as conjugate, or negative
        return None
    if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 8):
        raise ValueError("no shape")
    if not _are_counts([offset, *size, *stride]):
        raise ValueError("no shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= storage.numel:
        raise ValueError("a tensor beyond its storage")
    # One that shows its numbers again and again may be of any size: a few bytes would describe terabytes.
    return TensorSpec(storage, offset, size, stride) if math.prod(size) <= storage.numel else None


def _are_counts(values: Iterable[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 62 for value in values)


_CALLS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): lambda: _NameDict(),
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda make, kind, args, state: make(*args) if make is _tensor else None,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


def _arguments(args: Any) -> tuple[Any, ...]:
    if not isinstance(args, tuple) or len(args) > MAX_ARGUMENTS:
        raise ValueError("no arguments")
    return args


def _call(unpickler: Any) -> None:
    """What REDUCE does; but of arguments that are none, Python's message spells out the callee, which may take for ever."""
    function, args = unpickler.stack[-2:]
    unpickler.stack[-2:] = [function(*_arguments(args))]


class _Opcodes(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Any:
        raise pickle.UnpicklingError(f"opcode {code}")


class _Unpickler(pickle._Unpickler):  # the one in Python, which allocates nothing on a file's word
    dispatch = _Opcodes({code: pickle._Unpickler.dispatch[code] for code in _OPCODES})
    dispatch[ord("}")] = lambda self: self.append(_NameDict())
    dispatch[ord("R")] = _call
    dispatch[ord("b")] = lambda self: self.stack.pop()  # attributes of what was made: none matters

    def find_class(self, module: str, name: str) -> Any:
        found = _CALLS.get((module, name))
        if found is None and module.partition(".")[0] != "torch":
            raise pickle.UnpicklingError(f"{module}.{name}"[:200])
        return found or (lambda *_: None)

    def persistent_load(self, pid: Any) -> StorageSpec | None:
        return _storage(*_arguments(pid))
