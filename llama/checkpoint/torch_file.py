"""Memory-map the tensors in a file that torch.save wrote, without running any code in it.

The file is a zip of uncompressed records. The record `data.pkl` is a pickle that describes the tensors; each tensor's storage
is a record of its own. `torch.load` is not enough, even with `weights_only`: it trusts the lengths of records and the sizes to
allocate, it hashes any tuple, which may take for ever, and it cannot read pickle protocols 4 and 5. The unpickler in this file
makes only names, integers and descriptions of tensors, and each description is checked against the zip.
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

MAX_PICKLE_BYTES = 1 << 19  # five times the pickle of a 70B shard; bounds the time and memory that a hostile pickle can take
MAX_ARGUMENTS = 16  # per call: a hostile pickle could pass one long tuple to thousands of calls
# The opcodes that torch.save's pickles need, in protocols 2 to 5. The other opcodes can allocate any size or call any function.
_OPCODES = b"\x80}]()\x85\x86\x87tNK\x88\x89GJM\x8aXqrhjcQRuseab." + b"\x95\x8c\x94\x93"
_STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


class ZipRecord(NamedTuple):
    """The place of a record in its file, in bytes."""

    offset: int
    size: int
    crc: int  # 0: the writer omitted the checksum


class StorageSpec(NamedTuple):
    """A storage as a pickle describes it: `numel` values in the record data/<record>."""

    dtype: torch.dtype
    record: str
    numel: int


class TensorSpec(NamedTuple):
    """A tensor as a pickle describes it, with its offset, size and stride in values."""

    storage: StorageSpec
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read_torch_file(path: Path) -> Any:
    """Return the saved dict with mapped tensors as its values, and None for each value that is no plain tensor.

    Anything saved that is not a dict is returned as it is. Raises pickle.UnpicklingError if the file would call a function,
    and ValueError, KeyError and other errors if it is damaged.
    """
    with path.open("rb") as f:
        records = zip_records(f)
        (pickle_name,) = (name for name in records if name.count("/") == 1 and name.endswith("/data.pkl"))
        offset, size, crc = records[pickle_name]
        if size > MAX_PICKLE_BYTES:
            raise pickle.UnpicklingError(f"data.pkl has {size:,} bytes; at most {MAX_PICKLE_BYTES:,} are read")
        f.seek(offset)
        data = f.read(size)
        if crc and crc != zlib.crc32(data):
            raise ValueError("data.pkl does not match its checksum")
        byte_order = records.get(pickle_name.removesuffix("data.pkl") + "byteorder")
        if byte_order is not None and (f.seek(byte_order.offset), f.read(min(byte_order.size, 16)))[1] != b"little":
            raise ValueError("its values are not little-endian")
        saved = _Unpickler(BytesIO(data)).load()
        if not isinstance(saved, dict):
            return saved
        mapped = torch.UntypedStorage.from_file(str(path), False, f.seek(0, 2))
    folder = pickle_name.removesuffix("data.pkl")

    def map_tensor(spec: Any) -> torch.Tensor | None:
        if not isinstance(spec, TensorSpec):
            return None
        (dtype, record, numel), *geometry = spec
        offset, size, _ = records[f"{folder}data/{record}"]
        if size != numel * dtype.itemsize:
            raise ValueError(f"data/{record} has {size} bytes")
        storage = mapped[offset : offset + size]
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, *geometry)  # type: ignore[call-overload]

    return {name: map_tensor(value) for name, value in saved.items()}


def zip_records(f: BinaryIO) -> dict[str, ZipRecord]:
    """Return the records of a zip by name.

    Raises ValueError if a record is compressed, encrypted or cut off, or is not where the zip's directory says.
    """
    records: dict[str, ZipRecord] = {}
    with zipfile.ZipFile(f) as archive:
        entries = archive.infolist()
    end = f.seek(0, 2)
    for entry in entries:
        name, size, flags = entry.orig_filename, entry.file_size, entry.flag_bits
        f.seek(entry.header_offset)
        signature, method, name_size, extra_size = struct.unpack("<4s4xH16xHH", f.read(30))
        matches = f.read(name_size) == name.encode("utf-8" if flags & 0x800 else "cp437")
        offset = f.seek(extra_size, 1)
        if flags & 8 and size:  # with flag 8, a data descriptor must follow the record
            f.seek(offset + size)
            matches = matches and f.read(8) == b"PK\x07\x08" + entry.CRC.to_bytes(4, "little")
        if not matches or signature != b"PK\x03\x04" or name in records:
            raise ValueError(f"{name!r:.80} is not where the directory says")
        if method or entry.compress_type or flags & 1 or entry.compress_size != size or offset + size > end:
            raise ValueError(f"{name!r:.80} is compressed, encrypted or cut off")
        records[name] = ZipRecord(offset, size, entry.CRC)
    return records


class _SafeKeyDict(dict[Any, Any]):
    """A dict whose keys are strings and small integers.

    Hashing a hostile tuple could take for ever, and hostile large integers could all have the same hash.
    """

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < 1 << 12):
            raise ValueError("a key is neither a string nor a small integer")
        super().__setitem__(key, value)


def _storage_spec(tag: Any, dtype: Any, record: Any, location: Any, numel: Any, *_: Any) -> StorageSpec | None:
    """Return the storage for a persistent id in a pickle; None if its dtype is not supported."""
    if not isinstance(dtype, torch.dtype):
        return None
    if tag != "storage" or not isinstance(record, str) or not _are_counts([numel]):
        raise ValueError("malformed storage")
    return StorageSpec(dtype, record, numel)


def _tensor_spec(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, metadata: Any = None
) -> TensorSpec | None:
    """Return the tensor for the arguments of torch._utils._rebuild_tensor_v2; None if it is no plain tensor."""
    if not isinstance(storage, StorageSpec) or metadata:  # metadata marks conjugate and negative views
        return None
    if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 8):
        raise ValueError("malformed shape")
    if not _are_counts([offset, *size, *stride]):
        raise ValueError("malformed shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= storage.numel:
        raise ValueError("a tensor beyond its storage")
    # A tensor that repeats values, with stride 0, could describe terabytes in a few bytes.
    return TensorSpec(storage, offset, size, stride) if math.prod(size) <= storage.numel else None


def _are_counts(values: Iterable[Any]) -> bool:
    """Return True if all values are integers from 0 on that fit into 62 bits."""
    return all(type(value) is int and 0 <= value < 1 << 62 for value in values)


# All that a pickle can call or name: the functions that make tensors and dicts, and the types of storages.
_CALLS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): lambda: _SafeKeyDict(),
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_spec,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda build, cls, args, state: build(*args) if build is _tensor_spec else None,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


def _check_arguments(args: Any) -> tuple[Any, ...]:
    """Return the arguments of a call in a pickle. Raise ValueError unless they are a short tuple."""
    if not isinstance(args, tuple) or len(args) > MAX_ARGUMENTS:
        raise ValueError("the arguments of a call are no tuple, or too many")
    return args


def _call(unpickler: Any) -> None:
    """Run the opcode REDUCE on checked arguments: for wrong ones, Python's error prints the callee, which may take for ever."""
    function, args = unpickler.stack[-2:]
    unpickler.stack[-2:] = [function(*_check_arguments(args))]


class _Opcodes(dict[int, Callable[[Any], None]]):
    """Opcode -> function of the unpickler. An opcode without a function raises UnpicklingError."""

    def __missing__(self, code: int) -> Any:
        raise pickle.UnpicklingError(f"opcode {code}")


class _Unpickler(pickle._Unpickler):
    """The unpickler written in Python, with _OPCODES and _CALLS only. The one in C would allocate any size a file names."""

    dispatch = _Opcodes({code: pickle._Unpickler.dispatch[code] for code in _OPCODES})
    dispatch[ord("}")] = lambda self: self.append(_SafeKeyDict())
    dispatch[ord("R")] = _call
    dispatch[ord("b")] = lambda self: self.stack.pop()  # BUILD sets attributes, which tensors do not need

    def find_class(self, module: str, name: str) -> Any:
        """Return the function or dtype for a name; for other names in torch a function that returns None."""
        function = _CALLS.get((module, name))
        if function is None and module.partition(".")[0] != "torch":
            raise pickle.UnpicklingError(f"{module}.{name}"[:200])
        return function or (lambda *_: None)

    def persistent_load(self, pid: Any) -> StorageSpec | None:
        return _storage_spec(*_check_arguments(pid))
