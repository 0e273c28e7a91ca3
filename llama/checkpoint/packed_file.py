"""Save packed weights in a file beside the shards, and open that file. Loading it needs no packing or quantizing.

`save_packed_file` writes `bfloat16.safetensors`, `int8.safetensors` or `int4.safetensors` once, in one process. `Llama.build`
then maps the file into memory, and copies blocks only if they cannot be mapped in huge pages. The file contains the whole
model, so it loads on any number of ranks, and the shards may be deleted.

The file is in the safetensors format, with Meta's names. The embedding and the norms are stored as in the shards. Every other
weight (out, in) is stored in blocks (kernels/blocked_linear.py), in which 4 bytes contain n inputs:

    NAME.weight                    blocks, uint8 (out / 64, in / n, 64, 4)
    NAME.weight.scale (if int8)    scales, bfloat16 (out / 64, groups, 64, 1)
    NAME.weight.scale (if int4)    scales and zeros, bfloat16 (out / 64, groups, 64, 2)

Blocks that are multiplied as one matrix (wq, wk and wv; w1 and w3) lie one after the other, and so do their scales.

The header contains the version of the layout, so that a file of another version is rejected, and a fingerprint of the shards
from which the file was made. Weights are unpacked on a GPU, on a CPU without a kernel for blocks, and on a rank whose part of a
weight begins in the middle of a block.
"""

import contextlib
import ctypes
import hashlib
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from ..distributed.groups import world_size
from ..distributed.progress import progress
from ..distributed.setup import set_environment
from ..distributed.threads import limit_threads
from ..errors import CheckpointError, DeviceError, InputError, describe, explain_system_error, format_bytes, short_repr
from ..kernels import host_memory, pack
from ..kernels.blocked_linear import ACTIVATION_GROUP, BlockedWeight
from ..model import Transformer
from ..quantization.quantize import quantize
from ..quantization.weight import FORMATS, QuantizedWeight, format_of, group_size
from . import loading, resharding
from .layouts import open_weights, read_params, weight_paths
from .params import SUPPORTED_DTYPES
from .safetensors_file import FileLayout, encode_header, fingerprint_parts, map_safetensors
from .shards import Shards, file_identity, split_dim
from .validate import build_on_meta, check_shards, expected_shapes

LAYOUT = "blocks of 64 outputs, 4 bytes each, version 2"
FORMAT_KEY = "kind"  # the key in the header's metadata whose value is the format of the weights
MAX_ZIP_RECORDS = 10_000  # limit for a shard: more than ten times the number of records in a shard of 70B
PACKED_FORMATS = ["bfloat16", *FORMATS]
REMAKE = "make it again with `python -m llama quantize`, or delete it"


def packed_file_path(ckpt_dir: str | os.PathLike[str], format: str) -> Path:
    """Return the path of a checkpoint's packed file in `format`. The file need not exist."""
    return Path(ckpt_dir).expanduser() / f"{format}.safetensors"


def shards_fingerprint(ckpt_dir: str | os.PathLike[str]) -> str | None:
    """Return a hash that identifies the contents of a folder's shards; None if the folder has no shards."""
    digest, paths = hashlib.sha256(), weight_paths(ckpt_dir)
    for path in paths:
        digest.update(path.name.encode())
        for part in _fingerprint_parts(path):
            digest.update(part)
    return digest.hexdigest() if paths else None


def _fingerprint_parts(path: Path) -> Iterator[bytes]:
    """Yield bytes that identify a file of weights. For a zip: the name, size, checksum and first 4 kB of each record.

    The first 4 kB are needed because some programs write no checksums.
    """
    try:
        if path.suffix == ".safetensors":
            yield from fingerprint_parts(path)
            return
        with path.open("rb") as f, zipfile.ZipFile(f) as archive:
            if len(archive.infolist()) > MAX_ZIP_RECORDS:
                raise ValueError(f"more than {MAX_ZIP_RECORDS:,} records")
            for entry in archive.infolist():
                yield repr((entry.filename, entry.file_size, entry.CRC)).encode()
                f.seek(entry.header_offset)
                yield f.read(4096)
    except Exception as e:  # zipfile raises errors of many types for a damaged file
        if reason := explain_system_error(e):
            raise CheckpointError(f"{path}: {reason}") from e
        kind = "safetensors file" if path.suffix == ".safetensors" else "PyTorch checkpoint"
        raise CheckpointError(f"{path}: damaged, or no {kind} ({e}); fetch it again, or remove it") from e


def file_layout(model: Transformer, stored_dtype: torch.dtype, format: str) -> FileLayout:
    """Return the dtype and shape of each tensor that a model's packed file must contain, in the order of the file.

    stored_dtype: the dtype of the embedding and the norms.
    """
    shapes, layout = expected_shapes(model), FileLayout()
    for names in _file_groups(model, format):
        weights: FileLayout = {}
        for name in names:
            weight_format = format_of(name, format)
            if weight_format is None:
                weights[name] = stored_dtype, shapes[name]
                continue
            out_features, in_features = shapes[name]
            group = scale_group_size(weight_format, in_features)
            weight_shape, scales_shape = BlockedWeight.shapes(weight_format, out_features, in_features, group)
            weights[name] = torch.uint8, weight_shape
            if scales_shape:
                layout[f"{name}.scale"] = torch.bfloat16, scales_shape
        layout |= weights
    return layout


def _file_groups(model: Transformer, format: str) -> list[list[str]]:
    """Return the names of the weights in the order of the file. The weights of each list are multiplied as one matrix.

    Embedding and norms come last: the sizes of all blocks and scales are multiples of 64 bytes, and so they are aligned to 64
    bytes if nothing else comes before them.
    """
    return sorted(resharding.weight_groups(model, joint=True), key=lambda names: format_of(names[0], format) is None)


def scale_group_size(format: str, in_features: int) -> int:
    """Return the number of inputs in a group of a packed weight.

    Rows are padded to whole groups. In int8 and int4, the inputs of a group share a scale.
    """
    return ACTIVATION_GROUP if format == "bfloat16" else group_size(in_features, format)


def open_packed_file(ckpt_dir: str | os.PathLike[str], format: str, fits: bool = True) -> Shards | None:
    """Map a checkpoint's packed file as if it were a single shard; return None if the shards must be loaded instead.

    fits: False if the packed file does not suit the model's device or dtype. The shards are then preferred if there are any.
    Returns None also if there is no packed file. Raises CheckpointError if the file is damaged, or was made from other shards
    than those beside it.
    """
    path = packed_file_path(ckpt_dir, format)
    if not path.is_file():
        return None
    shards_beside = shards_fingerprint(ckpt_dir)
    if shards_beside and not fits:
        return None
    identity = file_identity(path)
    try:
        metadata, tensors = map_safetensors(path, huge_pages=True)
    except (OSError, MemoryError, RuntimeError, ValueError) as e:
        if reason := explain_system_error(e):
            raise CheckpointError(f"{path}: {reason}") from e
        raise CheckpointError(f"{path}: cut off, damaged, or not written by this library; {REMAKE}") from e
    layout, stored_format = metadata.get("layout"), metadata.get(FORMAT_KEY)
    if layout != LAYOUT or stored_format != format:
        raise CheckpointError(
            f"{path}: its layout is {short_repr(layout)}, {short_repr(stored_format)}; "
            f"this version reads {LAYOUT!r}, {format!r}; {REMAKE}"
        )
    if shards_beside not in (None, metadata.get("source")):
        raise CheckpointError(f"{path}: made from other weights than the shards beside it; {REMAKE}")
    return Shards({path.name: tensors}, {path: identity}, format)


def describe_unused(ckpt_dir: str | os.PathLike[str], format: str) -> str | None:
    """Return a note that a packed file is not used when an adapter is merged; None if there is no such file.

    Raises CheckpointError if the folder contains no other weights.
    """
    path = packed_file_path(ckpt_dir, format)
    if not weight_paths(ckpt_dir) and any(packed_file_path(ckpt_dir, f).is_file() for f in PACKED_FORMATS):
        raise CheckpointError(
            f"{path.parent}: it contains packed weights only, into which no adapter can be merged: "
            "give the folder of the model's own weights"
        )
    return f"llama: {path.name} is not used, because it contains the weights without the adapter" if path.is_file() else None


def check_packed_file(model: Transformer, shards: Shards) -> None:
    """Raise CheckpointError unless an opened packed file contains exactly the tensors of the model."""
    ((file, tensors),) = shards.items()
    stored_dtype = tensors["tok_embeddings.weight"].dtype if "tok_embeddings.weight" in tensors else torch.float32
    expected = file_layout(model, stored_dtype, file.partition(".")[0])
    actual = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    wrong = [name for name in {**expected, **actual} if expected.get(name) != actual.get(name)]
    if wrong or stored_dtype not in SUPPORTED_DTYPES:
        name = wrong[0] if wrong else "tok_embeddings.weight"
        tensor = short_repr(actual[name]) if name in actual else "missing"
        raise CheckpointError(
            f"{file}: {short_repr(name)} is {tensor}, where params.json makes {expected.get(name, 'none')}: "
            f"the file was made from another model, or is damaged; {REMAKE}"
        )


def save_packed_file(ckpt_dir: str | os.PathLike[str], format: str) -> Path:
    """Pack a checkpoint's weights as "bfloat16", "int8" or "int4" and save them in its folder; return the path of the file.

    An existing packed file is replaced once the new file is complete. Raises InputError for an unknown format, and for
    "bfloat16" if a weight is stored in another dtype. Raises CheckpointError for a damaged checkpoint or a full disk, and
    DeviceError on several ranks.
    """
    set_environment()
    limit_threads()
    if not isinstance(format, str) or format not in PACKED_FORMATS:
        raise InputError(f"format is {describe(format)}; it must be one of {', '.join(map(repr, PACKED_FORMATS))}")
    if world_size() > 1:
        raise DeviceError(f"saving weights takes one process, and this job has {world_size()}: run it without torchrun")
    shards, model = _open_checkpoint(ckpt_dir)
    if format == "bfloat16":
        _check_all_bfloat16(shards, model)
    layout = file_layout(model, shards.first["tok_embeddings.weight"].dtype, format)
    metadata = {"layout": LAYOUT, FORMAT_KEY: format, "source": shards_fingerprint(ckpt_dir)}
    header, spans = encode_header(layout, metadata)
    path = packed_file_path(ckpt_dir, format)
    temporary = path.with_suffix(f".{os.getpid()}.part")  # a unique name, because several processes may save at once
    try:
        size, free = max(end for _, end in spans.values()), shutil.disk_usage(path.parent).free
        if free < size:
            raise CheckpointError(f"{path} would take {format_bytes(size)}, but {format_bytes(free)} are free there; make room")
        _write_packed_file(temporary, header, _file_groups(model, format), shards, format)
        shards.check_unchanged()
        os.replace(temporary, path)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be written: {e.strerror}") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path


def _open_checkpoint(ckpt_dir: str | os.PathLike[str]) -> tuple[Shards, Transformer]:
    """Map and check a checkpoint; return its shards, and its model on the meta device."""
    params = read_params(ckpt_dir, "merge it into its model with python -m llama convert --adapter, and give the result")
    shards = open_weights(ckpt_dir)
    model = build_on_meta(params, shards, 1, 1, None)
    check_shards(model, shards)
    return shards, model


def _check_all_bfloat16(shards: Shards, model: Transformer) -> None:
    """Raise InputError unless every weight is stored in bfloat16."""
    for name in expected_shapes(model):
        for tensors in shards.values():
            if (dtype := tensors[name].dtype) != torch.bfloat16:
                raise InputError(f"{name} is stored as {dtype}, and saving it as bfloat16 loses precision; save int8 or int4")


def _write_packed_file(path: Path, header: bytes, groups: list[list[str]], shards: Shards, format: str) -> None:
    """Write a packed file: the header, then for each group of weights their scales and their blocks.

    The file is written in pieces of 2 MB, because Linux then caches it in pages of this size, which can be mapped as they are.
    """
    pending = bytearray(header)
    with path.open("wb") as f:
        for names in progress(groups, lambda names: sum(view.nbytes for view in _stored_views(names, shards)), "saving"):
            weights = []
            for name in names:
                shards.check_unchanged()
                weights.append(_tensors_to_write(name, shards, format))
            scales = [scales for _, scales in weights if scales is not None]
            for tensor in [*scales, *(blocks for blocks, _ in weights)]:
                data = memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
                while len(data):
                    piece = data[: host_memory.HUGE_PAGE - len(pending)]
                    pending += piece
                    data = data[len(piece) :]
                    if len(pending) == host_memory.HUGE_PAGE:
                        f.write(pending)
                        pending.clear()
            for view in _stored_views(names, shards):
                host_memory.madvise(view, host_memory.DONTNEED)
        f.write(pending)
        f.flush()
        os.fsync(f.fileno())  # a full or faulty disk raises an error here, before the old file is replaced


def _stored_views(names: list[str], shards: Shards) -> list[torch.Tensor]:
    """Return the parts of the named weights in all shards."""
    return [view for name in names for view in resharding.shard_parts(name, shards)]


def _tensors_to_write(name: str, shards: Shards, format: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the tensors of a stored weight in the packed file: its blocks, and in int8 and int4 their scales, otherwise None.

    The embedding and the norms are unchanged.
    """
    parts = [shards.in_metas_order(name, part) for part in resharding.shard_parts(name, shards)]
    weight_format, dim = format_of(name, format), split_dim(name)
    for part in parts:
        loading.check_finite(part, [name], shards)
    if weight_format is None:
        return torch.cat(parts, dim=dim or 0).contiguous(), None
    rows = [torch.cat(parts, dim=1)] if dim == 1 and len(parts) > 1 else parts
    if any(part.dtype != rows[0].dtype for part in rows):
        rows = [part.float() for part in rows]
    if pack.extension() is not None:
        blocks = BlockedWeight.from_rows(weight_format, rows, scale_group_size(weight_format, rows[0].shape[1]))
    elif weight_format == "bfloat16":
        blocks = BlockedWeight.from_dense(torch.cat(rows))
    else:
        blocks = BlockedWeight.from_quantized(QuantizedWeight.cat([quantize(part, weight_format) for part in rows]))
    return blocks.weight, blocks.scales
