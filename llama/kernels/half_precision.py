"""Products of 16 bit numbers on CPUs, most of them, that multiply them by turning them into float32.

PyTorch's kernels that do so are slow but for a single row. So avx2.c multiplies a few rows; where it is not compiled, they go
one by one. For more a piece of the weight at a time is made float32: no copy of the model.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .. import compat, tuning
from . import avx2


@functools.cache
def slow_dtypes() -> frozenset[torch.dtype]:
    """Return the 16-bit dtypes that this CPU multiplies slower than float32."""
    slow = {dtype for dtype in (torch.float16, torch.bfloat16) if not compat.onednn_supports(dtype)}
    return frozenset(slow | ({torch.bfloat16} if compat.cpu_has_slow_bf16() else set()))


def is_native(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of dtype as they are, not faster in float32. Of ONEDNN_MAX_CPU_ISA PyTorch tells
    what is below AVX-512, not that the CPU's bfloat16 is switched off."""
    return dtype not in slow_dtypes()


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`F.linear`, x (..., in) times a weight (out, in), by what is fastest on this CPU for its dtype and number of rows."""
    if not weight.is_cpu or weight.nbytes < tuning.MIN_PACKED_BYTES or torch.compiler.is_compiling():
        return F.linear(x, weight)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    derived = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if (weight.dtype == torch.float32 or not is_native(weight.dtype)) and avx2.supports(rows, weight):
        y = avx2.linear(rows, weight)
    elif is_native(weight.dtype) or len(rows) <= 1 or x.dtype != weight.dtype or x.shape[-1] != weight.shape[1] or derived:
        return F.linear(x, weight)
    elif len(rows) <= tuning.MAX_SINGLE_ROWS:
        y = torch.cat([F.linear(row, weight) for row in rows.split(1)])
    else:
        y = linear_in_pieces(rows, len(weight), lambda out, buffer: buffer.copy_(weight[out].view_as(buffer)).transpose(1, 2))
    return y.view(*x.shape[:-1], len(weight))


def linear_in_pieces(x: torch.Tensor, out: int, piece: Callable[[slice, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """x (N, in) times a weight (out, in) on the CPU, in the dtype that it multiplies fastest. For parts * m outputs at a time,
    a part for each thread if they are equal, `piece` fills a buffer (parts, m, in) and returns it as (parts, in, m): each
    thread multiplies what it wrote, else what lies in one core's cache would have to travel to another's."""
    wide, threads, width = x.float() if x.dtype in slow_dtypes() else x, torch.get_num_threads(), x.shape[1]
    copied = wide.dtype.itemsize == 2  # oneDNN would copy it for each part of each piece; once is enough
    if copied and x.nbytes:
        threads = max(1, min(threads, tuning.MAX_COPY_BYTES // x.nbytes))
    most = max(64, tuning.PIECE_BYTES // (width * wide.itemsize) // 64 * 64)
    step = min(out, threads * most)
    y, buffer, spread = x.new_empty(len(x), out), wide.new_empty(step * width), wide[None]
    for first in range(0, out, step):
        n = min(step, out - first)
        parts = next((p for p in range(threads, 1, -1) if n % (64 * p) == 0), 1)
        weight = piece(slice(first, first + n), buffer[: n * width].view(parts, n // parts, width))
        if len(spread) != parts:
            spread = wide[None]
            spread = spread.repeat(parts, 1, 1) if copied and parts > 1 else spread.expand(parts, -1, -1)
        product = torch.bmm(spread, weight)
        y[:, first : first + n].unflatten(1, (parts, -1)).copy_(product.transpose(0, 1))
    return y
