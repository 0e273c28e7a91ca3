"""Linear kernels that call PyTorch's own int4 kernels, on CUDA and on CPUs that cannot use our C kernels.

    Int4CpuLinear     packs a weight for PyTorch's CPU kernel
    Int4CudaLinear    packs a weight for PyTorch's CUDA kernel, in the order in which tensor cores read weights

PyTorch's int4 kernels are slow for many rows of activations. For many rows, the weight is therefore dequantized and multiplied
in floating point.
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
    """Base class of the int4 kernels.

    `packed` contains the values in the layout of a PyTorch kernel; `scales` contains scales and zeros (groups, out, 2). The
    outputs of both are padded to the multiple that the PyTorch kernel requires.
    """

    format = "int4"

    def __init__(self, weight: QuantizedWeight, multiple: int) -> None:
        self.in_features, self.out_features, self.group_size = weight.in_features, len(weight.values), weight.group_size
        padding = -len(weight.values) % multiple  # outputs to add so that their number is divisible by `multiple`
        values = F.pad(weight.values, (0, 0, 0, padding)) if padding else weight.values
        assert weight.zeros is not None
        scales = torch.stack((weight.scales.t(), weight.zeros.t()), dim=-1).to(weight.dtype)
        self.scales = F.pad(scales, (0, 0, 0, padding)) if padding else scales
        rows_at_once = max(1, tuning.QUANTIZE_AT_ONCE // 2 // values.shape[1] // multiple) * multiple
        self.packed = self._pack(values.split(rows_at_once))
        self.padding = weight.padding_before, values.shape[1] - weight.padding_before - self.in_features
        self.is_unpadded = not any(self.padding) and len(values) == self.out_features

    def _pack(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """Pack one weight of int4 values, passed as its consecutive pieces: int8 tensors (rows, in)."""
        raise NotImplementedError

    def _multiply(self, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return x (N, padded in) times the weight, using the scales and zeros in `scales` (groups, padded out, 2)."""
        raise NotImplementedError

    def forward_2d(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.scales.dtype)  # autocast in the calling code may have changed the dtype of x
        y = self._multiply(F.pad(x, self.padding) if any(self.padding) else x, self.scales.flatten(1, -2))
        return y if self.is_unpadded else y[:, : self.out_features]

    def unpack(self) -> QuantizedWeight:
        """Return the weight; to recover its values, unit vectors are multiplied by it with scales of 1 and zeros of 0."""
        scales = self.scales.flatten(1, -2)
        unit_scales = torch.zeros_like(scales, dtype=torch.bfloat16)
        unit_scales[..., 0] = 1
        width = self.group_size * len(scales)
        parts = []
        for i in range(0, width, self.group_size):
            unit_vectors = unit_scales.new_zeros(self.group_size, width)
            unit_vectors[:, i : i + self.group_size].fill_diagonal_(1)
            parts.append(self._multiply(unit_vectors, unit_scales)[:, : self.out_features].to(torch.int8))
        scale, zero = scales[:, : self.out_features].transpose(0, 1).bfloat16().unbind(-1)
        values, dtype = torch.cat(parts).t().contiguous(), self.scales.dtype
        return QuantizedWeight("int4", values, scale, zero, self.in_features, dtype, self.padding[0])


class Int4CpuLinear(_Int4Linear):
    """Multiply by an int4 weight on the CPU, packed for PyTorch's int4 kernel."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__(weight, 64)

    def forward_2d(self, x: torch.Tensor) -> torch.Tensor:
        # Shortcut for the common case, because decoding calls this method for every weight in every step.
        if self.is_unpadded and x.dtype == self.scales.dtype == torch.bfloat16 and x.shape[0] <= tuning.INT4_CPU_MAX_ROWS:
            return compat.int4_linear_cpu(x, self.packed, self.group_size, self.scales.flatten(1, -2))
        return super().forward_2d(x)

    def _pack(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        blocks = HUGE_PAGES.empty(sum(map(len, pieces)), pieces[0].shape[1] // 2, dtype=torch.uint8)
        for values, packed_piece in zip(pieces, blocks.split(len(pieces[0])), strict=True):
            packed_piece.copy_(_pack_int4(values))
        return blocks

    def _multiply(self, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        # PyTorch's int4 kernel is ten times slower in float32 than in bfloat16.
        kernel_is_fast = x.dtype == torch.bfloat16 and x.shape[0] <= tuning.INT4_CPU_MAX_ROWS
        half_block = None if kernel_is_fast or torch.compiler.is_compiling() else _half_block_outputs()
        if not half_block:
            return compat.int4_linear_cpu(x, self.packed, self.group_size, scales)
        scale, zero = scales.unbind(-1)  # both of shape (groups, out)

        def piece(outs: slice, buffer: torch.Tensor) -> torch.Tensor:
            parts, n, width = buffer.shape
            values = _unpack_int4(self.packed[outs], half_block, buffer).view(parts, -1, self.group_size, n)
            part_scales, part_zeros = (  # both of shape (parts, groups, 1, outputs per part)
                s[:, outs].unflatten(1, (parts, 1, n)).transpose(0, 1).to(values.dtype).contiguous() for s in (scale, zero)
            )
            return torch.addcmul(part_zeros, values, part_scales, out=values).view(parts, width, n)

        return half_precision.linear_in_pieces(x, len(self.packed), piece)


def _pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Pack int4 values, passed as int8 (out, in), for PyTorch's CPU kernel, with two values per byte."""
    return compat.int4_pack_cpu(values.int() + 8)


def _unpack_int4(blocks: torch.Tensor, half_block: int, buffer: torch.Tensor) -> torch.Tensor:
    """Unpack int4 values (parts * n, in) from PyTorch's CPU layout into `buffer`, and return the buffer as (parts, in, n).

    The layout consists of blocks of 2 * half_block outputs with all inputs. Each byte contains two values of one input, for
    the outputs i and i + half_block of the block.
    """
    parts, n, width = buffer.shape
    pairs = blocks.view(parts, n // (2 * half_block), width, half_block).transpose(1, 2)
    values = buffer.view(*pairs.shape[:3], 2, half_block)
    values[..., 0, :], values[..., 1, :] = (pairs & 15).view(torch.int8) - 8, (pairs >> 4).view(torch.int8) - 8
    return buffer.view(parts, width, n)


@functools.cache
def _half_block_outputs() -> int | None:
    """Return half the number of outputs in a block of PyTorch's int4 layout on this CPU, or None if the layout is unknown.

    The result is 32 with AVX-512 and 16 with AVX2. PyTorch does not document the layout, so known values are packed by
    PyTorch and unpacked again with each of the two sizes.
    """
    with torch.device("cpu"):
        values = ((torch.arange(128 * 64).view(128, 64) * 2654435761 >> 7) % 16 - 8).to(torch.float32)
        blocks = _pack_int4(values.to(torch.int8))
        for half_block in (32, 16):
            if blocks.shape != (128, 32):
                continue
            unpacked = _unpack_int4(blocks, half_block, torch.empty_like(values)[None])[0].t()
            if torch.equal(unpacked, values):
                return half_block
    return None


class Int4CudaLinear(_Int4Linear):
    """Multiply by an int4 weight on CUDA, packed for PyTorch's int4 kernel."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__(weight, 8)

    def _pack(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([_pack_int4_cuda(values) for values in pieces])

    def _multiply(self, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        kernel_is_slow = len(x) > tuning.INT4_CUDA_MAX_ROWS and not torch.compiler.is_compiling()
        if kernel_is_slow and _can_unpack_cuda(self.packed.shape[3], self.packed.device):
            scale, zero = scales.transpose(0, 1).unsqueeze(3).unbind(2)  # both of shape (out, groups, 1)
            values = _unpack_int4_cuda(self.packed, x.dtype).unflatten(1, (len(scales), -1))
            return F.linear(x, torch.addcmul(zero, values, scale, out=values).flatten(1))
        return compat.int4_linear_cuda(x.contiguous(), self.packed, self.group_size, scales)


def _pack_int4_cuda(values: torch.Tensor) -> torch.Tensor:
    """Pack int4 values, passed as int8 (out, in), for PyTorch's CUDA kernel."""
    unsigned = (values + 8).to(torch.uint8)
    tiles = next(n for n in (8, 4, 2) if values.shape[1] % (16 * n) == 0)
    return compat.int4_pack_cuda(unsigned[:, ::2] << 4 | unsigned[:, 1::2], tiles)


def _unpack_int4_cuda(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Unpack int4 values (out, in) from PyTorch's CUDA layout.

    The layout is an int32 tensor (out / 8, in / (16 * t), 32, t / 2), where t is PyTorch's argument `innerKTiles`.

    Each int32 contains 8 inputs of one output. Within 32 adjacent inputs, the 5 bits of an input's index have these meanings:
    bits 0 and 4 choose the byte of the int32, bit 3 the half of the byte, and bits 1 and 2 the thread that reads the int32.
    """
    n, k, _, half_tiles = blocks.shape
    pairs = blocks.view(torch.uint8).view(n, k, 8, 4, half_tiles, 2, 2).permute(0, 2, 1, 4, 6, 3, 5)
    # The last four dimensions stand for bit 4, bit 3, bits 2 and 1, and bit 0 of an input's index among 32 inputs.
    values = torch.empty(n, 8, k, half_tiles, 2, 2, 4, 2, dtype=dtype, device=blocks.device)
    for bit3, half_bytes in enumerate((pairs & 15, pairs >> 4)):
        values[:, :, :, :, :, bit3] = half_bytes.view(torch.int8).sub_(8)
    return values.view(8 * n, -1)


@functools.cache
def _can_unpack_cuda(half_tiles: int, device: torch.device) -> bool:
    """Return True if `_unpack_int4_cuda` can read the int4 layout of the installed PyTorch; other versions may change it."""
    values = ((torch.arange(16 * 96 * half_tiles, device=device).view(16, -1) * 2654435761 >> 7) % 16 - 8).to(torch.int8)
    blocks = _pack_int4_cuda(values)
    return blocks.shape[2:] == (32, half_tiles) and torch.equal(_unpack_int4_cuda(blocks, values.dtype), values)
