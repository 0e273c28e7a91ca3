"""Linear layers in float16 and bfloat16 on CPUs that multiply faster in float32.

On these CPUs PyTorch's 16-bit kernels are slow for more than one row of activations. A few rows are multiplied by
csrc/linear_avx2.c or, without the C extension, one row at a time. For many rows, the weight is converted to float32 one piece
at a time, so that no float32 copy of the whole model is needed.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .. import compat, tuning
from . import avx2


@functools.cache
def slow_dtypes() -> frozenset[torch.dtype]:
    """Return the 16-bit dtypes whose matrices this CPU multiplies more slowly than float32 matrices."""
    slow = {dtype for dtype in (torch.float16, torch.bfloat16) if not compat.onednn_supports(dtype)}
    return frozenset(slow | ({torch.bfloat16} if compat.cpu_has_slow_bf16() else set()))


def is_native(dtype: torch.dtype) -> bool:
    """Return True if this CPU multiplies matrices of `dtype` at least as fast as float32 matrices.

    If the environment variable ONEDNN_MAX_CPU_ISA disables only the bfloat16 instructions of AVX-512, the answer is still True,
    because PyTorch does not report the setting.
    """
    return dtype not in slow_dtypes()


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return `F.linear(x, weight)` for x (..., in) and weight (out, in), by the fastest kernel for the number of rows."""
    if not weight.is_cpu or weight.nbytes < tuning.MIN_PACKED_BYTES or torch.compiler.is_compiling():
        return F.linear(x, weight)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if (weight.dtype == torch.float32 or not is_native(weight.dtype)) and avx2.supports(rows, weight):
        y = avx2.linear(rows, weight)
    elif is_native(weight.dtype) or len(rows) <= 1 or x.dtype != weight.dtype or x.shape[-1] != weight.shape[1] or needs_grad:
        return F.linear(x, weight)
    elif len(rows) <= tuning.MAX_SINGLE_ROWS:
        y = torch.cat([F.linear(row, weight) for row in rows.split(1)])
    else:
        y = linear_in_pieces(rows, len(weight), lambda outs, buffer: buffer.copy_(weight[outs].view_as(buffer)).transpose(1, 2))
    return y.view(*x.shape[:-1], len(weight))


def linear_in_pieces(x: torch.Tensor, out: int, piece: Callable[[slice, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Multiply x (N, in) by a weight (out, in) to (N, out) on the CPU, converting one piece of the weight at a time.

    The product is computed in x's dtype or, if the CPU is slow in x's dtype, in float32.

    piece: a function that converts a piece of the weight. `piece(outs, buffer)` converts the weight's rows in the slice `outs`
    into `buffer`, which is (parts, outputs per part, in) in the dtype of the product, and returns the piece as a tensor
    (parts, in, outputs per part). If possible, each thread multiplies one part, which is still in the cache of its core.
    """
    x_converted, threads, width = x.float() if x.dtype in slow_dtypes() else x, torch.get_num_threads(), x.shape[1]
    is_16bit = x_converted.dtype.itemsize == 2
    if is_16bit and x.nbytes:  # every part needs a copy of x, so the number of parts is limited
        threads = max(1, min(threads, tuning.MAX_COPY_BYTES // x.nbytes))
    outputs_per_thread = max(64, tuning.PIECE_BYTES // (width * x_converted.itemsize) // 64 * 64)
    step = min(out, threads * outputs_per_thread)
    y, buffer = x.new_empty(len(x), out), x_converted.new_empty(step * width)
    x_parts = x_converted[None]
    for first in range(0, out, step):
        n = min(step, out - first)
        parts = next((p for p in range(threads, 1, -1) if n % (64 * p) == 0), 1)
        weight = piece(slice(first, first + n), buffer[: n * width].view(parts, n // parts, width))
        if len(x_parts) != parts:
            x_parts = x_converted[None]
            # PyTorch multiplies 16-bit dtypes with oneDNN, which would copy an expanded x again for each piece of the weight;
            # `repeat` copies x once for all pieces.
            x_parts = x_parts.repeat(parts, 1, 1) if is_16bit and parts > 1 else x_parts.expand(parts, -1, -1)
        product = torch.bmm(x_parts, weight)
        y[:, first : first + n].unflatten(1, (parts, -1)).copy_(product.transpose(0, 1))
    return y
