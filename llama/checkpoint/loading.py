"""Filling a model with this rank's part of a checkpoint, tensor by tensor.

n shards are loaded on m ranks, whatever n and m: of each matrix, rank r takes the r-th of m equal parts of the n stored
parts joined. Where that is a stored tensor as it is, the mapped file is the weight; else its views are joined, quantized
or packed for the kernel, so that a rank holds its own weights and one tensor more at most. Numbers that are not finite
are found here, as they are read.
"""

import itertools
from collections.abc import Iterator
from typing import cast

import torch

from .. import tuning
from ..distributed.groups import model_parallel
from ..distributed.progress import progress
from ..errors import CheckpointError
from ..kernels import packed_weight
from ..kernels.base import LinearKernel
from ..kernels.blocked_linear import BLOCK_OUTPUTS, BlockedLinear, BlockedWeight, extension_for
from ..kernels.c_extension import DTYPE_CODES
from ..kernels.host_memory import DONTNEED, WILLNEED, madvise, malloc_trim
from ..kernels.packed_weight import PackedWeight
from ..kernels.packing import pack_rows
from ..layers.linear import ColumnParallelLinear, RowParallelLinear
from ..model import Transformer
from ..quantization.quantize import quantize
from ..quantization.weight import QuantizedWeight, format_of
from .resharding import rank_views, shard_parts, weight_groups
from .shards import Shards, split_dim
from .validate import NON_FINITE


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
    for names in weight_groups(model, joint=packs):
        # Quantization groups are those of unsplit rows. A saved file is read by name in `_saved`; views only give the order.
        linear = split_dim(names[0]) is not None and names[0] != "tok_embeddings.weight"
        by_groups = linear and kind and split_dim(names[0]) == 1
        saved_whole = shards.saved and linear
        views = [v for n in names for v in (shard_parts(n, shards) if saved_whole or by_groups else rank_views(n, shards))]
        if saved_whole:
            views += [shards.first[f"{n}.scale"] for n in names if f"{n}.scale" in shards.first]
        plan.append((names, views))
    # The largest first: the temporary copy then adds least to peak memory.
    plan.sort(key=lambda item: -sum(view.numel() for view in item[1]))
    ahead = itertools.islice(plan, 1, None)
    for names, views in progress(plan, lambda item: sum(v.nbytes for v in item[1]), "loading"):
        shards.check_unchanged()
        for view in next(ahead, ([], []))[1]:
            madvise(view, WILLNEED)  # the disk reads the next one while this one is packed
        modules = [model.get_submodule(name.removesuffix(".weight")) for name in names]
        linears = [module for module in modules if isinstance(module, ColumnParallelLinear | RowParallelLinear)]
        made: LinearKernel | QuantizedWeight | torch.Tensor | None = None
        if linears:
            made = _pack_rank_part(linears, names, views, shards, kind, dtype, device, packs)
        if made is None:
            made = (
                views[0]
                if _can_stay_mapped(views, dtype, device)
                else _join_views(views, split_dim(names[0]) or 0, dtype, device)
            )
            check_finite(made, names, shards)
        else:
            for view in views:
                madvise(view, DONTNEED)
            malloc_trim()
        shapes = [tuple(cast(torch.Tensor, module.weight).shape) for module in modules]
        outs, width = [shape[0] for shape in shapes], shapes[0][-1]
        is_output = names[0] == "output.weight"
        parameters = packed_weight.make_parameters(made, outs, width, dtype, device, packs and bool(linears), is_output)
        if made is views[0] and isinstance(parameters[0], PackedWeight):  # packed straight from the file
            madvise(views[0], DONTNEED)
        for module, parameter in zip(modules, parameters, strict=True):
            module.weight = parameter
        del made, parameters  # before the next one is made
    shards.check_unchanged()


def quantize_rank_part(
    name: str, shards: Shards, kind: str, dtype: torch.dtype, device: torch.device
) -> Iterator[QuantizedWeight]:
    """This rank's part of a stored weight, block by block of its rows."""
    rank, ranks = model_parallel()
    by_columns = split_dim(name) == 1
    for views in [shard_parts(name, shards)] if by_columns else [[view] for view in rank_views(name, shards)]:
        width = sum(view.shape[1] for view in views)
        step = max(1, tuning.QUANTIZE_SHARDS_AT_ONCE // width)
        for i in range(0, views[0].shape[0], step):
            rows = [view[i : i + step].to(device) for view in views]
            block = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
            check_finite(block, [name], shards)
            found = quantize(block, kind, dtype)
            yield found.slice_inputs(width * rank // ranks, width * (rank + 1) // ranks) if by_columns else found


def _pack_rank_part(
    modules: list[ColumnParallelLinear | RowParallelLinear],
    names: list[str],
    views: list[torch.Tensor],
    shards: Shards,
    kind: str | None,
    dtype: torch.dtype,
    device: torch.device,
    packs: bool,
) -> LinearKernel | QuantizedWeight | torch.Tensor | None:
    """Return this rank's part of weights in the kernel's form, as it was saved, or packed now; None: as it is."""
    own = kind and format_of(names[0], kind)
    if shards.saved:
        return _read_packed_file(modules, names, shards.first, format_of(names[0], shards.saved) or "", dtype, device, packs)
    if device.type == "cpu" and packs:
        by_columns, (rank, ranks) = split_dim(names[0]) == 1, model_parallel()
        width = sum(view.shape[1] for view in views) if by_columns else views[0].shape[1]
        first, last = 0, width
        if by_columns and own:  # whole rows, of which this rank takes a part
            first, last = width * rank // ranks, width * (rank + 1) // ranks
        if kernel := pack_rows(own, views, dtype, width, first, last):
            for view in views:
                check_finite(view, names, shards)
            return kernel
    if own is None:
        return None
    made = QuantizedWeight.cat([part for name in names for part in quantize_rank_part(name, shards, own, dtype, device)])
    return made if packs else made.dequantize()


def _read_packed_file(
    modules: list[ColumnParallelLinear | RowParallelLinear],
    names: list[str],
    tensors: dict[str, torch.Tensor],
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
    packs: bool,
) -> LinearKernel | QuantizedWeight | torch.Tensor:
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
                raise CheckpointError(f"{name} {NON_FINITE}")
        whole = BlockedWeight(kind, tensors[name], scales, width, out)
        if split_dim(name) == 0:
            first, last = out * rank // ranks, out * (rank + 1) // ranks
            aligned &= first % BLOCK_OUTPUTS == 0
            parts.append((whole, first, last))
        else:
            parts.append((whole.slice_inputs(width * rank // ranks, width * (rank + 1) // ranks), 0, out))
    read = dtype == torch.bfloat16 if kind == "bfloat16" else dtype in DTYPE_CODES
    if packs and aligned and read and device.type == "cpu" and extension_for(kind):
        joined = BlockedWeight.cat([whole.slice_outputs(first, last) for whole, first, last in parts])
        if joined is not None:
            return BlockedLinear(joined, dtype)
    if kind == "bfloat16":
        return torch.cat([whole.dequantize(dtype)[first:last] for whole, first, last in parts]).to(device)
    made = QuantizedWeight.cat([whole.to_quantized(dtype).slice_outputs(first, last) for whole, first, last in parts]).to(
        device, dtype
    )
    return made if packs else made.dequantize()


def check_finite(weight: torch.Tensor, names: list[str], shards: Shards) -> None:
    """Raise CheckpointError for NaN and infinity in a weight that was read from these names, or made so by its dtype."""
    # A sum is finite only if all its terms are, and costs one pass; it may overflow, so ask again if it is not.
    if weight.sum().isfinite() or weight.isfinite().all():
        return
    for name in names:
        if not all(view.isfinite().all() for view in shard_parts(name, shards)):
            raise CheckpointError(f"{name} {NON_FINITE}")
    name = next(n for n in names if not all(v.to(weight.dtype).isfinite().all() for v in shard_parts(n, shards)))
    raise CheckpointError(f"{name} holds numbers too large for {weight.dtype}; leave dtype out, or use 'bfloat16' or 'float32'")


def _can_stay_mapped(views: list[torch.Tensor], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the mapped file can itself be the weight: no copy, and one copy in memory for all who map it."""
    first = views[0]
    aligned = first.data_ptr() % 64 == 0  # as torch.save writes them
    return len(views) == 1 and first.is_contiguous() and aligned and first.dtype == dtype and device.type == "cpu"


def _join_views(views: list[torch.Tensor], dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    shape = list(views[0].shape)
    shape[dim] = sum(view.shape[dim] for view in views)
    joined, filled = torch.empty(shape, dtype=dtype, device=device), 0
    for view in views:
        joined.narrow(dim, filled, view.shape[dim]).copy_(view)
        filled += view.shape[dim]
        madvise(view, DONTNEED)
    return joined
