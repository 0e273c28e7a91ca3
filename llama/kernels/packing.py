"""Choose the packed form and the kernel for each weight, by its format, its dtype and the device.

A parallel layer packs its weight once, when it is loaded. A weight for which no packed form is faster stays a plain tensor, and
`half_precision.linear` multiplies it.

    weight      device                          packed as
    bfloat16    CPU with AVX-512 bfloat16       BlockedLinear
                other CPUs with bfloat16        OneDnnLinear
    int8        CPU with AVX-512 or AVX2        BlockedLinear
                CUDA, one scale per row         Int8CudaLinear
                other devices                   Int8DequantLinear
    int4        CPU with AVX-512 or AVX2        BlockedLinear
                other CPUs                      Int4CpuLinear
                CUDA                            Int4CudaLinear

BlockedLinear needs the C kernels, which are compiled at installation; it uses AMX if the CPU has it. Without the C kernels,
the lines "other CPUs" and "other devices" apply to every CPU.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch

from .. import compat, tuning
from ..errors import DeviceError
from ..quantization.weight import QuantizedWeight, group_size
from . import half_precision
from .base import LinearKernel
from .blocked_linear import ACTIVATION_GROUP, BlockedLinear, BlockedWeight, extension_for
from .c_extension import DTYPE_CODES
from .int4 import Int4CpuLinear, Int4CudaLinear
from .int8 import Int8CudaLinear, Int8DequantLinear
from .onednn import OneDnnLinear


def uses_blocks(format: str | None, weight: torch.Tensor | QuantizedWeight, in_features: int) -> bool:
    """Return True if the weight can be packed into blocks in `format` on this machine; format None means bfloat16."""
    if weight.device.type != "cpu" or weight.dtype not in DTYPE_CODES or extension_for(format or "bfloat16") is None:
        return False
    return format is not None or (weight.dtype == torch.bfloat16 and in_features % 2 == 0)


def pack_rows(
    format: str | None,
    views: Sequence[torch.Tensor],
    dtype: torch.dtype,
    width: int,
    first: int,
    last: int,
    order: torch.Tensor | None = None,
) -> LinearKernel | None:
    """Pack inputs `first` to `last` - 1 of a weight (out, width) into blocks; format None means bfloat16.

    views: the parts of the weight, in order. Either each part has some of the outputs and all inputs, or each has all outputs
        and some of the inputs.
    dtype: the dtype of activations. order: the numbers of the rows of all views in the order in which they are packed; None for
        the order of the views.

    Groups start at the first input of the whole row, so that the quantized values do not depend on the number of ranks. Returns
    None if the weight cannot be packed into blocks on this machine, or is too small; `pack_weight` may choose another form.
    """
    n_outputs = sum(map(len, views)) if views[0].shape[1] == width else len(views[0])
    large_enough = format is not None or n_outputs * (last - first) * 2 >= tuning.MIN_PACKED_BYTES
    same_dtype = all(view.dtype == views[0].dtype for view in views)
    supported_dtype = dtype in DTYPE_CODES and (format is not None or dtype == views[0].dtype)
    if not (large_enough and same_dtype and supported_dtype) or not uses_blocks(format, views[0], last - first):
        return None
    group = group_size(width, format) if format else ACTIVATION_GROUP
    begin, end = first // group * group, min(-(-last // group) * group, width)
    if views[0].shape[1] == width:
        rows = [view[:, begin:end] for view in views]
    else:
        starts = itertools.accumulate((view.shape[1] for view in views), initial=0)
        columns = [v[:, max(begin - start, 0) : max(end - start, 0)] for v, start in zip(views, starts, strict=False)]
        rows = [torch.cat(columns, dim=1)]
    blocks = BlockedWeight.from_rows(format or "bfloat16", rows, group, order)
    return BlockedLinear(replace(blocks, in_features=last - first, padding_before=first - begin), dtype)


def pack_weight(weight: torch.Tensor | QuantizedWeight) -> LinearKernel | None:
    """Pack a weight (out, in) for the fastest kernel; return None if a plain tensor is the fastest.

    Raises DeviceError if no kernel supports the weight's format on its device.
    """
    if isinstance(weight, QuantizedWeight):
        check_kernel(weight.format, weight.device, weight.dtype)
        if uses_blocks(weight.format, weight, weight.in_features) and weight.group_size % ACTIVATION_GROUP == 0:
            return BlockedLinear(BlockedWeight.from_quantized(weight), weight.dtype)
        if weight.format == "int4":
            return Int4CpuLinear(weight) if weight.device.type == "cpu" else Int4CudaLinear(weight)
        if weight.device.type == "cuda" and Int8CudaLinear.supports(weight):
            return Int8CudaLinear(weight)
        return Int8DequantLinear(weight)
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or weight.nbytes < tuning.MIN_PACKED_BYTES:
        return None
    blocked = pack_rows(None, [compat.detach(weight)], weight.dtype, weight.shape[1], 0, weight.shape[1])
    return blocked or (OneDnnLinear(weight) if half_precision.is_native(weight.dtype) else None)


def repack(weight: torch.Tensor | QuantizedWeight) -> LinearKernel | torch.Tensor | QuantizedWeight:
    """Pack the weight of a copied or unpickled kernel; return the weight itself if this machine has no kernel for it."""
    return pack_weight(weight) or weight


LinearKernel.rebuild = staticmethod(repack)


def check_kernel(format: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise DeviceError if no kernel multiplies a weight in `format` on the device, with activations of `dtype`.

    For the device "cuda" without an index, compute capability 8.0 is assumed, so that the check works without a GPU.
    """
    if format == "int4" and device.type == "mps":
        raise DeviceError("quantize='int4' has no kernel on mps; use quantize='int8', or device='cpu'")
    if format == "int4" and device.type == "cuda":
        if dtype != torch.bfloat16:
            raise DeviceError(f"quantize='int4' on CUDA multiplies bfloat16 only, and dtype is {dtype}; use dtype='bfloat16'")
        major, minor = (8, 0) if device.index is None else torch.cuda.get_device_capability(device)
        if major < 8:
            raise DeviceError(
                f"quantize='int4' needs a GPU of compute capability 8.0 or higher, and {device} has {major}.{minor}; "
                "use quantize='int8'"
            )
