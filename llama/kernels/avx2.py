"""What avx2.c does, which setup.py compiles where there is a C compiler: products on CPUs with AVX2, here those of a few rows
by weights of 16 and 32 bits as they lie (blocks.py has those of 8 and 4). The structure is that of native.h.
"""

import ctypes
import functools

import torch

from .. import tuning
from .c_extension import DTYPE_CODES, CExtension, ExtensionStatus, LinearArgs, fill_struct, is_plain_tensor, load_extension


@functools.cache
def status() -> ExtensionStatus:
    """Load the extension once."""
    return load_extension("avx2", [LinearArgs], {"multiply": [LinearArgs]})


def extension() -> CExtension | None:
    return status().extension


def supports(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x (n, in) is what `multiply` reads, and this its weight."""
    if extension() is None or x.ndim != 2 or x.dtype not in DTYPE_CODES or weight.dtype != x.dtype:
        return False
    few = 0 < len(x) <= (tuning.AVX2_MAX_ROWS_FP32 if x.dtype == torch.float32 else tuning.AVX2_MAX_ROWS_16BIT)
    fits = few and x.shape[1] == weight.shape[1] and x.shape[1] % 32 == 0
    return fits and x.is_contiguous() and weight.is_contiguous() and is_plain_tensor(x, weight)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (n, in) -> (n, out), by a weight (out, in) of x's dtype."""
    (n, width), out, numbers = x.shape, len(weight), DTYPE_CODES[x.dtype]
    y, room = x.new_empty(n, out), torch.empty(n, width, dtype=torch.float32, device="cpu")
    tensors = {"weight": weight, "x": x, "y": y, "room": room}
    compiled = extension()
    assert compiled is not None
    args = fill_struct(
        LinearArgs(), kind=numbers, numbers=numbers, y_numbers=numbers, digits=1, in_=width, out=out, n=n, **tensors
    )
    compiled.call("multiply", ctypes.byref(args))
    return y
