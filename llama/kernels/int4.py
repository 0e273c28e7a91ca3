"""How weights of 4 bits are held and multiplied where blocks.py does not.

    Int4        on the CPU, in PyTorch's blocks, for its kernel
    Int4Cuda    as the tensor cores take them, for PyTorch's kernel

Both unpack what they hold for many rows.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .. import compat, tuning
from ..quantization.weight import QuantizedWeight
from . import half_precision
from .base import LinearKernel
from .host_memory import HUGE_PAGES


class _Int4Linear(LinearKernel):
    """Groups of inputs with a scale and a zero each, (groups, out, 2)."""

    format = "int4"

    def __init__(self, weight: QuantizedWeight, multiple: int) -> None:
        self.in_features, self.out_features, self.group_size = weight.in_features, len(weight.values), weight.group_size
        more = -len(weight.values) % multiple
        q = F.pad(weight.values, (0, 0, 0, more)) if more else weight.values
        assert weight.zeros is not None
        scales = torch.stack((weight.scales.t(), weight.zeros.t()), dim=-1).to(weight.dtype)
        self.scales = F.pad(scales, (0, 0, 0, more)) if more else scales
        self.packed = self._packed(q.split(max(1, tuning.QUANTIZE_AT_ONCE // 2 // q.shape[1] // multiple) * multiple))
        self.padding = weight.front, q.shape[1] - weight.front - self.in_features
        self.plain = not any(self.padding) and len(q) == self.out_features

    def _packed(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """From numbers (out, in) as they come."""
        raise NotImplementedError

    def _product(self, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward_2d(self, x: torch.Tensor) -> torch.Tensor:
        """By the widths that the kernel needs, and in its dtype: a caller's autocast gives attention's outputs another."""
        x = x.to(self.scales.dtype)
        y = self._product(F.pad(x, self.padding) if any(self.padding) else x, self.scales.flatten(1, -2))
        return y if self.plain else y[:, : self.out_features]

    def unpack(self) -> QuantizedWeight:
        """The numbers as the kernel sees them: what it makes of unit rows, with scales of 1 and zeros of 0."""
        scales = self.scales.flatten(1, -2)
        ones = torch.zeros_like(scales, dtype=torch.bfloat16)
        ones[..., 0] = 1
        width = self.group_size * len(scales)
        parts = []
        for i in range(0, width, self.group_size):
            unit = ones.new_zeros(self.group_size, width)
            unit[:, i : i + self.group_size].fill_diagonal_(1)
            parts.append(self._product(unit, ones)[:, : self.out_features].to(torch.int8))
        scale, zero = scales[:, : self.out_features].transpose(0, 1).bfloat16().unbind(-1)
        q, dtype = torch.cat(parts).t().contiguous(), self.scales.dtype
        return QuantizedWeight("int4", q, scale, zero, self.in_features, dtype, self.padding[0])


class Int4CpuLinear(_Int4Linear):
    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__(weight, 64)

    def forward_2d(self, x: torch.Tensor) -> torch.Tensor:
        # At once: it is called for each weight of a step.
        if self.plain and x.dtype == self.scales.dtype == torch.bfloat16 and x.shape[0] <= tuning.INT4_CPU_MAX_ROWS:
            return compat.int4_linear_cpu(x, self.packed, self.group_size, self.scales.flatten(1, -2))
        return super().forward_2d(x)

    def _packed(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        blocks = HUGE_PAGES.empty(sum(map(len, pieces)), pieces[0].shape[1] // 2, dtype=torch.uint8)
        for q, own in zip(pieces, blocks.split(len(pieces[0])), strict=True):
            own.copy_(_pack_int4(q))
        return blocks

    def _product(self, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        few = x.dtype == torch.bfloat16 and x.shape[0] <= tuning.INT4_CPU_MAX_ROWS  # in float32 the kernel is ten times slower
        half = None if few or torch.compiler.is_compiling() else _half_block_outputs()
        if not half:
            return compat.int4_linear_cpu(x, self.packed, self.group_size, scales)
        scale, zero = scales.unbind(-1)  # (groups, out)

        def piece(out: slice, buffer: torch.Tensor) -> torch.Tensor:
            parts, n, width = buffer.shape
            q = _unpack_int4(self.packed[out], half, buffer).view(parts, -1, self.group_size, n)
            # Both (parts, groups, 1, n).
            a, b = (s[:, out].unflatten(1, (parts, 1, n)).transpose(0, 1).to(q.dtype).contiguous() for s in (scale, zero))
            return torch.addcmul(b, q, a, out=q).view(parts, width, n)

        return half_precision.linear_in_pieces(x, len(self.packed), piece)


def _pack_int4(q: torch.Tensor) -> torch.Tensor:
    return compat.int4_pack_cpu(q.int() + 8)


def _unpack_int4(blocks: torch.Tensor, half: int, buffer: torch.Tensor) -> torch.Tensor:
    """The weights (parts * n, in) that PyTorch packed, as (parts, in, n), in a buffer (parts, n, in): a block is 2 * half
    outputs by all inputs, and a byte holds outputs i and i + half of an input."""
    parts, n, width = buffer.shape
    pairs = blocks.view(parts, n // (2 * half), width, half).transpose(1, 2)  # (parts, in, n / block, half)
    q = buffer.view(*pairs.shape[:3], 2, half)
    q[..., 0, :], q[..., 1, :] = (pairs & 15).view(torch.int8) - 8, (pairs >> 4).view(torch.int8) - 8
    return buffer.view(parts, width, n)


@functools.cache
def _half_block_outputs() -> int | None:
    """32 with AVX-512, 16 with AVX2; None: this machine's PyTorch packs in a way of its own. It is no public format."""
    with torch.device("cpu"):
        q = ((torch.arange(128 * 64).view(128, 64) * 2654435761 >> 7) % 16 - 8).to(torch.float32)
        blocks = _pack_int4(q.to(torch.int8))
        for half in (32, 16):
            if blocks.shape == (128, 32) and torch.equal(_unpack_int4(blocks, half, torch.empty_like(q)[None])[0].t(), q):
                return half
    return None


class Int4CudaLinear(_Int4Linear):
    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__(weight, 8)

    def _packed(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([_pack_int4_cuda(q) for q in pieces])

    def _product(self, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        many = len(x) > tuning.INT4_CUDA_MAX_ROWS and not torch.compiler.is_compiling()
        if many and _can_unpack_cuda(self.packed.shape[3], self.packed.device):
            scale, zero = scales.transpose(0, 1).unsqueeze(3).unbind(2)  # (out, groups, 1)
            q = _unpack_int4_cuda(self.packed, x.dtype).unflatten(1, (len(scales), -1))
            return F.linear(x, torch.addcmul(zero, q, scale, out=q).flatten(1))
        return compat.int4_linear_cuda(x.contiguous(), self.packed, self.group_size, scales)


def _pack_int4_cuda(q: torch.Tensor) -> torch.Tensor:
    unsigned = (q + 8).to(torch.uint8)
    tiles = next(n for n in (8, 4, 2) if q.shape[1] % (16 * n) == 0)
    return compat.int4_pack_cuda(unsigned[:, ::2] << 4 | unsigned[:, 1::2], tiles)


def _unpack_int4_cuda(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers (out, in) that PyTorch packed as the tensor cores take them, (out / 8, in / 16t, 32, t / 2) of int32:
    one of 32 threads has 8 inputs of an output. Of an input's number within 32 its bytes have bit 0 and bit 4, their halves
    bit 3, the threads bits 1 and 2."""
    n, k, _, t = blocks.shape
    pairs = blocks.view(torch.uint8).view(n, k, 8, 4, t, 2, 2).permute(0, 2, 1, 4, 6, 3, 5)
    q = torch.empty(n, 8, k, t, 2, 2, 4, 2, dtype=dtype, device=blocks.device)  # bits 4, 3, 2 and 1, 0
    for bit3, number in enumerate((pairs & 15, pairs >> 4)):
        q[:, :, :, :, :, bit3] = number.view(torch.int8).sub_(8)
    return q.view(8 * n, -1)


@functools.cache
def _can_unpack_cuda(half_tiles: int, device: torch.device) -> bool:
    """Whether this machine's PyTorch packs so: it is no public format."""
    q = ((torch.arange(16 * 96 * half_tiles, device=device).view(16, -1) * 2654435761 >> 7) % 16 - 8).to(torch.int8)
    blocks = _pack_int4_cuda(q)
    return blocks.shape[2:] == (32, half_tiles) and torch.equal(_unpack_int4_cuda(blocks, q.dtype), q)
