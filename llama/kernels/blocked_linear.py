"""Linear kernel for weights in blocks of 64 outputs. The C code is in csrc/linear_avx512.c and csrc/linear_avx2.c.

A weight (out, in) is stored as a uint8 tensor (out / 64, in / n, 64, 4): out / 64 blocks of 64 outputs. Every 4 bytes contain n
adjacent inputs of one output, where n depends on the format:

    bfloat16    n = 2
    int8        n = 4; each byte is a value + 128
    int4        n = 8; each half byte is a value + 8: inputs 0 to 3 in the low halves of the 4 bytes, 4 to 7 in the high halves

For int8, scales are a tensor (out / 64, groups, 64, 1). For int4, scales and zeros are one tensor (out / 64, groups, 64, 2).
The outputs are padded to a multiple of 64, and the inputs to a multiple of the group size; activations are padded with zeros
to the same number of inputs. Files of packed weights contain the same blocks.
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

BLOCK_OUTPUTS = 64  # number of outputs in a block
ACTIVATION_GROUP = 32  # adjacent activations that share a scale
# In a layer with few inputs, each activation is quantized to two int8 values, because small models need the precision most.
NARROW_INT8_PER_ACTIVATION = 2
TILE_ROWS = 16  # rows of activations that AMX multiplies at a time
INPUTS_PER_WORD = {"bfloat16": 2, "int8": 4, "int4": 8}  # number of inputs in 4 bytes of a block
FORMAT_CODES = {"bfloat16": BF16, "int8": INT8, "int4": INT4}


def extension_for(format: str) -> c_extension.CExtension | None:
    """Return the C extension that multiplies blocks in `format` on this machine, or None if no extension can."""
    if pack.extension() is None:
        return None
    return avx512.extension() or (avx2.extension() if format != "bfloat16" else None)


@dataclass(frozen=True)
class BlockedWeight:
    """A weight (out_features, in_features) stored in blocks of 64 outputs, as blocked_linear.py describes."""

    format: str  # "bfloat16", "int8" or "int4"
    weight: torch.Tensor  # blocks, as a uint8 tensor
    scales: torch.Tensor | None  # bfloat16 scales, for int4 also zeros; None if `format` is "bfloat16"
    in_features: int
    out_features: int
    padding_before: int = 0  # number of padding inputs before the first input of the weight

    @property
    def width(self) -> int:
        """Return the number of inputs in the blocks, including padding."""
        return self.weight.shape[1] * INPUTS_PER_WORD[self.format]

    @property
    def group_size(self) -> int:
        """Return the number of inputs that share a scale; for bfloat16, which has no scales, the unit of padding: 32 inputs."""
        return self.width // self.scales.shape[1] if self.scales is not None else ACTIVATION_GROUP

    @staticmethod
    def shapes(format: str, out_features: int, in_features: int, group: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """Return the shapes of the tensors `weight` and `scales`, with None for `scales` if the format is bfloat16."""
        n_blocks, width = -(-out_features // BLOCK_OUTPUTS), -(-in_features // group) * group
        scales = None if format == "bfloat16" else (n_blocks, width // group, BLOCK_OUTPUTS, 2 if format == "int4" else 1)
        return (n_blocks, width // INPUTS_PER_WORD[format], BLOCK_OUTPUTS, 4), scales

    @staticmethod
    def allocate(format: str, out_features: int, in_features: int, group: int) -> "BlockedWeight":
        """Allocate a weight in huge pages of memory, with uninitialized blocks."""
        weight_shape, scales_shape = BlockedWeight.shapes(format, out_features, in_features, group)
        weight = HUGE_PAGES.empty(*weight_shape, dtype=torch.uint8)
        scales = HUGE_PAGES.empty(*scales_shape, dtype=torch.bfloat16) if scales_shape else None
        return BlockedWeight(format, weight, scales, in_features, out_features)

    @staticmethod
    def from_rows(format: str, views: Sequence[torch.Tensor], group: int, order: torch.Tensor | None = None) -> "BlockedWeight":
        """Pack the rows of the tensors `views`, each (rows, in), into one weight in the same order, with csrc/pack.c.

        order: the numbers of these rows in another order, int64 (rows); each row must be there once.
        For int8 and int4, csrc/pack.c quantizes each row in groups of `group` inputs. Raises ValueError if the views differ in
        dtype or width, are not on the CPU, or are not bfloat16 although `format` is "bfloat16".
        """
        compiled = pack.extension()
        assert compiled is not None
        dtype_code = BF16 if format == "bfloat16" else DTYPE_CODES.get(views[0].dtype)
        if any(DTYPE_CODES.get(v.dtype) != dtype_code or v.shape[1] != views[0].shape[1] or not v.is_cpu for v in views):
            # The check is needed because csrc/pack.c checks no sizes and would read beyond the end of the rows.
            rows_of = ", ".join(f"{v.dtype} {tuple(v.shape)} on {v.device}" for v in views)
            raise ValueError(f"rows of {rows_of} cannot be packed as {format}; all must have one dtype and width, on the CPU")
        views = [v if v.stride(1) == 1 else v.contiguous() for v in views]
        blocked = BlockedWeight.allocate(format, sum(map(len, views)), views[0].shape[1], group)
        rows = torch.cat([v.data_ptr() + torch.arange(len(v), device="cpu") * (v.stride(0) * v.element_size()) for v in views])
        rows = rows if order is None else rows[order]
        fields = {"format": FORMAT_CODES[format], "dtype": dtype_code, "rows": rows, "weight": blocked.weight}
        sizes = {"group": group, "in_": blocked.in_features, "width": blocked.width, "out": blocked.out_features}
        compiled.call("pack_weight", ctypes.byref(fill_struct(pack.PackArgs(), scales=blocked.scales, **fields, **sizes)))
        return blocked

    @staticmethod
    def from_quantized(quantized: QuantizedWeight) -> "BlockedWeight":
        """Pack a quantized weight into blocks with PyTorch functions alone, without C code."""
        out_features = len(quantized.values)
        padding = (0, 0, 0, -out_features % BLOCK_OUTPUTS)  # pads the outputs to whole blocks
        values = F.pad(quantized.values, padding).unflatten(0, (-1, BLOCK_OUTPUTS))  # shape (blocks, 64, inputs)
        parts = [F.pad(quantized.scales, padding, value=1e-30)]
        if quantized.zeros is not None:
            parts.append(F.pad(quantized.zeros, padding))
        scales = torch.stack(parts, -1).bfloat16()
        if quantized.format == "int8":
            words = (values.to(torch.int16) + 128).to(torch.uint8).unflatten(2, (-1, 4))
        else:
            halves = (values + 8).view(torch.uint8).unflatten(2, (-1, 2, 4))
            words = halves[..., 0, :] | halves[..., 1, :] << 4
        weight = words.transpose(1, 2).contiguous()  # shape (blocks, words per row, 64, 4), with words of 4 bytes
        scales = scales.unflatten(0, (-1, BLOCK_OUTPUTS)).transpose(1, 2).contiguous()
        before = quantized.padding_before
        return BlockedWeight(quantized.format, weight, scales, quantized.in_features, out_features, before)

    @staticmethod
    def from_dense(weight: torch.Tensor) -> "BlockedWeight":
        """Convert a weight (out, in) to bfloat16 and pack it, without C code."""
        padding = (0, -weight.shape[1] % ACTIVATION_GROUP, 0, -len(weight) % BLOCK_OUTPUTS)
        rows = F.pad(weight.bfloat16(), padding).unflatten(0, (-1, BLOCK_OUTPUTS))
        blocks = rows.view(torch.uint8).unflatten(2, (-1, 4)).transpose(1, 2).contiguous()
        return BlockedWeight("bfloat16", blocks, None, weight.shape[1], len(weight))

    @staticmethod
    def cat(parts: "Sequence[BlockedWeight]") -> "BlockedWeight | None":
        """Copy the outputs of all parts into one weight; return None if a part before the last ends within a block."""
        first, ends = parts[0], itertools.accumulate(len(part.weight) for part in parts)
        if any(part.out_features % BLOCK_OUTPUTS for part in parts[:-1]):
            return None
        out_features = sum(part.out_features for part in parts)
        joined = replace(
            BlockedWeight.allocate(first.format, out_features, first.width, first.group_size),
            in_features=first.in_features,
            padding_before=first.padding_before,
        )
        for part, end in zip(parts, ends, strict=True):
            joined.weight[end - len(part.weight) : end].copy_(part.weight)
            if joined.scales is not None and part.scales is not None:
                joined.scales[end - len(part.weight) : end].copy_(part.scales)
        return joined

    @staticmethod
    def view(parts: "Sequence[BlockedWeight]") -> "BlockedWeight | None":
        """Return the outputs of all parts as one weight without copying; None if they do not lie one after the other."""
        if any(part.out_features % BLOCK_OUTPUTS for part in parts[:-1]):
            return None
        weight = _adjacent([part.weight for part in parts])
        scales = _adjacent([part.scales for part in parts if part.scales is not None]) if parts[0].scales is not None else None
        if weight is None or (scales is None) != (parts[0].scales is None):
            return None
        return replace(parts[0], weight=weight, scales=scales, out_features=sum(part.out_features for part in parts))

    def to_quantized(self, dtype: torch.dtype) -> QuantizedWeight:
        """Return the weight as a QuantizedWeight for activations of `dtype`, with rows still padded to whole groups."""
        assert self.scales is not None
        rows, n = self.weight.transpose(1, 2), self.out_features  # shape (blocks, 64, words per row, 4)
        if self.format == "int8":
            values = (rows.to(torch.int16) - 128).to(torch.int8)
        else:
            values = torch.stack((rows & 15, rows >> 4), -2).view(torch.int8) - 8
        values = values.flatten(2).flatten(0, 1)[:n]
        parts = [part.transpose(1, 2).flatten(0, 1)[:n] for part in self.scales.unbind(-1)]
        zeros = parts[1] if self.format == "int4" else None
        return QuantizedWeight(self.format, values, parts[0], zeros, self.in_features, dtype, self.padding_before)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight as a plain tensor (out, in)."""
        if self.format == "bfloat16":
            rows = self.weight.view(torch.bfloat16).transpose(1, 2).flatten(2).flatten(0, 1)[: self.out_features]
            return rows[:, self.padding_before : self.padding_before + self.in_features].to(dtype).contiguous()
        return self.to_quantized(dtype).dequantize()

    def slice_outputs(self, first: int, last: int) -> "BlockedWeight":
        """Return outputs `first` to `last` - 1 of the weight, without copying; `first` must be a multiple of 64."""
        blocks = slice(first // BLOCK_OUTPUTS, -(-last // BLOCK_OUTPUTS))
        scales = None if self.scales is None else self.scales[blocks]
        return replace(self, weight=self.weight[blocks], scales=scales, out_features=last - first)

    def slice_inputs(self, first: int, last: int) -> "BlockedWeight":
        """Return a copy of inputs `first` to `last` - 1, extended to whole groups; the added inputs count as padding."""
        size, words_per_group = self.group_size, self.group_size // INPUTS_PER_WORD[self.format]
        first_group, last_group = first // size, -(-last // size)
        weight = self.weight[:, first_group * words_per_group : last_group * words_per_group].contiguous()
        scales = None if self.scales is None else self.scales[:, first_group:last_group].contiguous()
        padding_before = first - first_group * size
        return replace(self, weight=weight, scales=scales, in_features=last - first, padding_before=padding_before)


def _adjacent(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return tensors that lie one after the other, at an address aligned to 64 bytes, as one view of their memory."""
    address = parts[0].data_ptr()
    if address % 64 or any(not part.is_contiguous() for part in parts):
        return None
    for part in parts:
        if part.data_ptr() != address or part.untyped_storage().data_ptr() != parts[0].untyped_storage().data_ptr():
            return None
        address += part.nbytes
    shape = sum(map(len, parts)), *parts[0].shape[1:]
    return parts[0].as_strided(shape, parts[0].stride())


class BlockedLinear(LinearKernel):
    """Multiply by a weight in blocks, with the C kernels for AVX-512 or AVX2.

    For int8 and int4 weights, activations are quantized to int8 in groups of 32. If `int8_per_activation` is 2, the rounding
    error of each activation is quantized to a second int8 value, so that the two values together keep about 16 bits.

    On CPUs with AMX, `prefill` instead converts int8 and int4 weights to bfloat16, a part at a time in the CPU's cache, and
    does not quantize activations. For many rows, this is more than twice as fast.
    """

    def __init__(self, blocks: BlockedWeight, dtype: torch.dtype) -> None:
        self.blocks, self.dtype, self.out_dtype = blocks, dtype, dtype
        self.format = None if blocks.format == "bfloat16" else blocks.format
        narrow = self.format is not None and blocks.group_size == ACTIVATION_GROUP
        self.int8_per_activation = NARROW_INT8_PER_ACTIVATION if narrow else 1
        self.in_features, self.out_features = blocks.in_features, blocks.out_features
        self.padding = (blocks.padding_before, blocks.width - blocks.padding_before - blocks.in_features)
        extension = extension_for(blocks.format)
        assert extension is not None
        self.extension = extension
        self.base_args = fill_struct(
            LinearArgs(),
            format=FORMAT_CODES[blocks.format],
            x_dtype=DTYPE_CODES[dtype],
            y_dtype=DTYPE_CODES[dtype],
            weight=blocks.weight,
            scales=blocks.scales,
            group=blocks.group_size,
            in_=blocks.width,
            out=self.out_features,
        )

    def use_highest_precision(self) -> None:
        if self.format:
            self.int8_per_activation = 2
            self.out_dtype = torch.float32
            fill_struct(self.base_args, y_dtype=DTYPE_CODES[self.out_dtype])

    def rows(self, first: int, last: int) -> "BlockedLinear | None":
        if first % BLOCK_OUTPUTS:
            return None
        kernel = BlockedLinear(self.blocks.slice_outputs(first, last), self.dtype)
        kernel.int8_per_activation = self.int8_per_activation
        return kernel

    def forward_2d(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(x, dequantize=False)  # also in decode steps; the same for any number of rows

    def prefill(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(x, dequantize=True)

    def multiply(self, x: torch.Tensor, dequantize: bool) -> torch.Tensor:
        """Return x (N, in) times the weight, (N, out). dequantize: if AMX is in use, convert quantized weights to bfloat16."""
        x = x.to(self.dtype)  # autocast in the calling code may have changed the dtype of x
        # Use F.linear, which supports tracing and function transforms, and raises PyTorch's error if x has a wrong width.
        if x.shape[1] != self.in_features or not c_extension.is_plain_tensor(x):
            return F.linear(x, self.dequantize())
        x = F.pad(x, self.padding) if any(self.padding) else x.contiguous()
        y = x.new_empty(len(x), self.out_features, dtype=self.out_dtype)
        scratch = torch.empty(self.scratch_bytes(len(x)), dtype=torch.uint8, device="cpu")
        if len(x):
            self.extension.call("linear", ctypes.byref(self.args(len(x), x=x, y=y, scratch=scratch, dequantize=dequantize)))
        return y

    def swiglu(self, x: torch.Tensor, decoding: bool) -> torch.Tensor | None:
        # is_plain_tensor must come first: while torch.compile traces, it is False, and the other conditions cannot be traced.
        if not c_extension.is_plain_tensor(x) or self.extension.name != avx512.NAME or torch.is_grad_enabled():
            return None
        half = self.out_features // 2
        x_fits = x.ndim == 2 and x.shape[1] == self.in_features and x.dtype == self.dtype == torch.bfloat16 and len(x) > 0
        if not x_fits or half % BLOCK_OUTPUTS or any(self.padding):
            return None
        x, y = x.contiguous(), x.new_empty(len(x), half)
        scratch = torch.empty(self.scratch_bytes(len(x)), dtype=torch.uint8, device="cpu")
        args = self.args(len(x), x=x, y=y, scratch=scratch, gated=1, out=half, dequantize=not decoding)
        self.extension.call("linear", ctypes.byref(args))
        return y

    def args(self, n: int, **fields: object) -> LinearArgs:
        """Return the arguments of the C function `linear` for n rows of activations; `fields` sets further arguments."""
        args, count = LinearArgs.from_buffer_copy(self.base_args), self.int8_per_activation
        return fill_struct(args, n=n * count, int8_per_activation=count, **fields)

    def scratch_bytes(self, n: int) -> int:
        """Return the bytes of scratch memory that the C function `linear` needs for n rows, quantized or in tiles for AMX."""
        width, n_tiles = self.blocks.width, -(-n // TILE_ROWS) if n > TILE_ROWS else 0
        quantized = n * self.int8_per_activation * (width + 12 * width // ACTIVATION_GROUP) if self.format else 0
        return max(quantized, 2 * n_tiles * TILE_ROWS * width)

    def unpack(self) -> torch.Tensor | QuantizedWeight:
        return self.blocks.to_quantized(self.dtype) if self.format else self.dequantize()

    def dequantize(self) -> torch.Tensor:
        return self.blocks.dequantize(self.dtype)
