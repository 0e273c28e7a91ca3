"""Quantize a weight to int8 or int4 with PyTorch, from the values of the weight alone, without calibration text.

Groups start at the first input of the whole row, so that the quantized values do not depend on the number of shards and ranks.
On CPUs, csrc/pack.c computes the same values faster. `llama.quantization.weight` defines the formats.
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

# Fractions of a group's range, 0 to 6%, that may be cut off at each end. They are rounded to float32 as in csrc/pack.c.
RANGE_CUTS = [c_float(n * c_float(0.02).value).value for n in range(4)]
N_REFITS = 3  # number of least-squares fits after the search for the best range


def _quantize_int8(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize groups (out, groups, group size) to int8, mapping the largest magnitude in each group to 127.

    Return values (out, width), scales (out, groups) and, in place of zeros, None.
    """
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp_(min=1e-30).bfloat16()
    return (groups / scale.float()).round_().clamp_(-127, 127).to(torch.int8).flatten(1), scale.squeeze(-1), None


def _lane_sum(groups: torch.Tensor) -> torch.Tensor:
    """Sum the last dimension to (..., 1) in the same order as csrc/pack.c: first 8 partial sums, then their sum."""
    lanes = functools.reduce(torch.add, groups.unflatten(-1, (-1, 8)).unbind(-2))
    return functools.reduce(torch.add, lanes.unbind(-1)).unsqueeze(-1)


def _quantize_int4(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize groups (out, groups, group size) to int4 with a small squared error.

    Return values (out, width), scales (out, groups) and zeros (out, groups). First, all pairs of RANGE_CUTS are tried as
    cuts at the two ends of the range of each group. Then scale and zero are refitted N_REFITS times by least squares. The
    candidate with the smallest error is returned. csrc/pack.c uses the same algorithm.
    """
    low, high = groups.aminmax(dim=-1, keepdim=True)
    span, size = high - low, groups.shape[-1]
    # The best scale, zero and error so far. If a group contains NaN or infinity, no candidate has a smaller error, and the zero
    # stays 0 * span, which is NaN.
    best = torch.full_like(low, 1e-30), 0 * span, torch.full_like(low, math.inf)

    def to_integers(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return ((groups - zero) * scale.reciprocal()).round_().clamp_(-8, 7)

    def try_fit(scale: torch.Tensor, zero: torch.Tensor) -> None:
        nonlocal best
        s, z = scale.clamp(min=1e-30).bfloat16().float(), zero.bfloat16().float()
        error = _lane_sum((to_integers(s, z) * s + z - groups).square_())
        better = error < best[2]
        best = tuple(torch.where(better, new, old) for new, old in zip((s, z, error), best, strict=True))  # type: ignore[assignment]

    for low_cut, high_cut in itertools.product(RANGE_CUTS, RANGE_CUTS):
        first, last = low + low_cut * span, high - high_cut * span
        scale = (last - first) / 15
        try_fit(scale, first + 8 * scale)
    sum_x = _lane_sum(groups)
    for _ in range(N_REFITS):
        q = to_integers(*best[:2])
        sum_q, variance = _lane_sum(q), size * _lane_sum(q * q) - _lane_sum(q).square()
        scale = (size * _lane_sum(q * groups) - sum_q * sum_x) / variance
        valid = (variance > 0) & (scale > 1e-30)
        scale = torch.where(valid, scale, best[0])
        try_fit(scale, torch.where(valid, (sum_x - scale.bfloat16().float() * sum_q) / size, best[1]))
    scale, zero, _ = best
    return to_integers(scale, zero).to(torch.int8).flatten(1), scale.squeeze(-1).bfloat16(), zero.squeeze(-1).bfloat16()


QUANTIZERS: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]] = {
    "int8": _quantize_int8,
    "int4": _quantize_int4,
}


def quantize(weight: torch.Tensor, format: str, dtype: torch.dtype | None = None) -> QuantizedWeight:
    """Quantize a weight (out, in) to "int8" or "int4", for activations of `dtype` (default: the dtype of the weight)."""
    width = weight.shape[1]
    # Int8CudaLinear needs one scale per row. Rows with few inputs have several scales nevertheless, because small models need
    # the precision most.
    one_scale_per_row = format == "int8" and not weight.is_cpu and width >= WIDE_ROW
    group = width if one_scale_per_row else group_size(width, format)
    step = max(1, tuning.QUANTIZE_AT_ONCE // width)
    parts = []
    for first in range(0, len(weight), step):
        rows = F.pad(weight[first : first + step].float(), (0, -width % group))
        values, scales, zeros = QUANTIZERS[format](rows.unflatten(1, (-1, group)))
        parts.append(QuantizedWeight(format, values, scales, zeros, width, dtype or weight.dtype))
    return QuantizedWeight.cat(parts)
