"""Products of 16 bit numbers on CPUs, most of them, that multiply them by turning them into float32.

PyTorch's kernels that do so are slow but for a single row. So avx2.c multiplies a few rows; where it is not compiled, they go
one by one. For more a piece of the weight at a time is made float32: no copy of the model.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from . import avx2

SMALLEST = 1 << 19  # bytes of a weight; below this F.linear is the fastest
SINGLY = 4  # rows up to which reading 16 bit numbers anew for each is faster than making them float32 once
COPIES = 1 << 26  # bytes that copies of x may take
PIECE = 1 << 21  # bytes of weights that a thread makes ready at a time: they stay in its cache until it multiplies them


def _widened() -> frozenset[torch.dtype]:
    mkldnn, widened = torch.backends.mkldnn.is_available(), {torch.float16, torch.bfloat16}
    if mkldnn and torch.ops.mkldnn._is_mkldnn_fp16_supported():
        widened.remove(torch.float16)
    # On x86 oneDNN takes bfloat16 wherever there is AVX-512, but slowly where there is no more.
    slow = torch.cpu._is_avx2_supported() and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    if mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported() and not slow:
        widened.remove(torch.bfloat16)
    return frozenset(widened)


WIDENED = _widened()


def native(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of dtype as they are, not faster in float32. Of ONEDNN_MAX_CPU_ISA PyTorch tells
    what is below AVX-512, not that the CPU's bfloat16 is switched off."""
    return dtype not in WIDENED


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`F.linear`, x (..., in) times a weight (out, in), by what is fastest on this CPU for its dtype and number of rows."""
    if not weight.is_cpu or weight.nbytes < SMALLEST or torch.compiler.is_compiling():
        return F.linear(x, weight)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    derived = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if (weight.dtype == torch.float32 or not native(weight.dtype)) and avx2.takes(rows, weight):
        y = avx2.multiply(rows, weight)
    elif native(weight.dtype) or len(rows) <= 1 or x.dtype != weight.dtype or x.shape[-1] != weight.shape[1] or derived:
        return F.linear(x, weight)
    elif len(rows) <= SINGLY:
        y = torch.cat([F.linear(row, weight) for row in rows.split(1)])
    else:
        y = by_pieces(rows, len(weight), lambda out, buffer: buffer.copy_(weight[out].view_as(buffer)).transpose(1, 2))
    return y.view(*x.shape[:-1], len(weight))


def by_pieces(x: torch.Tensor, out: int, piece: Callable[[slice, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """x (N, in) times a weight (out, in) on the CPU, in the dtype that it multiplies fastest. For parts * m outputs at a time,
    a part for each thread if they are equal, `piece` fills a buffer (parts, m, in) and returns it as (parts, in, m): each
    thread multiplies what it wrote, else what lies in one core's cache would have to travel to another's."""
    wide, threads, width = x.float() if x.dtype in WIDENED else x, torch.get_num_threads(), x.shape[1]
    copied = wide.dtype.itemsize == 2  # oneDNN would copy it for each part of each piece; once is enough
    if copied and x.nbytes:
        threads = max(1, min(threads, COPIES // x.nbytes))
    most = max(64, PIECE // (width * wide.itemsize) // 64 * 64)
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
