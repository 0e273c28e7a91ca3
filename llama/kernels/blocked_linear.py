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
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..quantization.weight import QuantizedWeight
from . import avx2, avx512, c_extension, pack
from .base import LinearKernel
from .c_extension import BF16, DTYPE_CODES, INT4, INT8, LinearArgs, fill_struct
from .host_memory import HUGE_PAGES

BLOCK_OUTPUTS = 64  # outputs of a block
ACTIVATION_GROUP = 32  # inputs of x that share a scale
# 8-bit values for each activation in narrow rows: rounding hurts small models most, and a second digit costs them least.
NARROW_DIGITS = 2
INPUTS_PER_WORD = {"bfloat16": 2, "int8": 4, "int4": 8}  # inputs in 4 bytes
FORMAT_CODES = {"bfloat16": BF16, "int8": INT8, "int4": INT4}


def extension_for(kind: str) -> c_extension.CExtension | None:
    """What multiplies blocks of this kind on this machine."""
    if pack.extension() is None:
        return None
    return avx512.extension() or (avx2.extension() if kind != "bfloat16" else None)


@dataclass(frozen=True)
class BlockedWeight:
    """A weight (out_features, in_features) in blocks; the first group begins with `front` inputs that are not the weight's."""

    format: str  # "bfloat16", "int8" or "int4"
    weight: torch.Tensor  # uint8
    scales: torch.Tensor | None  # bfloat16; None in bfloat16
    in_features: int
    out_features: int
    front: int = 0

    @property
    def width(self) -> int:
        """Inputs, with what is beyond the weight's own."""
        return self.weight.shape[1] * INPUTS_PER_WORD[self.format]

    @property
    def group_size(self) -> int:
        return self.width // self.scales.shape[1] if self.scales is not None else ACTIVATION_GROUP

    @staticmethod
    def shapes(kind: str, out_features: int, in_features: int, group: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """Of `weight` and of `scales`."""
        n, width = -(-out_features // BLOCK_OUTPUTS), -(-in_features // group) * group
        scales = None if kind == "bfloat16" else (n, width // group, BLOCK_OUTPUTS, 2 if kind == "int4" else 1)
        return (n, width // INPUTS_PER_WORD[kind], BLOCK_OUTPUTS, 4), scales

    @staticmethod
    def allocate(kind: str, out_features: int, in_features: int, group: int) -> "BlockedWeight":
        """Allocate blocks to be filled, next to those allocated before (huge pages)."""
        weight, scales = BlockedWeight.shapes(kind, out_features, in_features, group)
        room = HUGE_PAGES.empty(*weight, dtype=torch.uint8)
        scaled = HUGE_PAGES.empty(*scales, dtype=torch.bfloat16) if scales else None
        return BlockedWeight(kind, room, scaled, in_features, out_features)

    @staticmethod
    def from_rows(kind: str, views: Sequence[torch.Tensor], group: int) -> "BlockedWeight":
        """The rows of all the views (outs, in), one view after the other, quantized by groups unless kind is bfloat16."""
        compiled = pack.extension()
        assert compiled is not None
        numbers = BF16 if kind == "bfloat16" else DTYPE_CODES.get(views[0].dtype)
        if any(DTYPE_CODES.get(v.dtype) != numbers or v.shape[1] != views[0].shape[1] or not v.is_cpu for v in views):
            raise ValueError(f"rows of {[v.dtype for v in views]} do not make blocks of {kind}")  # C would read beyond them
        views = [v if v.stride(1) == 1 else v.contiguous() for v in views]
        made = BlockedWeight.allocate(kind, sum(map(len, views)), views[0].shape[1], group)
        rows = torch.cat([v.data_ptr() + torch.arange(len(v), device="cpu") * (v.stride(0) * v.element_size()) for v in views])
        fields = {"kind": FORMAT_CODES[kind], "numbers": numbers, "rows": rows, "weight": made.weight}
        sizes = {"group": group, "in_": made.in_features, "width": made.width, "out": made.out_features}
        compiled.call("pack", ctypes.byref(fill_struct(pack.PackArgs(), scales=made.scales, **fields, **sizes)))
        return made

    @staticmethod
    def from_quantized(held: QuantizedWeight) -> "BlockedWeight":
        """Put a quantized weight into blocks with PyTorch alone, as pack.c does; also one that was quantized elsewhere."""
        q = F.pad(held.values, (0, 0, 0, -len(held.values) % BLOCK_OUTPUTS)).unflatten(
            0, (-1, BLOCK_OUTPUTS)
        )  # (blocks, 64, width)
        beyond = (0, 0, 0, -len(held.values) % BLOCK_OUTPUTS)
        parts = [F.pad(held.scales, beyond, value=1e-30)] + ([] if held.zeros is None else [F.pad(held.zeros, beyond)])
        scales = torch.stack(parts, -1).bfloat16()
        if held.format == "int8":
            values = (q.to(torch.int16) + 128).to(torch.uint8).unflatten(2, (-1, 4))
        else:
            halves = (q + 8).view(torch.uint8).unflatten(2, (-1, 2, 4))
            values = halves[..., 0, :] | halves[..., 1, :] << 4
        weight = values.transpose(1, 2).contiguous()  # (n, width / per, 64, 4)
        scales = scales.unflatten(0, (-1, BLOCK_OUTPUTS)).transpose(1, 2).contiguous()
        return BlockedWeight(held.format, weight, scales, held.in_features, len(held.values), held.front)

    @staticmethod
    def from_dense(weight: torch.Tensor) -> "BlockedWeight":
        """In bfloat16, by PyTorch alone."""
        rows = F.pad(weight.bfloat16(), (0, -weight.shape[1] % ACTIVATION_GROUP, 0, -len(weight) % BLOCK_OUTPUTS)).unflatten(
            0, (-1, BLOCK_OUTPUTS)
        )
        blocks = rows.view(torch.uint8).unflatten(2, (-1, 4)).transpose(1, 2).contiguous()
        return BlockedWeight("bfloat16", blocks, None, weight.shape[1], len(weight))

    @staticmethod
    def cat(parts: "Sequence[BlockedWeight]") -> "BlockedWeight | None":
        """Copy all parts into one, one after the other; None if one before the last has outputs that are no multiple of 64."""
        first, ends = parts[0], itertools.accumulate(len(part.weight) for part in parts)
        if any(part.out_features % BLOCK_OUTPUTS for part in parts[:-1]):
            return None
        n = sum(part.out_features for part in parts)
        made = replace(
            BlockedWeight.allocate(first.format, n, first.width, first.group_size),
            in_features=first.in_features,
            front=first.front,
        )
        for part, end in zip(parts, ends, strict=True):
            made.weight[end - len(part.weight) : end].copy_(part.weight)
            if made.scales is not None and part.scales is not None:
                made.scales[end - len(part.weight) : end].copy_(part.scales)
        return made

    def to_quantized(self, dtype: torch.dtype) -> QuantizedWeight:
        """Return the values (out, width) and their scales: whole groups, with the inputs before and after the weight's own."""
        assert self.scales is not None
        rows, n = self.weight.transpose(1, 2), self.out_features  # (blocks, 64, width / per, 4)
        if self.format == "int8":
            q = (rows.to(torch.int16) - 128).to(torch.int8)
        else:
            q = torch.stack((rows & 15, rows >> 4), -2).view(torch.int8) - 8
        parts = [part.transpose(1, 2).flatten(0, 1)[:n] for part in self.scales.unbind(-1)]
        zero = parts[1] if self.format == "int4" else None
        return QuantizedWeight(self.format, q.flatten(2).flatten(0, 1)[:n], parts[0], zero, self.in_features, dtype, self.front)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """(out, in), as what it stands for."""
        if self.format == "bfloat16":
            rows = self.weight.view(torch.bfloat16).transpose(1, 2).flatten(2).flatten(0, 1)[: self.out_features]
            return rows[:, self.front : self.front + self.in_features].to(dtype).contiguous()
        return self.to_quantized(dtype).dequantize()

    def slice_outputs(self, first: int, last: int) -> "BlockedWeight":
        """The outputs first..last alone, of which the first begins a block."""
        blocks = slice(first // BLOCK_OUTPUTS, -(-last // BLOCK_OUTPUTS))
        scales = None if self.scales is None else self.scales[blocks]
        return replace(self, weight=self.weight[blocks], scales=scales, out_features=last - first)

    def slice_inputs(self, first: int, last: int) -> "BlockedWeight":
        """The inputs first..last alone: whole groups that hold them, of which the first has `front` others before them."""
        unit = self.group_size
        begin, end = first // unit, -(-last // unit)
        weight = self.weight[
            :, begin * unit // INPUTS_PER_WORD[self.format] : end * unit // INPUTS_PER_WORD[self.format]
        ].contiguous()
        scales = None if self.scales is None else self.scales[:, begin:end].contiguous()
        return replace(self, weight=weight, scales=scales, in_features=last - first, front=first - begin * unit)


class BlockedLinear(LinearKernel):
    """Multiply by a weight in blocks. If the weight is quantized, so are the rows of x: to 8 bits, with a scale for each 32
    inputs, and with `digits` 2 also what is left, to 8 more."""

    def __init__(self, blocks: BlockedWeight, dtype: torch.dtype) -> None:
        self.blocks, self.dtype, self.out_dtype = blocks, dtype, dtype
        self.format = None if blocks.format == "bfloat16" else blocks.format
        self.digits = NARROW_DIGITS if self.format and blocks.group_size == ACTIVATION_GROUP else 1
        self.in_features, self.out_features = blocks.in_features, blocks.out_features
        self.padding = (blocks.front, blocks.width - blocks.front - blocks.in_features)
        found = extension_for(blocks.format)
        assert found is not None
        self.extension = found
        self.base_args = fill_struct(
            LinearArgs(),
            kind=FORMAT_CODES[blocks.format],
            numbers=DTYPE_CODES[dtype],
            y_numbers=DTYPE_CODES[dtype],
            weight=blocks.weight,
            scales=blocks.scales,
            group=blocks.group_size,
            in_=blocks.width,
            out=self.out_features,
        )

    def use_highest_precision(self) -> None:
        if self.format:
            self.digits = 2
            self.out_dtype = torch.float32
            fill_struct(self.base_args, y_numbers=DTYPE_CODES[self.out_dtype])

    def rows(self, first: int, last: int) -> "BlockedLinear | None":
        if first % BLOCK_OUTPUTS:
            return None
        made = BlockedLinear(self.blocks.slice_outputs(first, last), self.dtype)
        made.digits = self.digits
        return made

    def forward_2d(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.dtype)  # a caller's autocast gives attention's outputs another
        if x.shape[1] != self.in_features or not c_extension.is_plain_tensor(
            x
        ):  # which raises the error for a wrong width, and can be traced
            return F.linear(x, self.dequantize())
        x = F.pad(x, self.padding) if any(self.padding) else x.contiguous()
        y = x.new_empty(len(x), self.out_features, dtype=self.out_dtype)
        room = torch.empty(self.scratch_bytes(len(x)), dtype=torch.uint8, device="cpu")
        if len(x):
            self.extension.call("multiply", ctypes.byref(self.args(len(x), x=x, y=y, room=room)))
        return y

    def swiglu(self, x: torch.Tensor) -> torch.Tensor | None:
        half, plain = self.out_features // 2, c_extension.is_plain_tensor(x) and not torch.is_grad_enabled()
        fits = x.ndim == 2 and x.shape[1] == self.in_features and x.dtype == self.dtype == torch.bfloat16 and len(x)
        if self.extension is not avx512.extension() or not plain or not fits or half % BLOCK_OUTPUTS or any(self.padding):
            return None
        x, y = x.contiguous(), x.new_empty(len(x), half)
        room = torch.empty(self.scratch_bytes(len(x)), dtype=torch.uint8, device="cpu")
        self.extension.call("multiply", ctypes.byref(self.args(len(x), x=x, y=y, room=room, gated=1, out=half)))
        return y

    def args(self, n: int, **fields: object) -> LinearArgs:
        """The product of n rows, with more of its fields set."""
        return fill_struct(LinearArgs.from_buffer_copy(self.base_args), n=n * self.digits, digits=self.digits, **fields)

    def scratch_bytes(self, n: int) -> int:
        """Bytes that n rows need: their 8-bit values, scales, and sums."""
        width = self.blocks.width
        return n * self.digits * (width + 12 * width // ACTIVATION_GROUP) if self.format else 0

    def unpack(self) -> torch.Tensor | QuantizedWeight:
        return self.blocks.to_quantized(self.dtype) if self.format else self.dequantize()

    def dequantize(self) -> torch.Tensor:
        return self.blocks.dequantize(self.dtype)
