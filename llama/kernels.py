"""How a weight is held so that multiplying by it reads it as one stream.

A parallel layer gives its weight to `pack` once, when it is loaded. Where there is nothing better than the weight itself
and `widened.linear`, it gets None.

    weight      device                form
    bfloat16    CPU that multiplies   Packed: in blocks, for oneDNN's kernel
                it natively
    int8        CPU with VNNI         Int8Rows: the same; rows of x become 8 bit numbers, too
                CUDA                  Int8Cuda: as it is, for cuBLAS; rows of x become 8 bit numbers, too
                others                Int8: as it is; avx2.c multiplies a few rows
    int4        CPU, CUDA             int4.py's

Of the first, and of Int8Rows and Int4, native.c multiplies a few rows where it can (`few`), from what is packed so.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from . import avx2, native, widened
from .errors import DeviceError
from .int4 import FEW, Int4, Int4Cuda, Int4Rows
from .kernel import Kernel
from .quantize import Quantized

LEAST = 4  # rows: for fewer oneDNN takes slower kernels (on Zen 4 by a third), and for one row one that rounds otherwise


class Packed(Kernel):
    def __init__(self, weight: torch.Tensor) -> None:
        self.blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        few = native.Few.bf16(self.blocks, weight.detach())
        self.few = few and few.agreeing(self.multiply, weight.detach())
        self.least = 1 if self.few else LEAST

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self.few and self.few.takes(x):
            return self.few(x)
        x = x.to(self.blocks.dtype)  # as in Int4
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
        q, scale = self.weight.q, self.scale.unsqueeze(1)
        if avx2.takes(x, q):
            return avx2.multiply(x, q, self.weight.scale)
        # PyTorch's kernel reads beyond the end of widths that are no multiple of 16.
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
            self.few = few and few.agreeing(self.multiply, weight.q)

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


def pack(weight: torch.Tensor | Quantized) -> Kernel | None:
    """The form that multiplies (..., in) to (..., out) fastest, for a weight (out, in); None: the weight as it is."""
    on_cpu, dtype = weight.device.type == "cpu", weight.dtype
    if isinstance(weight, Quantized):
        check(weight.kind, weight.device, dtype)
        if weight.kind == "int4":
            if not on_cpu:
                return Int4Cuda(weight)
            return Int4Rows(weight) if Int4Rows.serves(weight) else Int4(weight)
        if weight.device.type == "cuda" and Int8Cuda.serves(weight):
            return Int8Cuda(weight)
        return Int8Rows(weight) if on_cpu and exact_in_8_bits() else Int8(weight)
    if not on_cpu or dtype != torch.bfloat16 or weight.nbytes < widened.SMALLEST:
        return None
    return Packed(weight) if widened.native(dtype) else None


def repacked(held: torch.Tensor | Quantized) -> Kernel | torch.Tensor | Quantized:
    """`pack`, of what came from a machine that may have had a form where this one has none."""
    return pack(held) or held


Kernel.again = staticmethod(repacked)


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
