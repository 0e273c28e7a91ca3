"""Filling a model with this rank's part of a checkpoint, tensor by tensor.

n shards are loaded on m ranks, whatever n and m: of each matrix, rank r takes the r-th of m equal parts of the n stored
parts joined. Where that is a stored tensor as it is, the mapped file is the weight; else its views are joined, quantized
or packed for the kernel, so that a rank holds its own weights and one tensor more at most. Numbers that are not finite
are found here, as they are read.
"""

import ctypes
import itertools
import mmap
import re
import sys
from collections.abc import Iterator
from typing import cast

import torch

from . import packed
from .blocks import OUT, BlockedLinear, Blocks, library_for
from .checkpoint import NOT_FINITE, Shards, split_dim
from .errors import CheckpointError
from .kernel import Kernel
from .kernels import pack_rows
from .library import NUMBERS
from .model import Transformer
from .packed import PackedWeight
from .parallel import ColumnParallelLinear, RowParallelLinear
from .quantize import Quantized, kind_of, quantize
from .ranks import model_parallel
from .runtime import progress

QUANTIZED_AT_ONCE = 1 << 24  # weights joined from several shards at a time


def cut(parts: list[torch.Tensor], dim: int, rank: int, ranks: int) -> list[torch.Tensor]:
    """Views that, joined along `dim`, are the rank-th of `ranks` equal parts of the joined `parts`.

    3 parts of 4 rows, 2 ranks: rank 0 takes rows 0..6, which is part 0 whole and rows 0..2 of part 1.
    """
    width = parts[0].shape[dim]
    first, last = (width * len(parts) * r // ranks for r in (rank, rank + 1))
    views = []
    for i, part in enumerate(parts):
        begin, end = max(first - i * width, 0), min(last - i * width, width)
        if begin < end:
            views.append(part.narrow(dim, begin, end - begin))
    return views


# Linear layers of one input, which the engine multiplies as one: their weights are parts of one, one after the other.
JOINT = {
    "attention.wq": ("attention.wq", "attention.wk", "attention.wv"),
    "feed_forward.w1": ("feed_forward.w1", "feed_forward.w3"),
}
FOLLOW = {name for names in JOINT.values() for name in names[1:]}


def weights_of(model: Transformer, joint: bool) -> list[list[str]]:
    """Return the names of a model's weights: those that are to be parts of one together if `joint`, all others alone."""
    found = []
    for name, _ in model.named_parameters():
        layer, own = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", name).groups("")  # type: ignore[union-attr]
        if not joint or own not in FOLLOW:
            names = JOINT.get(own, (own,)) if joint else (own,)
            found.append([f"{layer or ''}{each}.weight" for each in names])
    return found


@torch.inference_mode(False)  # else the weights could never be written again
def load_weights(
    model: Transformer,
    shards: Shards,
    dtype: torch.dtype,
    device: torch.device,
    kind: str | None = None,
    packs: bool = True,
) -> None:
    """Fill a model made on `meta` with this rank's part of the shards, its matrices quantized if `kind` is given.

    packs: whether weights may be packed for kernels; else all are plain tensors, quantized ones dequantized.
    Raises CheckpointError for NaN and infinity, and where a file changes or goes before the last number is read.
    """
    plan: list[tuple[list[str], list[torch.Tensor]]] = []  # the names of each weight, and what it is read from
    for names in weights_of(model, joint=packs):
        # Quantization groups are those of unsplit rows. A saved file is read by name in `_saved`; views only give the order.
        linear = split_dim(names[0]) is not None and names[0] != "tok_embeddings.weight"
        by_groups = linear and kind and split_dim(names[0]) == 1
        saved_whole = shards.saved and linear
        views = [v for n in names for v in (all_of(n, shards) if saved_whole or by_groups else _part_of(n, shards))]
        if saved_whole:
            views += [shards.first[f"{n}.scale"] for n in names if f"{n}.scale" in shards.first]
        plan.append((names, views))
    # The largest first: the temporary copy then adds least to peak memory.
    plan.sort(key=lambda item: -sum(view.numel() for view in item[1]))
    ahead = itertools.islice(plan, 1, None)
    for names, views in progress(plan, lambda item: sum(v.nbytes for v in item[1]), "loading"):
        shards.check_unchanged()
        for view in next(ahead, ([], []))[1]:
            advise(view, WILLNEED)  # the disk reads the next one while this one is packed
        modules = [model.get_submodule(name.removesuffix(".weight")) for name in names]
        linears = [module for module in modules if isinstance(module, ColumnParallelLinear | RowParallelLinear)]
        made: Kernel | Quantized | torch.Tensor | None = None
        if linears:
            made = _packed(linears, names, views, shards, kind, dtype, device, packs)
        if made is None:
            made = views[0] if _in_place(views, dtype, device) else _join(views, split_dim(names[0]) or 0, dtype, device)
            refuse_what_is_not_finite(made, names, shards)
        else:
            for view in views:
                advise(view, DONTNEED)
            trim()
        shapes = [tuple(cast(torch.Tensor, module.weight).shape) for module in modules]
        outs, width = [shape[0] for shape in shapes], shapes[0][-1]
        is_output = names[0] == "output.weight"
        parameters = packed.parameters(made, outs, width, dtype, device, packs and bool(linears), is_output)
        if made is views[0] and isinstance(parameters[0], PackedWeight):  # packed straight from the file
            advise(views[0], DONTNEED)
        for module, parameter in zip(modules, parameters, strict=True):
            module.weight = parameter
        del made, parameters  # before the next one is made
    shards.check_unchanged()


def all_of(name: str, shards: Shards) -> list[torch.Tensor]:
    """A stored weight: the shards' parts of it."""
    parts = [tensors[name] for tensors in shards.values()]
    return parts[:1] if split_dim(name) is None else parts


def _part_of(name: str, shards: Shards) -> list[torch.Tensor]:
    """Views of what this rank takes of a stored weight."""
    parts, dim = all_of(name, shards), split_dim(name)
    return parts if dim is None else cut(parts, dim, *model_parallel())


def quantized(name: str, shards: Shards, kind: str, dtype: torch.dtype, device: torch.device) -> Iterator[Quantized]:
    """This rank's part of a stored weight, block by block of its rows."""
    rank, ranks = model_parallel()
    by_columns = split_dim(name) == 1
    for views in [all_of(name, shards)] if by_columns else [[view] for view in _part_of(name, shards)]:
        width = sum(view.shape[1] for view in views)
        step = max(1, QUANTIZED_AT_ONCE // width)
        for i in range(0, views[0].shape[0], step):
            rows = [view[i : i + step].to(device) for view in views]
            block = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
            refuse_what_is_not_finite(block, [name], shards)
            found = quantize(block, kind, dtype)
            yield found.columns(width * rank // ranks, width * (rank + 1) // ranks) if by_columns else found


def _packed(
    modules: list[ColumnParallelLinear | RowParallelLinear],
    names: list[str],
    views: list[torch.Tensor],
    shards: Shards,
    kind: str | None,
    dtype: torch.dtype,
    device: torch.device,
    packs: bool,
) -> Kernel | Quantized | torch.Tensor | None:
    """Return this rank's part of weights in the kernel's form, as it was saved, or packed now; None: as it is."""
    own = kind and kind_of(names[0], kind)
    if shards.saved:
        return _saved(modules, names, shards.first, kind_of(names[0], shards.saved) or "", dtype, device, packs)
    if device.type == "cpu" and packs:
        by_columns, (rank, ranks) = split_dim(names[0]) == 1, model_parallel()
        width = sum(view.shape[1] for view in views) if by_columns else views[0].shape[1]
        first, last = 0, width
        if by_columns and own:  # whole rows, of which this rank takes a part
            first, last = width * rank // ranks, width * (rank + 1) // ranks
        if kernel := pack_rows(own, views, dtype, width, first, last):
            for view in views:
                refuse_what_is_not_finite(view, names, shards)
            return kernel
    if own is None:
        return None
    made = Quantized.cat([part for name in names for part in quantized(name, shards, own, dtype, device)])
    return made if packs else made.dense()


def _saved(
    modules: list[ColumnParallelLinear | RowParallelLinear],
    names: list[str],
    tensors: dict[str, torch.Tensor],
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
    packs: bool,
) -> Kernel | Quantized | torch.Tensor:
    """Return this rank's part of weights saved in blocks (saved.py): copied as blocks where a kernel reads them, else taken
    apart for another device or CPU, or for ranks whose part begins within a block."""
    (rank, ranks), parts, aligned = model_parallel(), [], True
    for name, module in zip(names, modules, strict=True):
        out, width = module.out_features, module.in_features
        scales = tensors.get(f"{name}.scale")
        if scales is not None:
            positive = scales if kind == "int8" else scales[..., 0]
            if not (scales.isfinite().all() and positive.min() > 0):
                raise CheckpointError(
                    f"{name}.scale: not all scales are finite and above 0: the file is damaged; "
                    "make it again with `python -m llama quantize`, or delete it"
                )
        if kind == "bfloat16":
            weight = tensors[name].view(torch.bfloat16)
            if not (weight.sum().isfinite() or weight.isfinite().all()):  # a sum costs one pass, but may overflow
                raise CheckpointError(f"{name} {NOT_FINITE}")
        whole = Blocks(kind, tensors[name], scales, width, out)
        if split_dim(name) == 0:
            first, last = out * rank // ranks, out * (rank + 1) // ranks
            aligned &= first % OUT == 0
            parts.append((whole, first, last))
        else:
            parts.append((whole.inputs(width * rank // ranks, width * (rank + 1) // ranks), 0, out))
    read = dtype == torch.bfloat16 if kind == "bfloat16" else dtype in NUMBERS
    if packs and aligned and read and device.type == "cpu" and library_for(kind):
        joined = Blocks.joined([whole.outputs(first, last) for whole, first, last in parts])
        if joined is not None:
            return BlockedLinear(joined, dtype)
    if kind == "bfloat16":
        return torch.cat([whole.dense(dtype)[first:last] for whole, first, last in parts]).to(device)
    made = Quantized.cat([whole.quantized(dtype).rows(first, last) for whole, first, last in parts]).to(device, dtype)
    return made if packs else made.dense()


def refuse_what_is_not_finite(weight: torch.Tensor, names: list[str], shards: Shards) -> None:
    """Raise CheckpointError for NaN and infinity in a weight that was read from these names, or made so by its dtype."""
    # A sum is finite only if all its terms are, and costs one pass; it may overflow, so ask again if it is not.
    if weight.sum().isfinite() or weight.isfinite().all():
        return
    for name in names:
        if not all(view.isfinite().all() for view in all_of(name, shards)):
            raise CheckpointError(f"{name} {NOT_FINITE}")
    name = next(n for n in names if not all(v.to(weight.dtype).isfinite().all() for v in all_of(n, shards)))
    raise CheckpointError(f"{name} holds numbers too large for {weight.dtype}; leave dtype out, or use 'bfloat16' or 'float32'")


def _in_place(views: list[torch.Tensor], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the mapped file can itself be the weight: no copy, and one copy in memory for all who map it."""
    first = views[0]
    aligned = first.data_ptr() % 64 == 0  # as torch.save writes them
    return len(views) == 1 and first.is_contiguous() and aligned and first.dtype == dtype and device.type == "cpu"


def _join(views: list[torch.Tensor], dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    shape = list(views[0].shape)
    shape[dim] = sum(view.shape[dim] for view in views)
    joined, filled = torch.empty(shape, dtype=dtype, device=device), 0
    for view in views:
        joined.narrow(dim, filled, view.shape[dim]).copy_(view)
        filled += view.shape[dim]
        advise(view, DONTNEED)
    return joined


def trim() -> None:
    """Give back what was freed, as glibc may: quantizing leaves holes that little fits into, a tenth of the weights."""
    if _libc and hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


_libc = ctypes.CDLL(None) if sys.platform in ("linux", "darwin") else None
WILLNEED, DONTNEED = 3, 4


def advise(view: torch.Tensor, advice: int) -> None:
    """Tell the system about the mapped pages under a view: to read them ahead, or that they are needed no longer. These
    stay in the page cache, but would count as ours until the last tensor of the shard is gone, and so double the peak."""
    if _libc is None or view.numel() == 0:
        return
    begin = view.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    strides = zip(view.shape, view.stride(), strict=True)
    end = view.data_ptr() + (1 + sum((size - 1) * stride for size, stride in strides)) * view.element_size()
    _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)
