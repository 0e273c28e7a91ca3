"""Load a rank's part of a checkpoint into a model: read, quantize and pack its weights, one tensor at a time.

A checkpoint of any number of shards loads on any number of ranks. On the CPU, a weight whose stored dtype and layout suit the
model is not copied: its parameter is a view of the memory-mapped file. Other weights are copied, quantized or packed for a
kernel. So a rank needs memory for its own weights and for at most one more tensor. NaN and infinity raise CheckpointError when
the tensor that contains them is read.
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
from ..kernels.host_memory import DONTNEED, WILLNEED, madvise, malloc_trim, map_huge_pages
from ..kernels.packed_weight import PackedWeight
from ..kernels.packing import pack_rows
from ..layers.linear import ColumnParallelLinear, RowParallelLinear
from ..model import Transformer
from ..quantization.quantize import quantize
from ..quantization.weight import QuantizedWeight, format_of
from .resharding import rank_views, shard_parts, weight_groups
from .shards import Shards, split_dim
from .validate import NON_FINITE, is_finite

Views = dict[str, list[torch.Tensor]]  # name of a weight -> tensors that, joined along its `split_dim`, are the weight


def bytes_staying_mapped(
    model: Transformer, shards: Shards, dtype: torch.dtype, device: torch.device, format: str | None, packs: bool
) -> int:
    """Return the bytes of this rank's weights that `load_weights` certainly leaves in the mapped files.

    The arguments are those of `load_weights`.
    """
    total = 0
    for group in _views_to_read(model, shards, format, packs):
        name, views = next(iter(group.items()))
        may_be_packed = _is_linear(name) and (format or (packs and dtype == torch.bfloat16))
        is_as_stored = shards.is_in_metas_order(name) and not (shards.adapter and name in shards.adapter)
        if not may_be_packed and is_as_stored and len(group) == 1 and _can_stay_mapped(views, dtype, device):
            total += views[0].nbytes
    return total


@torch.inference_mode(False)  # weights created in inference mode could not be edited in place outside of inference mode
def load_weights(
    model: Transformer,
    shards: Shards,
    dtype: torch.dtype,
    device: torch.device,
    format: str | None = None,
    packs: bool = True,
) -> None:
    """Load this rank's part of the shards into a model on the meta device.

    format: "int8" or "int4" to quantize the matrices; None not to quantize.
    packs: True if weights may be packed for kernels. If False, every weight is a plain tensor, and quantized weights are
    dequantized.
    Raises CheckpointError if a weight is not finite, and if a file is changed or deleted before the last weight is read.
    """
    groups = _views_to_read(model, shards, format, packs)
    next_groups = itertools.islice(groups, 1, None)
    for views in progress(groups, lambda group: sum(view.nbytes for view in _joined(group)), "loading"):
        shards.check_unchanged()
        for view in _joined(next(next_groups, {})) if not shards.packed_format else []:
            madvise(view, WILLNEED)  # let the disk read the next group of weights while this one is packed
        _load_group(model, views, shards, dtype, device, format, packs)
    shards.check_unchanged()


def _joined(group: Views) -> list[torch.Tensor]:
    """Return the tensors of all weights of a group, in order."""
    return [view for views in group.values() for view in views]


def _views_to_read(model: Transformer, shards: Shards, format: str | None, packs: bool) -> list[Views]:
    """Return the groups of weights to load, the largest group first.

    A group is a dict from the names of its weights to views of the mapped files from which these weights are read.
    """
    groups: list[Views] = []
    for names in weight_groups(model, joint=packs):
        is_linear = _is_linear(names[0])
        # Quantize whole rows, so that the scales do not depend on the number of ranks. A matrix that is split by its inputs is
        # therefore read whole.
        quantizes_whole_rows = is_linear and format and split_dim(names[0]) == 1
        # Weights in a packed file are read by name. Their views are used only to sort and to prefetch groups.
        from_packed_file = shards.packed_format and is_linear
        reads_whole = from_packed_file or quantizes_whole_rows
        views = {name: [*(shard_parts if reads_whole else rank_views)(name, shards)] for name in names}
        if from_packed_file:
            for name in names:
                views[name] += [shards.first[f"{name}.scale"]] if f"{name}.scale" in shards.first else []
        groups.append(views)
    # Load the largest weights first: their temporary copies are the largest, and little else is in memory at the start.
    groups.sort(key=lambda group: -sum(view.numel() for view in _joined(group)))
    return groups


def _is_linear(name: str) -> bool:
    """Return True if a weight belongs to a linear layer."""
    return split_dim(name) is not None and name != "tok_embeddings.weight"


def _load_group(
    model: Transformer,
    group: Views,
    shards: Shards,
    dtype: torch.dtype,
    device: torch.device,
    format: str | None,
    packs: bool,
) -> None:
    """Read the weights of one group, and make each the parameter of its module."""
    names, views = list(group), _joined(group)  # `madvise` may be called only for these views, not for copies of their values
    if shards.adapter is not None:
        group = {name: shards.adapter.merge(name, parts, dtype) for name, parts in group.items()}
    modules = [model.get_submodule(name.removesuffix(".weight")) for name in names]
    linears = [module for module in modules if isinstance(module, ColumnParallelLinear | RowParallelLinear)]
    weight: LinearKernel | QuantizedWeight | torch.Tensor | None = None
    if linears:
        weight = _pack_rank_part(linears, group, shards, format, dtype, device, packs)
    if weight is None:
        if shards.is_in_metas_order(names[0]) and _can_stay_mapped(_joined(group), dtype, device):
            weight = _joined(group)[0]
        else:
            weight = _join_views(group, views, shards, dtype, device)
        if weight is not views[0] or not shards.packed_format:
            check_finite(weight, names, shards)
    else:
        if not (isinstance(weight, BlockedLinear) and _share_storage(weight.blocks.weight, views[0])):
            for view in views:
                madvise(view, DONTNEED)
        malloc_trim()
    shapes = [tuple(cast(torch.Tensor, module.weight).shape) for module in modules]
    outs, in_features = [shape[0] for shape in shapes], shapes[0][-1]
    computes_logits = names[0] == "output.weight"
    parameters = packed_weight.make_parameters(
        weight, outs, in_features, dtype, device, packs and bool(linears), computes_logits
    )
    if weight is views[0] and isinstance(parameters[0], PackedWeight):
        madvise(views[0], DONTNEED)  # the weight has been packed, so its pages of the mapped file are no longer needed
    for module, parameter in zip(modules, parameters, strict=True):
        module.weight = parameter


def quantize_rank_part(
    name: str, parts: list[torch.Tensor], shards: Shards, format: str, dtype: torch.dtype, device: torch.device
) -> Iterator[QuantizedWeight]:
    """Quantize this rank's part of a stored weight, and yield it several rows at a time.

    parts: the whole weight's parts if the weight is divided by its inputs, otherwise those of this rank.
    """
    rank, ranks = model_parallel()
    split_by_inputs = split_dim(name) == 1
    for views in [parts] if split_by_inputs else [[shards.in_metas_order(name, part)] for part in parts]:
        width = sum(view.shape[1] for view in views)
        step = max(1, tuning.QUANTIZE_SHARDS_AT_ONCE // width)
        for i in range(0, views[0].shape[0], step):
            columns = [view[i : i + step].to(device) for view in views]
            rows = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
            check_finite(rows, [name], shards)
            weight = quantize(rows, format, dtype)
            if split_by_inputs:
                weight = weight.slice_inputs(width * rank // ranks, width * (rank + 1) // ranks)
            yield weight


def _pack_rank_part(
    linears: list[ColumnParallelLinear | RowParallelLinear],
    group: Views,
    shards: Shards,
    format: str | None,
    dtype: torch.dtype,
    device: torch.device,
    packs: bool,
) -> LinearKernel | QuantizedWeight | torch.Tensor | None:
    """Pack or quantize this rank's part of a group of linear weights, and return it; return None if neither is needed."""
    names, views = list(group), _joined(group)
    weight_format = format and format_of(names[0], format)
    if shards.packed_format:
        stored_format = format_of(names[0], shards.packed_format) or ""
        return _read_packed_weights(linears, names, shards.first, stored_format, dtype, device, packs)
    if device.type == "cpu" and packs:
        split_by_inputs, (rank, ranks) = split_dim(names[0]) == 1, model_parallel()
        width = sum(view.shape[1] for view in views) if split_by_inputs else views[0].shape[1]
        first, last = 0, width
        if split_by_inputs and weight_format:  # views contain all inputs of each row: select this rank's inputs
            first, last = width * rank // ranks, width * (rank + 1) // ranks
        order = None
        if not all(map(shards.is_in_metas_order, names)):  # Hugging Face's files contain each weight as a whole
            orders = [shards.metas_order(name, len(view)) for name, view in zip(names, views, strict=True)]
            starts = itertools.accumulate(map(len, orders), initial=0)
            order = torch.cat([rows + start for rows, start in zip(orders, starts, strict=False)])
        if kernel := pack_rows(weight_format, views, dtype, width, first, last, order):
            for view in views:
                check_finite(view, names, shards)
            return kernel
    if weight_format is None:
        return None
    parts = [part for name in names for part in quantize_rank_part(name, group[name], shards, weight_format, dtype, device)]
    weight = QuantizedWeight.cat(parts)
    return weight if packs else weight.dequantize()


def _read_packed_weights(
    linears: list[ColumnParallelLinear | RowParallelLinear],
    names: list[str],
    tensors: dict[str, torch.Tensor],
    format: str,
    dtype: torch.dtype,
    device: torch.device,
    packs: bool,
) -> LinearKernel | QuantizedWeight | torch.Tensor:
    """Return this rank's part of a group of weights in a packed file (packed_file.py).

    If a kernel on this CPU multiplies packed blocks, the weight is a view of the mapped file, provided that its pages are huge
    and that the blocks of all names lie one after the other. Otherwise the blocks are copied into huge pages, because decode
    steps take 1.2 to 1.4 times as long from small pages. Blocks are unpacked on a GPU, on a CPU without such a kernel,
    and if this rank's part begins in the middle of a block.
    """
    rank, ranks = model_parallel()
    parts: list[tuple[BlockedWeight, int, int]] = []  # (weight, first, last): this rank's outputs are `first` to `last` - 1
    is_aligned = True
    for name, linear in zip(names, linears, strict=True):
        out_features, in_features = linear.out_features, linear.in_features
        weight = BlockedWeight(format, tensors[name], tensors.get(f"{name}.scale"), in_features, out_features)
        if split_dim(name) == 0:
            first, last = out_features * rank // ranks, out_features * (rank + 1) // ranks
            is_aligned &= first % BLOCK_OUTPUTS == 0
            parts.append((weight, first, last))
        else:
            first, last = in_features * rank // ranks, in_features * (rank + 1) // ranks
            parts.append((weight.slice_inputs(first, last), 0, out_features))
    dtype_fits = dtype == torch.bfloat16 if format == "bfloat16" else dtype in DTYPE_CODES
    uses_blocks = packs and is_aligned and dtype_fits and device.type == "cpu" and extension_for(format)
    sliced = [weight.slice_outputs(first, last) for weight, first, last in parts] if uses_blocks else []
    joined = BlockedWeight.view(sliced) if sliced else None
    if joined is not None and not map_huge_pages(joined.weight):
        joined = None
    for name in names:
        _check_scales(name, tensors, format)
    if sliced and joined is None:
        joined = BlockedWeight.cat(sliced)
    if joined is not None:
        return BlockedLinear(joined, dtype)
    if format == "bfloat16":
        return torch.cat([weight.dequantize(dtype)[first:last] for weight, first, last in parts]).to(device)
    quantized = QuantizedWeight.cat([weight.to_quantized(dtype).slice_outputs(first, last) for weight, first, last in parts])
    quantized = quantized.to(device, dtype)
    return quantized if packs else quantized.dequantize()


def _check_scales(name: str, tensors: dict[str, torch.Tensor], format: str) -> None:
    """Raise CheckpointError if a quantized weight in a packed file has a scale that is not finite and above 0.

    bfloat16 weights were checked before the file was written. To read them all again would double the time to the first token.
    """
    scales = tensors.get(f"{name}.scale")
    if scales is not None:
        lowest, highest = torch.aminmax(scales)  # NaN if there is one
        lowest_scale = lowest if format == "int8" else scales[..., 0].min()
        if not (lowest_scale > 0 and lowest.isfinite() and highest.isfinite()):
            raise CheckpointError(
                f"{name}.scale: not all scales are finite and above 0: the file is damaged; "
                "make it again with `python -m llama quantize`, or delete it"
            )


def check_finite(weight: torch.Tensor, names: list[str], shards: Shards) -> None:
    """Raise CheckpointError if a weight contains NaN or infinity.

    names: the stored tensors from which the weight was read. If all stored values are finite, the error says that they are too
    large for the weight's dtype.
    """
    if is_finite(weight):
        return
    for name in names:
        if not all(view.isfinite().all() for view in shard_parts(name, shards)):
            raise CheckpointError(f"{name} {NON_FINITE}")
    name = next(n for n in names if not all(v.to(weight.dtype).isfinite().all() for v in shard_parts(n, shards)))
    raise CheckpointError(
        f"{name} contains values too large for {weight.dtype}; leave dtype out, or use 'bfloat16' or 'float32'"
    )


def _can_stay_mapped(views: list[torch.Tensor], dtype: torch.dtype, device: torch.device) -> bool:
    """Return True if a view of the mapped file can be the weight itself, so that processes share its memory."""
    view = views[0]
    # torch.save aligns tensors to 64 bytes, safetensors to 8. The last digits of PyTorch's float32 product of one row depend on
    # the alignment, and a copy is aligned to 64 bytes. Products in 16 bit do not depend on it.
    is_aligned = view.data_ptr() % (64 if dtype == torch.float32 else 8) == 0
    return len(views) == 1 and view.is_contiguous() and is_aligned and view.dtype == dtype and device.type == "cpu"


def _share_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _join_views(
    group: Views, views: list[torch.Tensor], shards: Shards, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Concatenate the tensors of a group into a new tensor, with rows in Meta's order.

    views: the views of the mapped files from which the tensors are. The memory of each is released once it is copied.
    """
    dim = split_dim(next(iter(group))) or 0
    shape = list(views[0].shape)
    shape[dim] = sum(view.shape[dim] for view in views)
    joined, mapped = torch.empty(shape, dtype=dtype, device=device), iter(views)
    filled = 0
    for name, tensors in group.items():
        for tensor in tensors:
            part = joined.narrow(dim, filled, tensor.shape[dim])
            shards.copy_in_metas_order(name, tensor, part)
            filled += tensor.shape[dim]
            madvise(next(mapped), DONTNEED)
    return joined
