"""Memory-map the tensors in a file in the safetensors format.

The file is the length of the header (8 bytes), the header, and the values of all tensors without gaps. The header is JSON:
name -> {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}. Everything in it is checked before it is used.
"""

import ctypes
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import short_repr
from ..kernels import host_memory
from .mapping import map_file

MAX_HEADER_BYTES = 1 << 22  # limit: ten times the header of 70B, as parsing a larger header could take much memory
_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for code, name in _NAMES.items()}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}

FileLayout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # name of a tensor -> (dtype, shape), in the order of the file


class Entry(NamedTuple):
    """A tensor's description in the header. Its values are the bytes `begin` to `end` - 1 after the header."""

    dtype: torch.dtype
    shape: list[int]
    begin: int
    end: int


def map_safetensors(
    path: Path, values: bool = True, huge_pages: bool = False
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the metadata and the mapped tensors of a file.

    values: if False, the tensors are on the meta device, and nothing is mapped.
    huge_pages: have Linux cache the file in pages of 2 MB, and read the header from the mapping, since `read` would make Linux
    read ahead, in small pages. Raises ValueError if the file is damaged, and OSError or RuntimeError if it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as f:
        if not values:
            start, metadata, entries = _read_header(f.read(8), lambda length: f.read(length), size)
            return metadata, {n: torch.empty(e.shape, dtype=e.dtype, device="meta") for n, e in entries.items()}
        contents = map_file(path, f)(0, size)
    file = torch.empty(0, dtype=torch.uint8, device="cpu").set_(contents)  # type: ignore[call-overload]
    if huge_pages:
        host_memory.read_as_huge_pages(file)
    head = bytes(file[:8].tolist())
    start, metadata, entries = _read_header(head, lambda length: ctypes.string_at(file.data_ptr() + 8, length), size)

    def tensor(entry: Entry) -> torch.Tensor:
        begin, end = start + entry.begin, start + entry.end
        if begin % entry.dtype.itemsize == 0:
            return file[begin:end].view(entry.dtype).view(entry.shape)
        # Some programs do not align the values, and a view of `file` would have to begin at a whole value.
        return torch.empty(0, dtype=entry.dtype, device="cpu").set_(contents[begin:end]).view(entry.shape)  # type: ignore[call-overload]

    return metadata, {name: tensor(entry) for name, entry in entries.items()}


def fingerprint_parts(path: Path) -> Iterator[bytes]:
    """Yield bytes that identify a file: its size, its header, and the first 4 kB of each tensor."""
    size = path.stat().st_size
    with path.open("rb") as f:
        start, _, entries = _read_header(f.read(8), lambda length: f.read(length), size)
        yield size.to_bytes(8, "little")
        f.seek(0)
        yield f.read(start)
        for entry in entries.values():
            f.seek(start + entry.begin)
            yield f.read(min(4096, entry.end - entry.begin))


def encode_header(layout: FileLayout, metadata: dict[str, Any]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return the header of a file as bytes, and the range of bytes of each tensor in the file.

    The first tensor is aligned to 64 bytes.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    offsets: dict[str, tuple[int, int]] = {}  # begin and end of each tensor, in bytes after the header
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        offsets[name] = begin, end
        header[name] = {"dtype": DTYPE_CODES[dtype], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    encoded = len(text).to_bytes(8, "little") + text
    return encoded, {name: (len(encoded) + begin, len(encoded) + end) for name, (begin, end) in offsets.items()}


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's names and values as a dict. Raises ValueError if a name appears twice.

    json.loads takes this function as `object_pairs_hook`.
    """
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{short_repr(name)} appears twice")
        values[name] = value
    return values


def _read_header(head: bytes, read: Any, size: int) -> tuple[int, dict[str, Any], dict[str, Entry]]:
    """Return where the values begin in the file, the metadata, and the entry of each tensor.

    head: the first 8 bytes of the file. read: a function that returns so many bytes after them. size: that of the file.
    """
    length = int.from_bytes(head, "little")
    if len(head) < 8 or not 2 <= length <= size - 8:
        raise ValueError(f"no header, or cut off: {size:,} bytes")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header has {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
    try:
        header = json.loads(read(length), object_pairs_hook=unique_keys)
    except RecursionError as e:
        raise ValueError("its header is nested too deeply") from e
    if not isinstance(header, dict):
        raise ValueError("its header is no object of names and tensors")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is no object")
    entries = {name: _parse_entry(name, entry) for name, entry in header.items()}
    _check_spans(entries, size - 8 - length)
    return 8 + length, metadata, entries


def _parse_entry(name: str, entry: Any) -> Entry:
    """Return the entry of one tensor. Raises ValueError if its dtype is unknown, or if shape and offsets do not fit."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{short_repr(name)} has no dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{short_repr(name)} has the dtype {short_repr(code)}, which is not read")
    if not _are_counts(shape) or len(shape) > 8:
        raise ValueError(f"{short_repr(name)} has the shape {short_repr(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{short_repr(name)} has the data_offsets {short_repr(offsets)}")
    dtype, (begin, end) = DTYPES[code], offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{short_repr(name)} is {code} {short_repr(shape)}, but has {end - begin:,} bytes")
    return Entry(dtype, shape, begin, end)


def _are_counts(values: Any) -> bool:
    """Return True for a list of integers from 0 to 2**62 - 1."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _check_spans(entries: dict[str, Entry], size: int) -> None:
    """Raise ValueError unless the values of all tensors, `size` bytes, lie one after the other without holes or overlaps."""
    filled = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != filled:
            fault = "overlaps another tensor" if entry.begin < filled else "leaves a hole before it"
            raise ValueError(f"{short_repr(name)}, bytes {entry.begin:,} to {entry.end:,}, {fault}")
        filled = entry.end
    if filled != size:
        raise ValueError(f"its tensors have {filled:,} bytes, and {size:,} are there")
