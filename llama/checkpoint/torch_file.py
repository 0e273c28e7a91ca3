"""Memory-map the tensors in a file that torch.save wrote, without running any code in it.

The file is a zip of uncompressed records. The record `data.pkl` is a pickle that describes the tensors, and each tensor's
storage is a separate record. `torch.load` is not safe enough, even with `weights_only`: it trusts the lengths of records and
the sizes of allocations in the file, and it hashes any tuple, which may take for ever. It also cannot read pickle protocols 1,
4 and 5. The unpickler in this module creates only plain Python values and descriptions of tensors. Each description is checked
against the zip.
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

from .mapping import map_file

MAX_PICKLE_BYTES = 1 << 19  # five times the pickle of a 70B shard; limits the time and memory that a hostile pickle uses
MAX_ARGUMENTS = 16  # limit for one call, because a hostile pickle could pass one long tuple to thousands of calls
# The pickle opcodes that torch.save uses in protocols 1 to 5; PyTorch cannot load its own files of protocol
# 0. Other opcodes could allocate any size or call any function.
_OPCODES = b"\x80}]()\x85\x86\x87tNK\x88\x89GJM\x8aXqrhjcQRuseab." + b"\x95\x8c\x94\x93IL"
_STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


class ZipRecord(NamedTuple):
    """The offset and size of a zip record's data in its file, in bytes, and the checksum of the data."""

    offset: int
    size: int
    crc: int  # the checksum of the data; 0 if the program that wrote the file omitted it


class StorageSpec(NamedTuple):
    """The description of a tensor's storage in a pickle: `numel` values in the zip record data/<record>."""

    dtype: torch.dtype
    record: str
    numel: int


class TensorSpec(NamedTuple):
    """The description of a tensor in a pickle. Its offset in the storage and its stride are counted in values, not bytes."""

    storage: StorageSpec
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read_torch_file(path: Path, values: bool = True) -> Any:
    """Return the dict that a file contains, with mapped tensors as values. A value that is not a plain tensor becomes None.

    values: if False, the tensors are on the meta device: they have shapes and dtypes, but no values, and nothing is mapped.
    If the file contains another object than a dict, that object is returned. Raises pickle.UnpicklingError if the pickle names
    a function that is not allowed, and ValueError, KeyError or another error if the file is damaged.
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
        read = map_file(path, f) if values else lambda _, size: torch.UntypedStorage(size, device="meta")
        folder = pickle_name.removesuffix("data.pkl")

        def map_tensor(spec: Any) -> torch.Tensor | None:
            if not isinstance(spec, TensorSpec):
                return None
            (dtype, record, numel), *geometry = spec
            offset, size, _ = records[f"{folder}data/{record}"]
            if size != numel * dtype.itemsize:
                raise ValueError(f"data/{record} has {size} bytes")
            storage = read(offset, size)
            return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, *geometry)  # type: ignore[call-overload]

        return {name: map_tensor(value) for name, value in saved.items()}


def zip_records(f: BinaryIO) -> dict[str, ZipRecord]:
    """Return the records of a zip by name.

    Raises ValueError if a record is compressed, encrypted or cut off, or is not at the offset that the zip's directory gives.
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
        if flags & 8 and size:  # flag 8 means that a data descriptor follows the record's data
            f.seek(offset + size)
            matches = matches and f.read(8) == b"PK\x07\x08" + entry.CRC.to_bytes(4, "little")
        if not matches or signature != b"PK\x03\x04" or name in records:
            raise ValueError(f"{name!r:.80} is not where the directory says")
        if method or entry.compress_type or flags & 1 or entry.compress_size != size or offset + size > end:
            raise ValueError(f"{name!r:.80} is compressed, encrypted or cut off")
        records[name] = ZipRecord(offset, size, entry.CRC)
    return records


class _SafeKeyDict(dict[Any, Any]):
    """A dict that accepts only strings and small integers as keys.

    The hash of a nested tuple in a hostile pickle could take for ever, and many large integers could have the same hash.
    """

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < 1 << 12):
            raise ValueError("a key is neither a string nor a small integer")
        super().__setitem__(key, value)


def _storage_spec(tag: Any, dtype: Any, record: Any, location: Any, numel: Any, *_: Any) -> StorageSpec | None:
    """Return the StorageSpec for the fields of a pickle's persistent id; None if the dtype is not supported."""
    if not isinstance(dtype, torch.dtype):
        return None
    if tag != "storage" or not isinstance(record, str) or not _are_counts([numel]):
        raise ValueError("malformed storage")
    return StorageSpec(dtype, record, numel)


def _tensor_spec(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, metadata: Any = None
) -> TensorSpec | None:
    """Return the TensorSpec for the arguments of torch._utils._rebuild_tensor_v2; None if the tensor is not a plain one."""
    if not isinstance(storage, StorageSpec) or metadata:  # only conjugate and negative views have metadata
        return None
    if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 8):
        raise ValueError("malformed shape")
    if not _are_counts([offset, *size, *stride]):
        raise ValueError("malformed shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= storage.numel:
        raise ValueError("a tensor beyond its storage")
    # Reject a tensor with more values than its storage: with stride 0, a few bytes could describe terabytes.
    return TensorSpec(storage, offset, size, stride) if math.prod(size) <= storage.numel else None


def _are_counts(values: Iterable[Any]) -> bool:
    """Return True if all values are integers from 0 to 2**62 - 1."""
    return all(type(value) is int and 0 <= value < 1 << 62 for value in values)


# All names that a pickle may use: the functions that create tensors and dicts, and the types of storages.
_CALLS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): lambda: _SafeKeyDict(),
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_spec,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda build, cls, args, state: build(*args) if build is _tensor_spec else None,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


def _check_arguments(args: Any) -> tuple[Any, ...]:
    """Return the arguments of a call in a pickle. Raise ValueError unless they are a tuple of at most MAX_ARGUMENTS items."""
    if not isinstance(args, tuple) or len(args) > MAX_ARGUMENTS:
        raise ValueError("the arguments of a call are no tuple, or too many")
    return args


def _call(unpickler: Any) -> None:
    """Run the pickle opcode REDUCE, which calls a function, after a check of the arguments.

    Without the check, Python's error for wrong arguments would print the called object, which could take for ever.
    """
    function, args = unpickler.stack[-2:]
    unpickler.stack[-2:] = [function(*_check_arguments(args))]


class _Opcodes(dict[int, Callable[[Any], None]]):
    """The unpickler's function for each allowed opcode. Any other opcode raises UnpicklingError."""

    def __missing__(self, code: int) -> Any:
        raise pickle.UnpicklingError(f"opcode {code}")


class _Unpickler(pickle._Unpickler):
    """An unpickler that supports only the opcodes in _OPCODES and the names in _CALLS.

    It extends pickle's implementation in Python, because the one in C allocates any size that a file asks for.
    """

    dispatch = _Opcodes({code: pickle._Unpickler.dispatch[code] for code in _OPCODES})
    dispatch[ord("}")] = lambda self: self.append(_SafeKeyDict())
    dispatch[ord("R")] = _call
    dispatch[ord("b")] = lambda self: self.stack.pop()  # ignore BUILD, which sets attributes that tensors do not need

    def find_class(self, module: str, name: str) -> Any:
        """Return the function or dtype that _CALLS has for a name.

        For any other name in torch, return a function that returns None. Raise UnpicklingError for all other names.
        """
        function = _CALLS.get((module, name))
        if function is None and module.partition(".")[0] != "torch":
            raise pickle.UnpicklingError(f"{module}.{name}"[:200])
        return function or (lambda *_: None)

    def persistent_load(self, pid: Any) -> StorageSpec | None:
        return _storage_spec(*_check_arguments(pid))
