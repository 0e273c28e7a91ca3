"""What native.c, products.c and prompt.c do, which setup.py compiles where there is a C compiler: products of weights in blocks
(blocks.py), attention of prompts, and whole decode steps, on CPUs with AVX-512's instructions for bfloat16 and 8 bits.

Where there is none, or another CPU, the same is done without it, slower. Norms, gates and rotations give the same to the last
bit, except that numbers too small for bfloat16's normal form become 0. The structures are those of native.h and native.c.
"""

import ctypes
from ctypes import c_float, c_long, c_void_p
from typing import Any

import torch

from . import library, widened
from .library import fields, filled, load


class Rows(ctypes.Structure):
    _fields_ = fields((c_long, "gated"), (c_void_p, "x weight y"), (c_float, "eps unused"), (c_long, "n width next"))


class Attention(ctypes.Structure):
    _fields_ = fields(
        (c_void_p, "q turns keys values at scores y"),
        (c_long, "n K G hd slots q_stride row_stride head_stride next"),
    )


class Prompt(ctypes.Structure):
    """prompt.c explains it."""

    _fields_ = fields(
        (c_void_p, "q keys values y room scores"),
        (c_long, "B S K G hd L q_batch q_stride kv_batch kv_head kv_stride begun next"),
    )


FUNCTIONS: dict[str, list[Any]] = {
    "rows": [Rows],
    "multiply": [library.Product],
    "attend": [Attention],
    "prompt": [Prompt],
    "layers": [library.Product, Attention, c_long],
}
COMPILED = load("native", [Rows, library.Product, Attention, Prompt], FUNCTIONS) if widened.native(torch.bfloat16) else None
if not widened.native(torch.bfloat16):
    library.REASONS["native"] = "this CPU has no instructions for bfloat16 (AVX-512), or they are switched off"


def call(name: str, *args: Any) -> None:
    assert COMPILED is not None
    COMPILED.call(name, *args)


def plain(*tensors: torch.Tensor) -> bool:
    """Whether native.c may look at their memory, and reads their numbers."""
    return COMPILED is not None and all(t.dtype == torch.bfloat16 for t in tensors) and library.plain(*tensors)


def attends(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `attend_one` does: q (B, K, G, hd), k and v (B, K, L, hd) with the slots side by side."""
    (B, K, _, hd), same = q.shape, k.shape == v.shape and k.stride() == v.stride()
    fits = same and k.shape[:2] == (B, K) and k.shape[3] == hd and hd % 32 == 0 and k.stride()[2:] == (hd, 1)
    return fits and plain(q, k, v)


def attend_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q (B, K, G, hd) over k and v (B, K, L, hd) -> (B, K, G, hd)."""
    B, K, G, hd = q.shape
    q, y, L = q.contiguous(), q.new_empty(B, K, G, hd), k.shape[2]
    at = torch.tensor([(row, L - 1) for row in range(B)], dtype=torch.int64, device="cpu")
    scores = torch.empty(B * K * G * L, dtype=torch.float32, device="cpu")
    tensors = {"q": q, "keys": k, "values": v, "at": at, "scores": scores, "y": y}
    sizes = {"n": B, "K": K, "G": G, "hd": hd, "slots": L, "q_stride": K * G * hd}
    strides = {"row_stride": k.stride(0), "head_stride": k.stride(1)}
    call("attend", ctypes.byref(filled(Attention(), **tensors, **sizes, **strides)))
    return y


def attends_prompt(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `attend_prompt` does: q (B, S, K, G, hd), k and v (B, K, L, hd) of any strides but for features."""
    _, S, K, G, hd = q.shape
    same = k.shape == v.shape and k.stride() == v.stride() and k.shape[:2] == (len(q), K) and k.shape[3] == hd
    packed = q.stride()[2:] == (G * hd, hd, 1) and k.stride(3) == 1
    return same and packed and hd % 64 == 0 and 0 < S <= k.shape[2] and plain(q, k, v)


def attend_prompt(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend causally: q (B, S, K, G, hd), of the last S positions of k and v (B, K, L, hd) -> (B, S, K, G, hd)."""
    B, S, K, G, hd = q.shape
    L, y = k.shape[2], torch.empty(q.shape, dtype=q.dtype, device="cpu")
    room = torch.empty(2, B * K, -(-L // 64) * 64, hd, dtype=q.dtype, device="cpu")
    scores = torch.empty(torch.get_num_threads(), 6, room.shape[2], dtype=torch.float32, device="cpu")
    sizes = {"B": B, "S": S, "K": K, "G": G, "hd": hd, "L": L, "q_batch": q.stride(0), "q_stride": q.stride(1)}
    strides = {"kv_batch": k.stride(0), "kv_head": k.stride(1), "kv_stride": k.stride(2)}
    call("prompt", ctypes.byref(filled(Prompt(), q=q, keys=k, values=v, y=y, room=room, scores=scores, **sizes, **strides)))
    return y


def rows_taken(x: torch.Tensor, width: int, *weights: torch.Tensor) -> bool:
    """Whether `normalized` takes x (..., width) and a weight (width), or `gated` x alone."""
    each = all(weight.shape == (width,) and weight.is_contiguous() for weight in weights)
    return each and width > 0 and width % 16 == 0 and x.is_contiguous() and plain(x, *weights) and not torch.is_grad_enabled()


def normalized(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., width) as `RMSNorm` has it."""
    y, width = torch.empty_like(x), len(weight)
    call("rows", ctypes.byref(filled(Rows(), x=x, weight=weight, y=y, eps=eps, n=x.numel() // width, width=width)))
    return y


def gated(x: torch.Tensor) -> torch.Tensor:
    """x (..., 2 * width): silu of the first half times the second, (..., width)."""
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    call("rows", ctypes.byref(filled(Rows(), gated=1, x=x, y=y, n=y.numel() // width, width=width)))
    return y
