"""What avx2.c does, which setup.py compiles where there is a C compiler: products on CPUs with AVX2, here those of a few rows
by weights of 16 and 32 bits as they lie (blocks.py has those of 8 and 4). The structure is that of native.h."""

import ctypes

import torch

from .library import NUMBERS, Product, filled, load, plain

MOST = 96  # rows of a product: of more, weights are better made float32 once
MOST_FP32 = 16  # and of those that are float32 already
LIBRARY = load("avx2", [Product], {"multiply": [Product]})


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x (n, in) is what `multiply` reads, and this its weight."""
    if LIBRARY is None or x.ndim != 2 or x.dtype not in NUMBERS or weight.dtype != x.dtype:
        return False
    few = 0 < len(x) <= (MOST_FP32 if x.dtype == torch.float32 else MOST)
    fits = few and x.shape[1] == weight.shape[1] and x.shape[1] % 32 == 0
    return fits and x.is_contiguous() and weight.is_contiguous() and plain(x, weight)


def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (n, in) -> (n, out), by a weight (out, in) of x's dtype."""
    assert LIBRARY is not None
    (n, width), out, numbers = x.shape, len(weight), NUMBERS[x.dtype]
    y, room = x.new_empty(n, out), torch.empty(n, width, dtype=torch.float32, device="cpu")
    tensors = {"weight": weight, "x": x, "y": y, "room": room}
    made = filled(Product(), kind=numbers, numbers=numbers, y_numbers=numbers, digits=1, in_=width, out=out, n=n, **tensors)
    LIBRARY.call("multiply", ctypes.byref(made))
    return y
