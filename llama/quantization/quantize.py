"""8 and 4 bit: what a weight becomes before a kernel packs it (kernels.py).

A weight (out, in) becomes small whole numbers q. Each group of neighbouring inputs of one output has a scale, and in
4 bit a zero, which is the weight that q = 0 stands for:

    weight[o, i] = q[o, i] * scale[o, i // group] + zero[o, i // group]

    int8    q -127..127; no zero; on a GPU a row of 2,048 inputs or more is one group
    int4    q -8..7

The group size is 128 in 8 bit and 64 in 4 bit, but 32 in rows of fewer than 2,048 inputs, or of no multiple of these; scales
and zeros are bfloat16. Both are read off the weight as it was trained. So they need no text, and are the same whatever the
number of shards and ranks: a rank holds its part of what one rank would hold. On CPUs pack.c does the same, faster.
"""

import functools
import itertools
import math
from collections.abc import Callable
from ctypes import c_float

import torch
import torch.nn.functional as F

from .. import tuning
from .weight import WIDE_ROW, QuantizedWeight, group_size

# Shares of a group's range to cut from either end, in float32 as in pack.c; and how often to refit.
SHARES, REFITS = [c_float(n * c_float(0.02).value).value for n in range(4)], 3


def _quantize_int8(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp_(min=1e-30).bfloat16()
    return (groups / scale.float()).round_().clamp_(-127, 127).to(torch.int8).flatten(1), scale.squeeze(-1), None


def _lane_sum(groups: torch.Tensor) -> torch.Tensor:
    """(..., group) -> (..., 1), in the order in which pack.c sums: by 8 lanes, and these in turn."""
    lanes = functools.reduce(torch.add, groups.unflatten(-1, (-1, 8)).unbind(-2))
    return functools.reduce(torch.add, lanes.unbind(-1)).unsqueeze(-1)


def _quantize_int4(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return q, scale and zero of least squared error: try ranges with each end cut by SHARES, then refit by least squares."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    span, size = high - low, groups.shape[-1]
    best = torch.full_like(low, 1e-30), 0 * span, torch.full_like(low, math.inf)  # NaN and infinity remain: nothing is better

    def whole(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return ((groups - zero) * scale.reciprocal()).round_().clamp_(-8, 7)

    def attempt(scale: torch.Tensor, zero: torch.Tensor) -> None:
        nonlocal best
        s, z = scale.clamp(min=1e-30).bfloat16().float(), zero.bfloat16().float()
        error = _lane_sum((whole(s, z) * s + z - groups).square_())
        better = error < best[2]
        best = tuple(torch.where(better, new, old) for new, old in zip((s, z, error), best, strict=True))  # type: ignore[assignment]

    for below, above in itertools.product(SHARES, SHARES):
        first, last = low + below * span, high - above * span
        scale = (last - first) / 15
        attempt(scale, first + 8 * scale)
    of_x = _lane_sum(groups)
    for _ in range(REFITS):
        q = whole(*best[:2])
        of_q, spread = _lane_sum(q), size * _lane_sum(q * q) - _lane_sum(q).square()
        scale = (size * _lane_sum(q * groups) - of_q * of_x) / spread
        valid = (spread > 0) & (scale > 1e-30)
        scale = torch.where(valid, scale, best[0])
        attempt(scale, torch.where(valid, (of_x - scale.bfloat16().float() * of_q) / size, best[1]))
    scale, zero, _ = best
    return whole(scale, zero).to(torch.int8).flatten(1), scale.squeeze(-1).bfloat16(), zero.squeeze(-1).bfloat16()


QUANTIZERS: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]] = {
    "int8": _quantize_int8,
    "int4": _quantize_int4,
}


def quantize(weight: torch.Tensor, format: str, dtype: torch.dtype | None = None) -> QuantizedWeight:
    """Quantize a weight (out, in) that is to multiply rows of `dtype`, by default its own."""
    width = weight.shape[1]
    # Int8Cuda needs one scale per row. Small models lose the most by that: their rows keep groups.
    whole_rows = format == "int8" and not weight.is_cpu and width >= WIDE_ROW
    group = width if whole_rows else group_size(width, format)
    step = max(1, tuning.QUANTIZE_AT_ONCE // width)
    parts = []
    for i in range(0, len(weight), step):
        rows = F.pad(weight[i : i + step].float(), (0, -width % group))
        parts.append(QuantizedWeight(format, *QUANTIZERS[format](rows.unflatten(1, (-1, group))), width, dtype or weight.dtype))
    return QuantizedWeight.cat(parts)
