"""How a weight is held so that multiplying by it reads it as one stream.

A parallel layer gives its weight to `pack` once, when it is loaded. Where there is nothing better than the weight itself
and `widened.linear`, it gets None.

    weight      device                form
    bfloat16    CPU that multiplies   Packed: in blocks, for oneDNN's kernel
                it natively
    int8        CPU with VNNI         Int8Rows: the same; rows of x become 8 bit numbers, too
                CUDA                  Int8Cuda: as it is, for cuBLAS; rows of x become 8 bit numbers, too
                others                Int8: as it is
    int4        CPU, CUDA             Int4, Int4Cuda: for PyTorch's kernels; unpacked to multiply many rows

Of the first, and of int8 and int4 on the CPU, native.c multiplies a few rows where it can (`few`), from what is packed so.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from . import native, widened
from .errors import DeviceError
from .quantize import Quantized

FEW, FEW_CUDA = 96, 128  # rows up to which reading small numbers anew for each is faster than unpacking them once
LEAST = 4  # rows: for fewer oneDNN takes slower kernels (on Zen 4 by a third), and for one row one that rounds otherwise


class Kernel:
    """A weight (out, in) in a form of its own, which multiplies x (..., in) to (..., out)."""

    kind: str | None = None  # of quantization
    least = 1  # rows it multiplies; fewer cost as much, and the time to fill them up
    few: native.Few | None = None  # what multiplies a few rows, where there is something faster

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out)."""
        if x.requires_grad and torch.is_grad_enabled():  # which the kernels have no derivative for
            return F.linear(x, self.dense())
        x = x.contiguous()
        if x.ndim == 2:
            return self.multiply(x)
        y = self.multiply(x.view(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])

    __call__ = product  # PyTorch 2.6 compiles anew for each object that is called, but not for each whose method is

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, in) -> (N, out)."""
        raise NotImplementedError

    def held(self) -> torch.Tensor | Quantized:
        """What `pack` was given."""
        raise NotImplementedError

    def dense(self) -> torch.Tensor:
        held = self.held()
        return held.dense() if isinstance(held, Quantized) else held

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as what it was made from: the form is this machine's."""
        return pack, (self.held(),)


class Packed(Kernel):
    def __init__(self, weight: torch.Tensor) -> None:
        self.blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        few = native.Few.bf16(self.blocks, weight.detach())
        self.few = few and few.agreeing(self.multiply)
        self.least = 1 if self.few else LEAST

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self.few and self.few.takes(x):
            return self.few(x)
        if len(x) < LEAST:
            return self.multiply(F.pad(x, (0, 0, 0, LEAST - len(x))))[: len(x)]
        return torch.ops.mkldnn._linear_pointwise(x, self.blocks, None, "none", [], "")

    def held(self) -> torch.Tensor:
        return self.blocks.to_dense()


class Int8(Kernel):
    """q as it is: multiplied by the CPU's kernel for few rows, else made a weight, which on a GPU a compiler may fuse."""

    kind = "int8"

    def __init__(self, weight: Quantized) -> None:
        self.weight, self.scale = weight, weight.scale.flatten().to(weight.dtype)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        # The CPU's kernel reads beyond the end of widths that are no multiple of 16.
        q, scale = self.weight.q, self.scale.unsqueeze(1)
        if x.is_cpu and len(x) <= FEW and not any(size % 32 for size in q.shape):
            return torch.ops.aten._weight_int8pack_mm(x, q, self.scale)
        if x.is_cpu and not torch.compiler.is_compiling():

            def piece(out: slice, buffer: torch.Tensor) -> torch.Tensor:
                return buffer.copy_(q[out].view_as(buffer)).mul_(scale[out].view(len(buffer), -1, 1)).transpose(1, 2)

            return widened.by_pieces(x, len(q), piece)
        return F.linear(x, q.to(x.dtype) * scale)  # scaled last, float16 would overflow

    def held(self) -> Quantized:
        return self.weight


@functools.cache
def exact_in_8_bits() -> bool:
    """Whether oneDNN sums products of 8 bits exactly: without VNNI, or kept from it by ONEDNN_MAX_CPU_ISA, it overflows."""
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()):
        return False
    with torch.device("cpu"):
        q, scale = torch.full((64, 64), 127, dtype=torch.int8), torch.ones(64, 1, dtype=torch.float32)
        x = torch.full((4, 64), 126, dtype=torch.float32)
        return bool((Int8Rows(Quantized("int8", q, scale, None, 64, x.dtype)).multiply(x) == 126 * 127 * 64).all())


def rounded(value: float, dtype: torch.dtype) -> float:
    """A quotient of two numbers of this dtype, rounded as PyTorch rounds it: to float32's 24 bits, then to bfloat16's 8."""
    for bits in (24, 8) if dtype == torch.bfloat16 else (24,):
        if math.isfinite(value):
            part, exponent = math.frexp(value)
            value = math.ldexp(round(part * (1 << bits)), exponent - bits)
    return value


def largest_of_rows(x: torch.Tensor) -> torch.Tensor:
    """(N, in) -> (N, 1)."""
    return torch.linalg.vector_norm(x, torch.inf, 1, keepdim=True)


def in_8_bits(
    x: torch.Tensor, largest_of_all: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows x (N, in) as float32 numbers -126..126, yet to be rounded, and what they are to be multiplied by, (N, 1)."""
    largest = largest_of_rows(x)
    scales = ((largest_of_all(largest) if largest_of_all else largest) / 126).clamp_(min=1e-30)
    return x.float() * scales.float().reciprocal(), scales


class Int8Rows(Kernel):
    """Each row of x becomes whole numbers -126..126, too, so that 8 bit numbers are multiplied and summed exactly.

    A row's scale is its largest number over 126, rounded to x's dtype: the same however many rows there are.
    """

    kind = "int8"

    def __init__(self, weight: Quantized) -> None:
        self.blocks = torch.ops.onednn.qlinear_prepack(weight.q.contiguous(), None)  # else it is misread
        self.scale, self.dtype = weight.scale.flatten(), weight.dtype
        self.zero = torch.zeros_like(self.scale, dtype=torch.int64)
        self.out = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
        if self.dtype == torch.bfloat16:
            few = native.Few.int8(self.blocks, weight.q, self.scale)
            self.few = few and few.agreeing(self.multiply)

    def multiply(self, x: torch.Tensor, largest_of_all: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        """`largest_of_all`: from the largest number of each row here, (N, 1), that of the whole row, where this is a part."""
        if self.few and self.few.takes(x):
            return self.few(x, largest_of_all(largest_of_rows(x)) if largest_of_all else None)
        if x.dtype == torch.float16:  # whose least numbers are too large for scales
            x = x.float()
        scales: torch.Tensor | float
        if x.shape[0] == 1 and largest_of_all is None:  # the same by plain numbers, with fewer small kernels
            scales = rounded(max(x.abs().max().item() / 126, 1e-30), x.dtype)
            x = x.float() * (1 / scales)
        else:
            x, scales = in_8_bits(x, largest_of_all)
        # Unsigned with a zero point of 128: signed rows take a slow path. Cutting after + 128.5 is rounding.
        n = len(x)
        rows = torch.empty(max(n, LEAST), x.shape[1], dtype=torch.uint8, device="cpu")
        rows[:n].copy_(x.add_(128.5))
        weight = self.blocks, self.scale, self.zero
        y = torch.ops.onednn.qlinear_pointwise(rows, 1.0, 128, *weight, None, 1.0, 0, self.out, "none", [], "")
        return y[:n].mul_(scales).to(self.dtype)  # scales of another dtype would take ten times as long

    def held(self) -> Quantized:
        q = self.blocks.to_dense().t().contiguous()
        return Quantized("int8", q, self.scale.unsqueeze(1), None, q.shape[1], self.dtype)


class Int8Cuda(Kernel):
    """As Int8Rows, but that ranks scale their own parts of rows, by cuBLAS: which multiplies many rows as fast as in bfloat16,
    and of few reads weights at 85% of the best kernel's rate. Rounding the rows takes many small kernels: a single row that
    is compiled is not rounded, and all of its product is one kernel."""

    kind = "int8"

    def __init__(self, weight: Quantized) -> None:
        self.weight, self.scale = weight, weight.scale.flatten()

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        q, n, dtype = self.weight.q, len(x), self.weight.dtype
        if n == 1 and torch.compiler.is_compiling():
            return ((x.float() * q.float()).sum(1) * self.scale).to(dtype).unsqueeze(0)
        x, scales = in_8_bits(x.float() if dtype == torch.float16 else x)
        rows = x.new_zeros(max(n, 32), x.shape[1], dtype=torch.int8)  # PyTorch asks for 17 or more
        rows[:n] = x.add_(128.5).floor_().sub_(128)
        y = x.new_empty(n, len(q), dtype=torch.float32 if dtype == torch.float16 else dtype)
        torch.mul(torch._int_mm(rows, q.t())[:n], self.scale, out=y)  # in float32, yet nothing of it stays in memory
        return y.mul_(scales).to(dtype)

    def held(self) -> Quantized:
        return self.weight

    @staticmethod
    def serves(weight: Quantized) -> bool:
        return not any(size % 8 for size in weight.q.shape) and torch.cuda.get_device_capability(weight.device) >= (7, 5)


class _Int4(Kernel):
    """Groups of inputs with a scale and a zero each, (groups, out, 2)."""

    kind = "int4"

    def __init__(self, weight: Quantized, multiple: int) -> None:
        self.in_features, self.out_features, self.group = weight.in_features, len(weight.q), weight.group
        q = F.pad(weight.q, (0, 0, 0, -len(weight.q) % multiple))
        assert weight.zero is not None
        scales = torch.stack((weight.scale, weight.zero), dim=-1).transpose(0, 1).to(weight.dtype)
        self.scales = F.pad(scales, (0, 0, 0, len(q) - self.out_features)).contiguous()
        step = max(1, widened.PIECE // q.shape[1] // multiple) * multiple
        self.blocks = torch.cat([self._pack(q[i : i + step]) for i in range(0, len(q), step)])
        self.more_in = q.shape[1] - self.in_features
        self.plain = self.more_in == 0 and len(q) == self.out_features

    def _pack(self, q: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _product(self, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """By the widths that the kernel needs."""
        y = self._product(F.pad(x, (0, self.more_in)) if self.more_in else x, self.scales.flatten(1, -2))
        return y if self.plain else y[:, : self.out_features]

    def held(self) -> Quantized:
        """The numbers as the kernel sees them: what it makes of unit rows, with scales of 1 and zeros of 0."""
        scales = self.scales.flatten(1, -2)
        ones = torch.zeros_like(scales, dtype=torch.bfloat16)
        ones[..., 0] = 1
        width = self.group * len(scales)
        q = []
        for i in range(0, width, self.group):
            unit = ones.new_zeros(self.group, width)
            unit[:, i : i + self.group].fill_diagonal_(1)
            q.append(self._product(unit, ones)[:, : self.out_features].to(torch.int8))
        scale, zero = scales[:, : self.out_features].transpose(0, 1).bfloat16().unbind(-1)
        return Quantized("int4", torch.cat(q).t().contiguous(), scale, zero, self.in_features, self.scales.dtype)


class Int4(_Int4):
    def __init__(self, weight: Quantized) -> None:
        super().__init__(weight, 64)
        if not self.more_in and _half_a_block() == 32:
            self.few = native.Few.int4(self.blocks, self.scales, self.in_features, self.out_features)
            if self.few:  # nothing is held twice
                self.blocks, scales = self.few.kept
                self.scales = scales.transpose(0, 1)  # (groups, out / 64, 64, 2)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self.few and self.few.takes(x):
            return self.few(x)
        if self.plain and x.dtype == torch.bfloat16 and x.shape[0] <= FEW:  # at once: it is called for each weight of a step
            return torch._weight_int4pack_mm_for_cpu(x, self.blocks, self.group, self.scales.flatten(1, -2))
        return super().multiply(x)

    def _pack(self, q: torch.Tensor) -> torch.Tensor:
        return _pack_int4(q)

    def _product(self, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        few = x.dtype == torch.bfloat16 and x.shape[0] <= FEW  # in float32 the kernel is ten times slower
        half = None if few or torch.compiler.is_compiling() else _half_a_block()
        if not half:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.blocks, self.group, scales)
        scale, zero = scales.unbind(-1)  # (groups, out)

        def piece(out: slice, buffer: torch.Tensor) -> torch.Tensor:
            parts, n, width = buffer.shape
            q = _unpack_int4(self.blocks[out], half, buffer).view(parts, -1, self.group, n)
            # Both (parts, groups, 1, n).
            a, b = (s[:, out].unflatten(1, (parts, 1, n)).transpose(0, 1).to(q.dtype).contiguous() for s in (scale, zero))
            return torch.addcmul(b, q, a, out=q).view(parts, width, n)

        return widened.by_pieces(x, len(self.blocks), piece)


def _pack_int4(q: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int() + 8, 1)


def _unpack_int4(blocks: torch.Tensor, half: int, buffer: torch.Tensor) -> torch.Tensor:
    """The weights (parts * n, in) that PyTorch packed, as (parts, in, n), in a buffer (parts, n, in): a block is 2 * half
    outputs by all inputs, and a byte holds outputs i and i + half of an input."""
    parts, n, width = buffer.shape
    pairs = blocks.view(parts, n // (2 * half), width, half).transpose(1, 2)  # (parts, in, n / block, half)
    q = buffer.view(*pairs.shape[:3], 2, half)
    q[..., 0, :], q[..., 1, :] = (pairs & 15).view(torch.int8) - 8, (pairs >> 4).view(torch.int8) - 8
    return buffer.view(parts, width, n)


@functools.cache
def _half_a_block() -> int | None:
    """32 with AVX-512, 16 with AVX2; None: this machine's PyTorch packs in a way of its own. It is no public format."""
    with torch.device("cpu"):
        q = ((torch.arange(128 * 64).view(128, 64) * 2654435761 >> 7) % 16 - 8).to(torch.float32)
        blocks = _pack_int4(q.to(torch.int8))
        for half in (32, 16):
            if blocks.shape == (128, 32) and torch.equal(_unpack_int4(blocks, half, torch.empty_like(q)[None])[0].t(), q):
                return half
    return None


class Int4Cuda(_Int4):
    def __init__(self, weight: Quantized) -> None:
        super().__init__(weight, 8)

    def _pack(self, q: torch.Tensor) -> torch.Tensor:
        return _pack_int4_cuda(q)

    def _product(self, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        many = len(x) > FEW_CUDA and not torch.compiler.is_compiling()
        if many and _known_to_unpack(self.blocks.shape[3], self.blocks.device):
            scale, zero = scales.transpose(0, 1).unsqueeze(3).unbind(2)  # (out, groups, 1)
            q = _unpack_int4_cuda(self.blocks, x.dtype).unflatten(1, (len(scales), -1))
            return F.linear(x, torch.addcmul(zero, q, scale, out=q).flatten(1))
        return torch.ops.aten._weight_int4pack_mm(x.contiguous(), self.blocks, self.group, scales)


def _pack_int4_cuda(q: torch.Tensor) -> torch.Tensor:
    unsigned = (q + 8).to(torch.uint8)
    tiles = next(n for n in (8, 4, 2) if q.shape[1] % (16 * n) == 0)
    return torch.ops.aten._convert_weight_to_int4pack(unsigned[:, ::2] << 4 | unsigned[:, 1::2], tiles)


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
def _known_to_unpack(half_tiles: int, device: torch.device) -> bool:
    """Whether this machine's PyTorch packs so: it is no public format."""
    q = ((torch.arange(16 * 96 * half_tiles, device=device).view(16, -1) * 2654435761 >> 7) % 16 - 8).to(torch.int8)
    blocks = _pack_int4_cuda(q)
    return blocks.shape[2:] == (32, half_tiles) and torch.equal(_unpack_int4_cuda(blocks, q.dtype), q)


def pack(weight: torch.Tensor | Quantized) -> Kernel | None:
    """The form that multiplies (..., in) to (..., out) fastest, for a weight (out, in); None: the weight as it is."""
    on_cpu, dtype = weight.device.type == "cpu", weight.dtype
    if isinstance(weight, Quantized):
        check(weight.kind, weight.device, dtype)
        if weight.kind == "int4":
            return Int4(weight) if on_cpu else Int4Cuda(weight)
        if weight.device.type == "cuda" and Int8Cuda.serves(weight):
            return Int8Cuda(weight)
        return Int8Rows(weight) if on_cpu and exact_in_8_bits() else Int8(weight)
    if not on_cpu or dtype != torch.bfloat16 or weight.nbytes < widened.SMALLEST:
        return None
    return Packed(weight) if widened.native(dtype) else None


def check(kind: str, device: torch.device, dtype: torch.dtype) -> None:
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
