"""Weights in a file beside the model, as the CPU's kernels read them: `bfloat16.safetensors`, `int8.safetensors`,
`int4.safetensors`.

`save` writes it once, in one process, tensor by tensor; `Llama.build` then copies it into memory, and is spared the packing
and quantizing. It holds the whole model, so it serves any number of ranks, and the shards may be gone. In the safetensors
format it has, by Meta's names, embedding and norms as they were stored, and for every other weight

    NAME.weight          its blocks (blocks.py), uint8 (out / 64, in / per, 64, 4)
    NAME.weight.scale    in 8 and 4 bit, bfloat16 (out / 64, groups, 64, 1), or (.., 2): with zeros

Its header names the layout, so that a file of another one is refused, and the shards it was made from, by the checksums inside
them. Where no kernel reads blocks (a GPU, another CPU, ranks whose parts begin within a block) they are taken apart again.
"""

import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..distributed.groups import world_size
from ..distributed.progress import progress
from ..errors import CheckpointError, DeviceError, InputError, describe, format_bytes, short_repr
from ..kernels import host_memory, pack
from ..kernels.blocked_linear import ACTIVATION_GROUP, BlockedWeight
from ..model import Transformer
from ..quantization.quantize import quantize
from ..quantization.weight import FORMATS, QuantizedWeight, format_of, group_size
from . import loading, resharding
from .params import SUPPORTED_DTYPES, read_params
from .shards import Shards, file_identity, open_shards, shard_paths, split_dim
from .validate import build_on_meta, check_shards, expected_shapes

LAYOUT = "blocks of 64 outputs, 4 bytes each, version 2"
MAX_ZIP_RECORDS = 10_000  # of a shard: more than ten times those of 70B
MAX_HEADER_BYTES = 1 << 22  # ten times that of 70B: what JSON makes of it is larger
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8, "U8": torch.uint8}
_DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}
PACKED_FORMATS = ["bfloat16", *FORMATS]
FileLayout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # what a file holds


def packed_file_path(ckpt_dir: str | os.PathLike[str], wanted: str) -> Path:
    return Path(ckpt_dir).expanduser() / f"{wanted}.safetensors"


def shards_fingerprint(ckpt_dir: str | os.PathLike[str]) -> str | None:
    """Of the shards' contents; None where there are no shards."""
    digest, paths = hashlib.sha256(), shard_paths(Path(ckpt_dir).expanduser())
    for path in paths:
        digest.update(path.name.encode())
        for part in _digest_parts(path):
            digest.update(part)
    return digest.hexdigest() if paths else None


def _digest_parts(path: Path) -> Iterator[bytes]:
    """What tells a shard's tensors from others: the checksums in it, which some writers leave out, and first numbers."""
    try:
        with path.open("rb") as f, zipfile.ZipFile(f) as archive:
            if len(archive.infolist()) > MAX_ZIP_RECORDS:
                raise ValueError(f"more than {MAX_ZIP_RECORDS:,} records")
            for entry in archive.infolist():
                yield repr((entry.filename, entry.file_size, entry.CRC)).encode()
                f.seek(entry.header_offset)
                yield f.read(4096)
    except Exception as e:  # zipfile raises many
        raise CheckpointError(f"{path}: damaged, or no PyTorch checkpoint ({e}); fetch it again, or take it away") from e


def file_layout(model: Transformer, stored: torch.dtype, wanted: str) -> FileLayout:
    """What the file of a model must hold."""
    found: FileLayout = {}
    for name, shape in expected_shapes(model).items():
        own = format_of(name, wanted)
        if own is None:
            found[name] = stored, shape
        else:
            weight, scales = BlockedWeight.shapes(own, shape[0], shape[1], group_size_for(own, shape[1]))
            found[name] = torch.uint8, weight
            if scales:
                found[f"{name}.scale"] = torch.bfloat16, scales
    return dict(sorted(found.items(), key=lambda item: (-item[1][0].itemsize, item[0])))  # so that each is aligned


def group_size_for(kind: str, in_features: int) -> int:
    return ACTIVATION_GROUP if kind == "bfloat16" else group_size(in_features, kind)


def open_packed_file(ckpt_dir: str | os.PathLike[str], wanted: str, fits: bool = True) -> Shards | None:
    """Map the file beside a model, as one shard. None if there is none, or if it is not for this device or dtype (`fits`) and
    there are shards. Raises CheckpointError if it is damaged, or was made from other shards than those beside it."""
    path = packed_file_path(ckpt_dir, wanted)
    if not path.is_file():
        return None
    beside = shards_fingerprint(ckpt_dir)
    if beside and not fits:
        return None
    again = "make it again with `python -m llama quantize`, or delete it"
    before = file_identity(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header: Any = json.loads(f.read(length)) if length < min(size, MAX_HEADER_BYTES) else None
        about = dict(header.pop("__metadata__"))
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length :]
        spans = sorted(entry["data_offsets"] for entry in header.values())
        if [0, *(end for _, end in spans)] != [*(first for first, _ in spans), len(mapped)]:
            raise ValueError("holes or overlaps")
        tensors = {name: _view(mapped, entry) for name, entry in header.items()}
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise CheckpointError(f"{path}: cut off, damaged, or not written by this library; {again}") from e
    if about.get("layout") != LAYOUT or about.get("kind") != wanted:
        found = f"{short_repr(about.get('layout'))}, {short_repr(about.get('kind'))}"
        raise CheckpointError(f"{path}: its layout is {found}; this version reads {LAYOUT!r}, {wanted!r}; {again}")
    if beside not in (None, about.get("source")):
        raise CheckpointError(f"{path}: made from other weights than the shards beside it; {again}")
    return Shards({path.name: tensors}, {path: before}, wanted)


def _view(mapped: torch.Tensor, entry: dict[str, Any]) -> torch.Tensor:
    first, last = entry["data_offsets"]
    return mapped[first:last].view(_DTYPES[entry["dtype"]]).view(entry["shape"])


def check_packed_file(model: Transformer, shards: Shards) -> None:
    """Raise CheckpointError unless an opened file holds a model's tensors and no others."""
    ((file, tensors),) = shards.items()
    stored = tensors["tok_embeddings.weight"].dtype if "tok_embeddings.weight" in tensors else torch.float32
    expected = file_layout(model, stored, file.partition(".")[0])
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    wrong = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if wrong or stored not in SUPPORTED_DTYPES:
        name = wrong[0] if wrong else "tok_embeddings.weight"
        held = short_repr(found[name]) if name in found else "missing"
        raise CheckpointError(
            f"{file}: {short_repr(name)} is {held}, where params.json makes {expected.get(name, 'none')}: "
            "the file was made from another model, or is damaged; make it again with `python -m llama quantize`, or delete it"
        )


def save_packed_file(ckpt_dir: str | os.PathLike[str], wanted: str) -> Path:
    """Write a folder's checkpoint as "bfloat16", "int8" or "int4" into a file there, in place of the one before; its path."""
    if not isinstance(wanted, str) or wanted not in PACKED_FORMATS:
        raise InputError(f"the kind to save is {describe(wanted)}; it must be one of {', '.join(map(repr, PACKED_FORMATS))}")
    if world_size() > 1:
        raise DeviceError(f"saving weights takes one process, and this job has {world_size()}: run it without torchrun")
    params, shards = read_params(ckpt_dir), open_shards(ckpt_dir)
    embedding = shards.first.get("tok_embeddings.weight")
    words = embedding.shape[0] if embedding is not None and embedding.ndim == 2 else 1
    model = build_on_meta(params, shards, 1, 1, words)
    check_shards(model, shards)
    stored = shards.first["tok_embeddings.weight"].dtype
    for name in expected_shapes(model) if wanted == "bfloat16" else ():
        for tensors in shards.values():
            if (held := tensors[name].dtype) != torch.bfloat16:
                raise InputError(f"{name} is stored as {held}, and saving it as bfloat16 loses precision; save int8 or int4")
    parts = file_layout(model, stored, wanted)

    sizes = {name: dtype.itemsize * torch.Size(shape).numel() for name, (dtype, shape) in parts.items()}
    ends = dict(zip(parts, itertools.accumulate(sizes.values()), strict=True))
    header: dict[str, Any] = {"__metadata__": {"layout": LAYOUT, "kind": wanted, "source": shards_fingerprint(ckpt_dir)}}
    for name, (dtype, shape) in parts.items():
        header[name] = {"dtype": _DTYPE_CODES[dtype], "shape": shape, "data_offsets": (ends[name] - sizes[name], ends[name])}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)  # so that all that follows is aligned
    begin = 8 + len(text)

    path = packed_file_path(ckpt_dir, wanted)
    part = path.with_suffix(f".{os.getpid()}.part")  # another may be at it, too
    names = [name for name in parts if not name.endswith(".scale")]
    try:
        size, free = begin + sum(sizes.values()), shutil.disk_usage(path.parent).free
        if free < size:
            raise CheckpointError(f"{path} would take {format_bytes(size)}, but {format_bytes(free)} are free there; make room")
        with part.open("wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for name in progress(names, lambda name: sizes[name], "saving"):
                shards.check_unchanged()
                for full_name, tensor in _tensors_to_write(name, shards, wanted):
                    f.seek(begin + ends[full_name] - sizes[full_name])
                    f.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
                for view in resharding.shard_parts(name, shards):
                    host_memory.madvise(view, host_memory.DONTNEED)
            f.flush()
            os.fsync(f.fileno())  # a disk that is full or failing says so now, while the file before is still there
        shards.check_unchanged()
        os.replace(part, path)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be written: {e.strerror}") from e
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return path


def _tensors_to_write(name: str, shards: Shards, wanted: str) -> Iterator[tuple[str, torch.Tensor]]:
    """What stands in the file for a stored weight."""
    parts, own, dim = resharding.shard_parts(name, shards), format_of(name, wanted), split_dim(name)
    for part in parts:
        loading.check_finite(part, [name], shards)
    if own is None:
        yield name, torch.cat(parts, dim=dim or 0).contiguous()
        return
    rows = [torch.cat(parts, dim=1)] if dim == 1 and len(parts) > 1 else parts
    if any(part.dtype != rows[0].dtype for part in rows):
        rows = [part.float() for part in rows]
    if pack.extension() is not None:
        blocks = BlockedWeight.from_rows(own, rows, group_size_for(own, rows[0].shape[1]))
    elif own == "bfloat16":
        blocks = BlockedWeight.from_dense(torch.cat(rows))
    else:
        blocks = BlockedWeight.from_quantized(QuantizedWeight.cat([quantize(part, own) for part in rows]))
    yield name, blocks.weight
    if blocks.scales is not None:
        yield f"{name}.scale", blocks.scales
