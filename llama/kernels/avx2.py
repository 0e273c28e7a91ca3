"""Python binding of csrc/linear_avx2.c, the C extension for linear layers on CPUs with AVX2.

`linear` in this module multiplies by unpacked float16, bfloat16 and float32 weights. `BlockedLinear` in blocked_linear.py uses
the same C extension for packed int8 and int4 weights.
"""

import ctypes
import functools

import torch

from .. import tuning
from .c_extension import DTYPE_CODES, CExtension, ExtensionStatus, LinearArgs, fill_struct, is_plain_tensor, load_extension


@functools.cache
def status() -> ExtensionStatus:
    """Load the AVX2 extension on the first call, and return it or the reason why it cannot be used."""
    return load_extension("avx2", [LinearArgs], {"linear": [LinearArgs]})


def extension() -> CExtension | None:
    """Return the AVX2 extension, or None if this machine cannot use it."""
    return status().extension


def supports(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return True if `linear` can multiply x (n, in) by a weight (out, in) and is faster than PyTorch."""
    if extension() is None or x.ndim != 2 or x.dtype not in DTYPE_CODES or weight.dtype != x.dtype:
        return False
    if x.dtype == torch.float32 and x.shape[1] < tuning.AVX2_MIN_WIDTH_FP32:
        return False
    max_rows = tuning.AVX2_MAX_ROWS_FP32 if x.dtype == torch.float32 else tuning.AVX2_MAX_ROWS_16BIT
    shapes_fit = 0 < len(x) <= max_rows and x.shape[1] == weight.shape[1] and x.shape[1] % 32 == 0
    return shapes_fit and x.is_contiguous() and weight.is_contiguous() and is_plain_tensor(x, weight)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x (n, in) times a weight (out, in) of the same dtype, shaped (n, out)."""
    (n, width), out, dtype = x.shape, len(weight), DTYPE_CODES[x.dtype]
    y, scratch = x.new_empty(n, out), torch.empty(n, width, dtype=torch.float32, device="cpu")
    tensors = {"weight": weight, "x": x, "y": y, "scratch": scratch}
    compiled = extension()
    assert compiled is not None
    args = fill_struct(
        LinearArgs(), format=dtype, x_dtype=dtype, y_dtype=dtype, int8_per_activation=1, in_=width, out=out, n=n, **tensors
    )
    compiled.call("linear", ctypes.byref(args))
    return y
