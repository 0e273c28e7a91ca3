"""What avx2.c does, which setup.py compiles where there is a C compiler: products of a few rows by weights as they lie, on CPUs
with AVX2. The structure is avx2.c's and explained there."""

import ctypes
from ctypes import c_long, c_void_p

import torch

from .library import fields, load, plain

MOST = 96  # rows of a product: of more, weights are better made float32 once
GROUP = 64  # inputs that share a scale in 4 bit
NUMBERS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
INT8, INT4 = 3, 4


class Product(ctypes.Structure):
    _fields_ = fields((c_long, "kind numbers"), (c_void_p, "weight scales"), (c_long, "in_ out"), (c_void_p, "x y room"))
    _fields_ += fields((c_long, "n threads next"))


LIBRARY = load("avx2", [Product], {"multiply": [Product]})


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x (n, in) is what `multiply` reads, and this its weight."""
    if LIBRARY is None or x.ndim != 2 or x.dtype not in NUMBERS:
        return False
    width = weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
    known = weight.dtype == torch.int8 or (weight.dtype in (torch.uint8, x.dtype) and x.dtype != torch.float32)
    fits = known and 0 < len(x) <= MOST and x.shape[1] == width and width % (GROUP if weight.dtype == torch.uint8 else 32) == 0
    return fits and x.is_contiguous() and weight.is_contiguous() and plain(x, weight)


def multiply(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    """x (n, in) -> (n, out), by a weight (out, in): of x's dtype, in 16 bits; of int8, with scales (out) in float32; or of
    uint8, (out, in / 2), inputs 2i and 2i + 1 in a byte, 0..15 for -8..7, with bfloat16 scales and zeros (out, in / 64, 2)."""
    assert LIBRARY is not None
    numbers, (n, width), out = NUMBERS[x.dtype], x.shape, len(weight)
    y, room = x.new_empty(n, out), torch.empty(n, width, dtype=torch.float32, device="cpu")
    kind = {torch.int8: INT8, torch.uint8: INT4}.get(weight.dtype, numbers)
    beside = None if scales is None else scales.data_ptr()
    made = Product(kind, numbers, weight.data_ptr(), beside, width, out, x.data_ptr(), y.data_ptr(), room.data_ptr(), n)
    LIBRARY.call("multiply", ctypes.byref(made))
    return y
