"""How a weight is held so that multiplying by it reads it as one stream.

A parallel layer gives its weight to `pack` once, when it is loaded. Where there is nothing better than the weight itself
and `widened.linear`, it gets None.

    weight      device                        form
    bfloat16    CPU that multiplies it        BlockedLinear (blocks.py): products.c; without a C compiler Packed: oneDNN
    int8        CPU with AVX-512 or AVX2      BlockedLinear: products.c, avx2.c
                CUDA, one scale per row       Int8Cuda: as it is, for cuBLAS
                others                        Int8: as it is, dequantized for each product
    int4        CPU with AVX-512 or AVX2      BlockedLinear
                other CPUs, CUDA              int4.py's
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch

from .. import tuning
from ..errors import DeviceError
from ..quantization.weight import QuantizedWeight, group_size
from . import half_precision
from .base import LinearKernel
from .blocked_linear import ACTIVATION_GROUP, BlockedLinear, BlockedWeight, extension_for
from .c_extension import DTYPE_CODES
from .int4 import Int4CpuLinear, Int4CudaLinear
from .int8 import Int8CudaLinear, Int8DequantLinear
from .onednn import OneDnnLinear


def uses_blocks(kind: str | None, weight: torch.Tensor | QuantizedWeight, in_features: int) -> bool:
    """Tell whether a weight is to be held in blocks once it is of this kind; None means bfloat16."""
    if weight.device.type != "cpu" or weight.dtype not in DTYPE_CODES or extension_for(kind or "bfloat16") is None:
        return False
    return kind is not None or (weight.dtype == torch.bfloat16 and in_features % 2 == 0)


def pack_rows(
    kind: str | None, views: Sequence[torch.Tensor], dtype: torch.dtype, width: int, first: int, last: int
) -> LinearKernel | None:
    """Pack the inputs first..last of rows of `width` inputs into blocks in one call of pack.c, quantized by groups of the whole
    row, or in bfloat16. The views are rows (outs, width), one after the other, or, if narrower, columns side by side.

    Return None where blocks do not serve; `pack` then chooses the form.
    """
    view, *others = views
    n = sum(map(len, views)) if view.shape[1] == width else len(view)
    big = kind is not None or n * (last - first) * 2 >= tuning.MIN_PACKED_BYTES
    alike = all(other.dtype == view.dtype for other in others)
    fits = dtype in DTYPE_CODES and (kind is not None or dtype == view.dtype)
    if not (big and alike and fits) or not uses_blocks(kind, view, last - first):
        return None
    group = group_size(width, kind) if kind else ACTIVATION_GROUP
    begin, end = first // group * group, min(-(-last // group) * group, width)
    if view.shape[1] == width:
        rows = [v[:, begin:end] for v in views]
    else:
        starts = itertools.accumulate((v.shape[1] for v in views), initial=0)
        rows = [torch.cat([v[:, max(begin - at, 0) : max(end - at, 0)] for v, at in zip(views, starts, strict=False)], dim=1)]
    made = BlockedWeight.from_rows(kind or "bfloat16", rows, group)
    return BlockedLinear(replace(made, in_features=last - first, front=first - begin), dtype)


def pack_weight(weight: torch.Tensor | QuantizedWeight) -> LinearKernel | None:
    """The form that multiplies (..., in) to (..., out) fastest, for a weight (out, in); None: the weight as it is."""
    if isinstance(weight, QuantizedWeight):
        check_kernel(weight.format, weight.device, weight.dtype)
        if uses_blocks(weight.format, weight, weight.in_features) and weight.group_size % ACTIVATION_GROUP == 0:
            return BlockedLinear(BlockedWeight.from_quantized(weight), weight.dtype)
        if weight.format == "int4":
            return Int4CpuLinear(weight) if weight.device.type == "cpu" else Int4CudaLinear(weight)
        return (
            Int8CudaLinear(weight)
            if weight.device.type == "cuda" and Int8CudaLinear.serves(weight)
            else Int8DequantLinear(weight)
        )
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or weight.nbytes < tuning.MIN_PACKED_BYTES:
        return None
    made = pack_rows(None, [weight.detach()], weight.dtype, weight.shape[1], 0, weight.shape[1])
    return made or (OneDnnLinear(weight) if half_precision.is_native(weight.dtype) else None)


def repack(held: torch.Tensor | QuantizedWeight) -> LinearKernel | torch.Tensor | QuantizedWeight:
    """`pack`, of what came from a machine that may have had a form where this one has none."""
    return pack_weight(held) or held


LinearKernel.rebuild = staticmethod(repack)


def check_kernel(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise DeviceError where there is no kernel for weights of this kind. "cuda" without a number: some GPU, not one here."""
    if kind == "int4" and device.type == "mps":
        raise DeviceError("quantize='int4' has no kernel on mps; use quantize='int8', or device='cpu'")
    if kind == "int4" and device.type == "cuda":
        if dtype != torch.bfloat16:
            raise DeviceError(f"quantize='int4' on CUDA multiplies bfloat16 only, and dtype is {dtype}; use dtype='bfloat16'")
        major, minor = (8, 0) if device.index is None else torch.cuda.get_device_capability(device)
        if major < 8:
            raise DeviceError(
                f"quantize='int4' needs a GPU of compute capability 8.0, and {device} has {major}.{minor}; use quantize='int8'"
            )
