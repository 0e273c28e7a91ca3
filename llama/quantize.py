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
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

HEAD = "int8"  # the output layer's kind, in both: 4 bit raises the KL divergence by a third or more, and saves 4% of a step
WIDE = 2048  # inputs from which rows have larger groups: decoding is a tenth faster than with groups of 32
SHARE = torch.tensor(0.02, dtype=torch.float32, device="cpu")
# Shares of a group's range to cut from either end, in float32 as in pack.c; and how often to refit.
SHARES, REFITS = [(share * SHARE).item() for share in range(4)], 3
BLOCK = 1 << 20  # weights quantized at a time: what is computed on the way stays in a cache


@dataclass(frozen=True)
class Quantized:
    """A quantized weight, as the table above has it, and the dtype of what it multiplies."""

    kind: str
    q: torch.Tensor  # int8 (out, width): whole groups, of which `in_features` inputs count, from `front` on
    scale: torch.Tensor  # (out, groups)
    zero: torch.Tensor | None  # (out, groups); None: 0
    in_features: int
    dtype: torch.dtype
    front: int = 0

    @property
    def device(self) -> torch.device:
        return self.q.device

    def dense(self) -> torch.Tensor:
        """(out, in), as what it stands for."""
        groups = self.q.unflatten(1, (self.scale.shape[1], -1)).float() * self.scale.float().unsqueeze(-1)
        if self.zero is not None:
            groups += self.zero.float().unsqueeze(-1)
        return groups.flatten(1)[:, self.front : self.front + self.in_features].to(self.dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Quantized":
        zero = None if self.zero is None else self.zero.to(device)
        return replace(self, q=self.q.to(device), scale=self.scale.to(device), zero=zero, dtype=dtype)

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.q.shape[1] // self.scale.shape[1]

    def columns(self, first: int, last: int) -> "Quantized":
        """The inputs first..last alone: the groups that hold them."""
        if self.scale.shape[1] == 1 and self.zero is None:  # as on a GPU: the whole row
            return replace(self, q=self.q[:, first:last].contiguous(), in_features=last - first)
        begin, end = first // self.group, -(-last // self.group)
        q = self.q[:, begin * self.group : end * self.group].contiguous()
        zero = None if self.zero is None else self.zero[:, begin:end]
        front, scale = first - begin * self.group, self.scale[:, begin:end]
        return replace(self, q=q, scale=scale, zero=zero, in_features=last - first, front=front)

    def rows(self, first: int, last: int) -> "Quantized":
        """The outputs first..last alone."""
        zero = None if self.zero is None else self.zero[first:last]
        return replace(self, q=self.q[first:last], scale=self.scale[first:last], zero=zero)

    @staticmethod
    def cat(parts: "list[Quantized]") -> "Quantized":
        """Their outputs, one after the other."""
        if len(parts) == 1:
            return parts[0]
        zero = None if parts[0].zero is None else torch.cat([p.zero for p in parts])  # type: ignore[misc]
        return replace(parts[0], q=torch.cat([p.q for p in parts]), scale=torch.cat([p.scale for p in parts]), zero=zero)


def kind_of(name: str, kind: str) -> str | None:
    """What a weight of Meta's name becomes in a model of this kind; None: it stays as it is."""
    if "norm" in name or name == "tok_embeddings.weight":
        return None
    return HEAD if name == "output.weight" and kind in KINDS else kind


def group_of(in_features: int, kind: str) -> int:
    """Inputs that share a scale."""
    group = 128 if kind == "int8" else 64
    return group if in_features >= WIDE and in_features % group == 0 else 32


def _int8(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp_(min=1e-30).bfloat16()
    return (groups / scale.float()).round_().clamp_(-127, 127).to(torch.int8).flatten(1), scale.squeeze(-1), None


def _sum(groups: torch.Tensor) -> torch.Tensor:
    """(..., group) -> (..., 1), in the order in which pack.c sums: by 8 lanes, and these in turn."""
    lanes = functools.reduce(torch.add, groups.unflatten(-1, (-1, 8)).unbind(-2))
    return functools.reduce(torch.add, lanes.unbind(-1)).unsqueeze(-1)


def _int4(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return q, scale and zero of least squared error: try ranges with each end cut by SHARES, then refit by least squares."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    span, size = high - low, groups.shape[-1]
    best = torch.full_like(low, 1e-30), 0 * span, torch.full_like(low, math.inf)  # NaN and infinity remain: nothing is better

    def whole(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return ((groups - zero) * scale.reciprocal()).round_().clamp_(-8, 7)

    def attempt(scale: torch.Tensor, zero: torch.Tensor) -> None:
        nonlocal best
        s, z = scale.clamp(min=1e-30).bfloat16().float(), zero.bfloat16().float()
        error = _sum((whole(s, z) * s + z - groups).square_())
        better = error < best[2]
        best = tuple(torch.where(better, new, old) for new, old in zip((s, z, error), best, strict=True))  # type: ignore[assignment]

    for below, above in itertools.product(SHARES, SHARES):
        first, last = low + below * span, high - above * span
        scale = (last - first) / 15
        attempt(scale, first + 8 * scale)
    of_x = _sum(groups)
    for _ in range(REFITS):
        q = whole(*best[:2])
        of_q, spread = _sum(q), size * _sum(q * q) - _sum(q).square()
        scale = (size * _sum(q * groups) - of_q * of_x) / spread
        valid = (spread > 0) & (scale > 1e-30)
        scale = torch.where(valid, scale, best[0])
        attempt(scale, torch.where(valid, (of_x - scale.bfloat16().float() * of_q) / size, best[1]))
    scale, zero, _ = best
    return whole(scale, zero).to(torch.int8).flatten(1), scale.squeeze(-1).bfloat16(), zero.squeeze(-1).bfloat16()


KINDS: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]] = {
    "int8": _int8,
    "int4": _int4,
}


def bytes_per_weight(kind: str | None, dtype: torch.dtype, in_features: int = WIDE) -> float:
    """With its share of scales and zeros."""
    if kind is None:
        return float(dtype.itemsize)
    return {"int8": 1 + 2 / group_of(in_features, kind), "int4": 0.5 + 4 / group_of(in_features, kind)}[kind]


def quantize(weight: torch.Tensor, kind: str, dtype: torch.dtype | None = None) -> Quantized:
    """Quantize a weight (out, in) that is to multiply rows of `dtype`, by default its own."""
    width = weight.shape[1]
    # Int8Cuda needs one scale per row. Small models lose the most by that: their rows keep groups.
    whole_rows = kind == "int8" and not weight.is_cpu and width >= WIDE
    group = width if whole_rows else group_of(width, kind)
    step = max(1, BLOCK // width)
    parts = []
    for i in range(0, len(weight), step):
        rows = F.pad(weight[i : i + step].float(), (0, -width % group))
        parts.append(Quantized(kind, *KINDS[kind](rows.unflatten(1, (-1, group))), width, dtype or weight.dtype))
    return Quantized.cat(parts)
