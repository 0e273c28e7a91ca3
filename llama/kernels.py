"""How a weight is held so that multiplying by it reads it as one stream.

A parallel layer gives its weight to `pack` once, when it is loaded. Where there is nothing better than the weight itself
and `widened.linear`, it gets None.

    weight      device                        form
    bfloat16    CPU that multiplies it        BlockedLinear (blocks.py): products.c; without a C compiler Packed: oneDNN
    int8        CPU with AVX-512 or AVX2      BlockedLinear: products.c, avx2.c
                CUDA, one scale per row       Int8Cuda: as it is, for cuBLAS
                others                        Int8: as it is, dequantized for each product
    int4        CPU with AVX-512 or AVX2      BlockedLinear
                other CPUs, CUDA              int4.py's
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from . import widened
from .blocks import STEP, BlockedLinear, Blocks, library_for
from .errors import DeviceError
from .int4 import Int4, Int4Cuda
from .kernel import Kernel
from .library import NUMBERS
from .quantize import Quantized, group_of

AT_ONCE = 512  # rows that Int8Cuda rounds at a time: what it makes on the way stays small
LEAST = 4  # rows: for fewer oneDNN takes slower kernels (on Zen 4 by a third), and for one row one that rounds otherwise


class Packed(Kernel):
    def __init__(self, weight: torch.Tensor) -> None:
        self.blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach())

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.blocks.dtype)  # as in Int4
        if len(x) < LEAST:
            return self.multiply(F.pad(x, (0, 0, 0, LEAST - len(x))))[: len(x)]
        return torch.ops.mkldnn._linear_pointwise(x, self.blocks, None, "none", [], "")

    def held(self) -> torch.Tensor:
        return self.blocks.to_dense()


class Int8(Kernel):
    """Keep q as it is, and dequantize it for each product: a piece at a time on the CPU; on a GPU a compiler may fuse it."""

    kind = "int8"

    def __init__(self, weight: Quantized) -> None:
        self.weight = weight

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        x = x.to(weight.dtype)
        if not x.is_cpu or torch.compiler.is_compiling() or weight.in_features != weight.q.shape[1]:
            return F.linear(x, weight.dense())
        groups = weight.scale.shape[1]

        def piece(out: slice, buffer: torch.Tensor) -> torch.Tensor:
            scale = weight.scale[out].view(len(buffer), -1, groups, 1).to(buffer.dtype)
            buffer.copy_(weight.q[out].view_as(buffer)).unflatten(2, (groups, -1)).mul_(scale)
            return buffer.transpose(1, 2)

        return widened.by_pieces(x, len(weight.q), piece)

    def held(self) -> Quantized:
        return self.weight


def in_two_digits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows x (N, in) as whole numbers of 15 bits, 128 * high + low, in int8 (2, N, in), and the scale of each row, (N, 1)."""
    scale = (torch.linalg.vector_norm(x, torch.inf, 1, keepdim=True) / 16256).clamp_(min=1e-30)  # 127 * 128
    whole = (x / scale).round_()
    high = (whole / 128).round_()
    return torch.stack((high, whole - 128 * high)).clamp_(-128, 127).to(torch.int8), scale


class Int8Cuda(Kernel):
    """One scale for each row of the weight; cuBLAS multiplies int8 by int8. Rows of x are rounded to 15 bits, so that values
    beside a large one lose no more than in groups of 8 bits. Rounding the rows takes many small kernels: a single
    row that is compiled is not rounded, and all of its product is one kernel."""

    kind = "int8"

    def __init__(self, weight: Quantized) -> None:
        self.weight, self.scale = weight, weight.scale.flatten().float()

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        q, n, dtype = self.weight.q, len(x), self.weight.dtype
        if n == 1 and torch.compiler.is_compiling():
            return ((x.float() * q.float()).sum(1) * self.scale).to(dtype).unsqueeze(0)
        if n > AT_ONCE:
            return torch.cat([self.multiply(rows) for rows in x.split(AT_ONCE)])
        digits, scales = in_two_digits(x.float())
        rows = q.new_zeros(max(2 * n, 32), x.shape[1])  # PyTorch asks for 17 or more
        rows[: 2 * n] = digits.flatten(0, 1)
        high, low = torch._int_mm(rows, q.t())[: 2 * n].float().view(2, n, len(q))
        return (high.mul_(128).add_(low).mul_(self.scale).mul_(scales)).to(dtype)

    def held(self) -> Quantized:
        return self.weight

    @staticmethod
    def serves(weight: Quantized) -> bool:
        fits = weight.scale.shape[1] == 1 and not any(size % 8 for size in weight.q.shape)
        return fits and torch.cuda.get_device_capability(weight.device) >= (7, 5)


def blocked(kind: str | None, weight: torch.Tensor | Quantized, in_features: int) -> bool:
    """Tell whether a weight is to be held in blocks once it is of this kind; None means bfloat16."""
    if weight.device.type != "cpu" or weight.dtype not in NUMBERS or library_for(kind or "bfloat16") is None:
        return False
    return kind is not None or (weight.dtype == torch.bfloat16 and in_features % 2 == 0)


def pack_rows(
    kind: str | None, views: Sequence[torch.Tensor], dtype: torch.dtype, width: int, first: int, last: int
) -> Kernel | None:
    """Pack the inputs first..last of rows of `width` inputs into blocks in one call of pack.c, quantized by groups of the whole
    row, or in bfloat16. The views are rows (outs, width), one after the other, or, if narrower, columns side by side.

    Return None where blocks do not serve; `pack` then chooses the form.
    """
    view, *others = views
    n = sum(map(len, views)) if view.shape[1] == width else len(view)
    big = kind is not None or n * (last - first) * 2 >= widened.SMALLEST
    alike = all(other.dtype == view.dtype for other in others)
    fits = dtype in NUMBERS and (kind is not None or dtype == view.dtype)
    if not (big and alike and fits) or not blocked(kind, view, last - first):
        return None
    group = group_of(width, kind) if kind else STEP
    begin, end = first // group * group, min(-(-last // group) * group, width)
    if view.shape[1] == width:
        rows = [v[:, begin:end] for v in views]
    else:
        starts = itertools.accumulate((v.shape[1] for v in views), initial=0)
        rows = [torch.cat([v[:, max(begin - at, 0) : max(end - at, 0)] for v, at in zip(views, starts, strict=False)], dim=1)]
    made = Blocks.of_rows(kind or "bfloat16", rows, group)
    return BlockedLinear(replace(made, in_features=last - first, front=first - begin), dtype)


def pack(weight: torch.Tensor | Quantized) -> Kernel | None:
    """The form that multiplies (..., in) to (..., out) fastest, for a weight (out, in); None: the weight as it is."""
    if isinstance(weight, Quantized):
        check(weight.kind, weight.device, weight.dtype)
        if blocked(weight.kind, weight, weight.in_features) and weight.group % STEP == 0:
            return BlockedLinear(Blocks.of_quantized(weight), weight.dtype)
        if weight.kind == "int4":
            return Int4(weight) if weight.device.type == "cpu" else Int4Cuda(weight)
        return Int8Cuda(weight) if weight.device.type == "cuda" and Int8Cuda.serves(weight) else Int8(weight)
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or weight.nbytes < widened.SMALLEST:
        return None
    made = pack_rows(None, [weight.detach()], weight.dtype, weight.shape[1], 0, weight.shape[1])
    return made or (Packed(weight) if widened.native(weight.dtype) else None)


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
