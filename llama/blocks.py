"""Weights in the blocks that products.c and avx2.c multiply, whatever the number of rows.

A weight (out, in) is stored as bytes (out / 64, in / per, 64, 4): for each 64 outputs, and each `per` inputs, 4 bytes for
every output, one output after the other. Those 4 bytes hold `per` inputs:

    bfloat16    2
    int8        4, each 128 more than its value
    int4        8, each 8 more than its value; inputs 0..3 in the low halves of the bytes, 4..7 in the high ones

and each group of inputs has scales (out / 64, groups, 64, 1), in int4 scales and zeros (out / 64, groups, 64, 2). x is padded
with zeros for inputs beyond the weight's own, and outputs beyond its own are not stored. Saved files hold blocks, too.
"""

import ctypes
import itertools
from collections.abc import Sequence
from ctypes import c_long, c_void_p
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from . import avx2, library, native
from .kernel import Kernel
from .library import BF16, INT4, INT8, NUMBERS, Product, fields, filled, load
from .pages import HUGE_PAGES
from .quantize import Quantized

OUT = 64  # outputs of a block
STEP = 32  # inputs of x that share a scale
# 8-bit values for each activation in narrow rows: rounding hurts small models most, and a second digit costs them least.
NARROW_DIGITS = 2
PER = {"bfloat16": 2, "int8": 4, "int4": 8}  # inputs in 4 bytes
KINDS = {"bfloat16": BF16, "int8": INT8, "int4": INT4}


class Packing(ctypes.Structure):
    """pack.c explains it."""

    _fields_ = fields((c_long, "kind numbers"), (c_void_p, "rows weight scales"), (c_long, "group in_ width out next"))


PACK = load("pack", [Packing], {"pack": [Packing]})


def library_for(kind: str) -> library.Library | None:
    """What multiplies blocks of this kind on this machine."""
    if PACK is None:
        return None
    return native.COMPILED or (avx2.LIBRARY if kind != "bfloat16" else None)


@dataclass(frozen=True)
class Blocks:
    """A weight (out_features, in_features) in blocks; the first group begins with `front` inputs that are not the weight's."""

    kind: str  # "bfloat16", "int8" or "int4"
    weight: torch.Tensor  # uint8
    scales: torch.Tensor | None  # bfloat16; None in bfloat16
    in_features: int
    out_features: int
    front: int = 0

    @property
    def width(self) -> int:
        """Inputs, with what is beyond the weight's own."""
        return self.weight.shape[1] * PER[self.kind]

    @property
    def group(self) -> int:
        return self.width // self.scales.shape[1] if self.scales is not None else STEP

    @staticmethod
    def shapes(kind: str, out_features: int, in_features: int, group: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """Of `weight` and of `scales`."""
        n, width = -(-out_features // OUT), -(-in_features // group) * group
        scales = None if kind == "bfloat16" else (n, width // group, OUT, 2 if kind == "int4" else 1)
        return (n, width // PER[kind], OUT, 4), scales

    @staticmethod
    def room(kind: str, out_features: int, in_features: int, group: int) -> "Blocks":
        """Allocate blocks to be filled, next to those allocated before (huge pages)."""
        weight, scales = Blocks.shapes(kind, out_features, in_features, group)
        room = HUGE_PAGES.room(*weight, dtype=torch.uint8)
        scaled = HUGE_PAGES.room(*scales, dtype=torch.bfloat16) if scales else None
        return Blocks(kind, room, scaled, in_features, out_features)

    @staticmethod
    def of_rows(kind: str, views: Sequence[torch.Tensor], group: int) -> "Blocks":
        """The rows of all the views (outs, in), one view after the other, quantized by groups unless kind is bfloat16."""
        assert PACK is not None
        numbers = BF16 if kind == "bfloat16" else NUMBERS.get(views[0].dtype)
        if any(NUMBERS.get(v.dtype) != numbers or v.shape[1] != views[0].shape[1] or not v.is_cpu for v in views):
            raise ValueError(f"rows of {[v.dtype for v in views]} do not make blocks of {kind}")  # C would read beyond them
        views = [v if v.stride(1) == 1 else v.contiguous() for v in views]
        made = Blocks.room(kind, sum(map(len, views)), views[0].shape[1], group)
        rows = torch.cat([v.data_ptr() + torch.arange(len(v), device="cpu") * (v.stride(0) * v.element_size()) for v in views])
        fields = {"kind": KINDS[kind], "numbers": numbers, "rows": rows, "weight": made.weight}
        sizes = {"group": group, "in_": made.in_features, "width": made.width, "out": made.out_features}
        PACK.call("pack", ctypes.byref(filled(Packing(), scales=made.scales, **fields, **sizes)))
        return made

    @staticmethod
    def of_quantized(held: Quantized) -> "Blocks":
        """Put a quantized weight into blocks with PyTorch alone, as pack.c does; also one that was quantized elsewhere."""
        q = F.pad(held.q, (0, 0, 0, -len(held.q) % OUT)).unflatten(0, (-1, OUT))  # (blocks, 64, width)
        beyond = (0, 0, 0, -len(held.q) % OUT)
        parts = [F.pad(held.scale, beyond, value=1e-30)] + ([] if held.zero is None else [F.pad(held.zero, beyond)])
        scales = torch.stack(parts, -1).bfloat16()
        if held.kind == "int8":
            values = (q.to(torch.int16) + 128).to(torch.uint8).unflatten(2, (-1, 4))
        else:
            halves = (q + 8).view(torch.uint8).unflatten(2, (-1, 2, 4))
            values = halves[..., 0, :] | halves[..., 1, :] << 4
        weight = values.transpose(1, 2).contiguous()  # (n, width / per, 64, 4)
        scales = scales.unflatten(0, (-1, OUT)).transpose(1, 2).contiguous()
        return Blocks(held.kind, weight, scales, held.in_features, len(held.q), held.front)

    @staticmethod
    def of_dense(weight: torch.Tensor) -> "Blocks":
        """In bfloat16, by PyTorch alone."""
        rows = F.pad(weight.bfloat16(), (0, -weight.shape[1] % STEP, 0, -len(weight) % OUT)).unflatten(0, (-1, OUT))
        blocks = rows.view(torch.uint8).unflatten(2, (-1, 4)).transpose(1, 2).contiguous()
        return Blocks("bfloat16", blocks, None, weight.shape[1], len(weight))

    @staticmethod
    def joined(parts: "Sequence[Blocks]") -> "Blocks | None":
        """Copy all parts into one, one after the other; None if one before the last has outputs that are no multiple of 64."""
        first, ends = parts[0], itertools.accumulate(len(part.weight) for part in parts)
        if any(part.out_features % OUT for part in parts[:-1]):
            return None
        n = sum(part.out_features for part in parts)
        made = replace(Blocks.room(first.kind, n, first.width, first.group), in_features=first.in_features, front=first.front)
        for part, end in zip(parts, ends, strict=True):
            made.weight[end - len(part.weight) : end].copy_(part.weight)
            if made.scales is not None and part.scales is not None:
                made.scales[end - len(part.weight) : end].copy_(part.scales)
        return made

    def quantized(self, dtype: torch.dtype) -> Quantized:
        """Return the values (out, width) and their scales: whole groups, with the inputs before and after the weight's own."""
        assert self.scales is not None
        rows, n = self.weight.transpose(1, 2), self.out_features  # (blocks, 64, width / per, 4)
        if self.kind == "int8":
            q = (rows.to(torch.int16) - 128).to(torch.int8)
        else:
            q = torch.stack((rows & 15, rows >> 4), -2).view(torch.int8) - 8
        parts = [part.transpose(1, 2).flatten(0, 1)[:n] for part in self.scales.unbind(-1)]
        zero = parts[1] if self.kind == "int4" else None
        return Quantized(self.kind, q.flatten(2).flatten(0, 1)[:n], parts[0], zero, self.in_features, dtype, self.front)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """(out, in), as what it stands for."""
        if self.kind == "bfloat16":
            rows = self.weight.view(torch.bfloat16).transpose(1, 2).flatten(2).flatten(0, 1)[: self.out_features]
            return rows[:, self.front : self.front + self.in_features].to(dtype).contiguous()
        return self.quantized(dtype).dense()

    def outputs(self, first: int, last: int) -> "Blocks":
        """The outputs first..last alone, of which the first begins a block."""
        blocks = slice(first // OUT, -(-last // OUT))
        scales = None if self.scales is None else self.scales[blocks]
        return replace(self, weight=self.weight[blocks], scales=scales, out_features=last - first)

    def inputs(self, first: int, last: int) -> "Blocks":
        """The inputs first..last alone: whole groups that hold them, of which the first has `front` others before them."""
        unit = self.group
        begin, end = first // unit, -(-last // unit)
        weight = self.weight[:, begin * unit // PER[self.kind] : end * unit // PER[self.kind]].contiguous()
        scales = None if self.scales is None else self.scales[:, begin:end].contiguous()
        return replace(self, weight=weight, scales=scales, in_features=last - first, front=first - begin * unit)


class BlockedLinear(Kernel):
    """Multiply by a weight in blocks. If the weight is quantized, so are the rows of x: to 8 bits, with a scale for each 32
    inputs, and with `digits` 2 also what is left, to 8 more."""

    def __init__(self, blocks: Blocks, dtype: torch.dtype) -> None:
        self.blocks, self.dtype, self.out_dtype = blocks, dtype, dtype
        self.kind = None if blocks.kind == "bfloat16" else blocks.kind
        self.digits = NARROW_DIGITS if self.kind and blocks.group == STEP else 1
        self.in_features, self.out_features = blocks.in_features, blocks.out_features
        self.padding = (blocks.front, blocks.width - blocks.front - blocks.in_features)
        found = library_for(blocks.kind)
        assert found is not None
        self.library = found
        self.product_of = filled(
            Product(),
            kind=KINDS[blocks.kind],
            numbers=NUMBERS[dtype],
            y_numbers=NUMBERS[dtype],
            weight=blocks.weight,
            scales=blocks.scales,
            group=blocks.group,
            in_=blocks.width,
            out=self.out_features,
        )

    def for_logits(self) -> None:
        if self.kind:
            self.digits = 2
            self.out_dtype = torch.float32
            filled(self.product_of, y_numbers=NUMBERS[self.out_dtype])

    def part(self, first: int, last: int) -> "BlockedLinear | None":
        if first % OUT:
            return None
        made = BlockedLinear(self.blocks.outputs(first, last), self.dtype)
        made.digits = self.digits
        return made

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.dtype)  # a caller's autocast gives attention's outputs another
        if x.shape[1] != self.in_features or not library.plain(
            x
        ):  # which raises the error for a wrong width, and can be traced
            return F.linear(x, self.dense())
        x = F.pad(x, self.padding) if any(self.padding) else x.contiguous()
        y = x.new_empty(len(x), self.out_features, dtype=self.out_dtype)
        room = torch.empty(self.room(len(x)), dtype=torch.uint8, device="cpu")
        if len(x):
            self.library.call("multiply", ctypes.byref(self.filled(len(x), x=x, y=y, room=room)))
        return y

    def swiglu(self, x: torch.Tensor) -> torch.Tensor | None:
        half, plain = self.out_features // 2, library.plain(x) and not torch.is_grad_enabled()
        fits = x.ndim == 2 and x.shape[1] == self.in_features and x.dtype == self.dtype == torch.bfloat16 and len(x)
        if self.library is not native.COMPILED or not plain or not fits or half % OUT or any(self.padding):
            return None
        x, y = x.contiguous(), x.new_empty(len(x), half)
        room = torch.empty(self.room(len(x)), dtype=torch.uint8, device="cpu")
        self.library.call("multiply", ctypes.byref(self.filled(len(x), x=x, y=y, room=room, gated=1, out=half)))
        return y

    def filled(self, n: int, **fields: object) -> Product:
        """The product of n rows, with more of its fields set."""
        return filled(Product.from_buffer_copy(self.product_of), n=n * self.digits, digits=self.digits, **fields)

    def room(self, n: int) -> int:
        """Bytes that n rows need: their 8-bit values, scales, and sums."""
        width = self.blocks.width
        return n * self.digits * (width + 12 * width // STEP) if self.kind else 0

    def held(self) -> torch.Tensor | Quantized:
        return self.blocks.quantized(self.dtype) if self.kind else self.dense()

    def dense(self) -> torch.Tensor:
        return self.blocks.dense(self.dtype)
