"""What native.c, products.c and prompt.c do, which setup.py compiles where there is a C compiler: products of weights in blocks
(blocks.py), attention of prompts, and whole decode steps, on CPUs with AVX-512's instructions for bfloat16 and 8 bits.

Where there is none, or another CPU, the same is done without it, slower. Norms, gates and rotations give the same to the last
bit, except that numbers too small for bfloat16's normal form become 0. The structures are those of native.h and native.c.
"""

import ctypes
import functools
from ctypes import c_float, c_long, c_void_p
from typing import Any

import torch

from . import half_precision
from .c_extension import (
    CExtension,
    ExtensionStatus,
    LinearArgs,
    fill_struct,
    is_plain_tensor,
    load_extension,
    struct_fields,
)


class RowsArgs(ctypes.Structure):
    _fields_ = struct_fields((c_long, "gated"), (c_void_p, "x weight y"), (c_float, "eps unused"), (c_long, "n width next"))


class AttentionArgs(ctypes.Structure):
    _fields_ = struct_fields(
        (c_void_p, "q turns keys values at scores y"),
        (c_long, "numbers n K G hd slots q_stride row_stride head_stride next"),
    )


class PromptAttentionArgs(ctypes.Structure):
    """prompt.c explains it."""

    _fields_ = struct_fields(
        (c_void_p, "q keys values y room scores"),
        (c_long, "B S K G hd L q_batch q_stride kv_batch kv_head kv_stride begun next"),
    )


FUNCTIONS: dict[str, list[Any]] = {
    "rows": [RowsArgs],
    "multiply": [LinearArgs],
    "attend": [AttentionArgs],
    "prompt": [PromptAttentionArgs],
    "layers": [LinearArgs, AttentionArgs, c_long],
}


@functools.cache
def status() -> ExtensionStatus:
    """Load the extension once, if this CPU has instructions for bfloat16."""
    if not half_precision.is_native(torch.bfloat16):
        return ExtensionStatus(None, "this CPU has no instructions for bfloat16 (AVX-512), or they are switched off")
    return load_extension("avx512", [RowsArgs, LinearArgs, AttentionArgs, PromptAttentionArgs], FUNCTIONS)


def extension() -> CExtension | None:
    return status().extension


def call(name: str, *args: Any) -> None:
    """Call a function of the extension on PyTorch's threads."""
    compiled = extension()
    assert compiled is not None
    compiled.call(name, *args)


def is_plain_bf16(*tensors: torch.Tensor) -> bool:
    """Return True if the extension may read the tensors: plain CPU tensors in bfloat16."""
    if torch.compiler.is_compiling() or extension() is None:  # in this order: a cached function cannot be traced
        return False
    return all(t.dtype == torch.bfloat16 for t in tensors) and is_plain_tensor(*tensors)


def supports_decode_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `attend_one` does: q (B, K, G, hd), k and v (B, K, L, hd) with the slots side by side."""
    (B, K, _, hd), same = q.shape, k.shape == v.shape and k.stride() == v.stride()
    fits = same and k.shape[:2] == (B, K) and k.shape[3] == hd and hd % 32 == 0 and k.stride()[2:] == (hd, 1)
    return fits and is_plain_bf16(q, k, v)


def decode_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q (B, K, G, hd) over k and v (B, K, L, hd) -> (B, K, G, hd)."""
    B, K, G, hd = q.shape
    q, y, L = q.contiguous(), q.new_empty(B, K, G, hd), k.shape[2]
    at = torch.tensor([(row, L - 1) for row in range(B)], dtype=torch.int64, device="cpu")
    scores = torch.empty(B * K * G * L, dtype=torch.float32, device="cpu")
    tensors = {"q": q, "keys": k, "values": v, "at": at, "scores": scores, "y": y}
    sizes = {"n": B, "K": K, "G": G, "hd": hd, "slots": L, "q_stride": K * G * hd}
    strides = {"row_stride": k.stride(0), "head_stride": k.stride(1)}
    call("attend", ctypes.byref(fill_struct(AttentionArgs(), **tensors, **sizes, **strides)))
    return y


def supports_prompt_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `attend_prompt` does: q (B, S, K, G, hd), k and v (B, K, L, hd) of any strides but for features."""
    _, S, K, G, hd = q.shape
    same = k.shape == v.shape and k.stride() == v.stride() and k.shape[:2] == (len(q), K) and k.shape[3] == hd
    packed = q.stride()[2:] == (G * hd, hd, 1) and k.stride(3) == 1
    return same and packed and hd % 64 == 0 and 0 < S <= k.shape[2] and is_plain_bf16(q, k, v)


def prompt_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend causally: q (B, S, K, G, hd), of the last S positions of k and v (B, K, L, hd) -> (B, S, K, G, hd)."""
    B, S, K, G, hd = q.shape
    L, y = k.shape[2], torch.empty(q.shape, dtype=q.dtype, device="cpu")
    room = torch.empty(2, B * K, -(-L // 64) * 64, hd, dtype=q.dtype, device="cpu")
    scores = torch.empty(torch.get_num_threads(), 6, room.shape[2], dtype=torch.float32, device="cpu")
    sizes = {"B": B, "S": S, "K": K, "G": G, "hd": hd, "L": L, "q_batch": q.stride(0), "q_stride": q.stride(1)}
    strides = {"kv_batch": k.stride(0), "kv_head": k.stride(1), "kv_stride": k.stride(2)}
    call(
        "prompt",
        ctypes.byref(
            fill_struct(PromptAttentionArgs(), q=q, keys=k, values=v, y=y, room=room, scores=scores, **sizes, **strides)
        ),
    )
    return y


def supports_rows(x: torch.Tensor, width: int, *weights: torch.Tensor) -> bool:
    """Whether `normalized` takes x (..., width) and a weight (width), or `gated` x alone."""
    each = all(weight.shape == (width,) and weight.is_contiguous() for weight in weights)
    return (
        each
        and width > 0
        and width % 16 == 0
        and x.is_contiguous()
        and is_plain_bf16(x, *weights)
        and not torch.is_grad_enabled()
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., width) as `RMSNorm` has it."""
    y, width = torch.empty_like(x), len(weight)
    call("rows", ctypes.byref(fill_struct(RowsArgs(), x=x, weight=weight, y=y, eps=eps, n=x.numel() // width, width=width)))
    return y


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """x (..., 2 * width): silu of the first half times the second, (..., width)."""
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    call("rows", ctypes.byref(fill_struct(RowsArgs(), gated=1, x=x, y=y, n=y.numel() // width, width=width)))
    return y
