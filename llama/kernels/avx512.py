"""Python binding of the AVX-512 extension: C kernels for decode steps, attention, RMSNorm, SwiGLU and linear layers.

setup.py compiles the extension from the files csrc/*_avx512.c and csrc/*_amx.c. The CPU must have the AVX-512 instructions for
bfloat16 and int8; on other CPUs, slower kernels are used. SwiGLU gives exactly the results of PyTorch, except that subnormal
bfloat16 values become 0. RMSNorm and attention add in another order than PyTorch, so that some results round differently.
"""

import ctypes
import functools
import os
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
    """The arguments of the C function `normalize_or_gate_rows` (RMSNorm or SwiGLU), described in csrc/decode_avx512.c."""

    _fields_ = struct_fields((c_long, "gated"), (c_void_p, "x weight y"), (c_float, "eps unused"), (c_long, "n width next"))


class AttentionArgs(ctypes.Structure):
    """The arguments of the C function `decode_attention` (attention in a decode step), described in csrc/decode_avx512.c."""

    _fields_ = struct_fields(
        (c_void_p, "q rotations keys values rows_and_positions scores y"),
        (c_long, "dtype n K G hd max_seq_len q_stride row_stride head_stride next"),
    )


class PromptAttentionArgs(ctypes.Structure):
    """The arguments of the C function `prompt_attention` (prefill attention), described in csrc/prompt_attention_avx512.c."""

    _fields_ = struct_fields(
        (c_void_p, "q keys values y packed_kv scores"),
        (c_long, "B S K G hd L q_batch q_stride kv_batch kv_head kv_stride scores_size threads_started next"),
    )


FUNCTIONS: dict[str, list[Any]] = {
    "normalize_or_gate_rows": [RowsArgs],
    "linear": [LinearArgs],
    "decode_attention": [AttentionArgs],
    "prompt_attention": [PromptAttentionArgs],
    "decode_layers": [LinearArgs, AttentionArgs, c_long],
}


NAME = "avx512"


@functools.cache
def status() -> ExtensionStatus:
    """Load the AVX-512 extension on the first call, and return it or the reason why it cannot be used."""
    if not half_precision.is_native(torch.bfloat16):
        return ExtensionStatus(None, "this CPU has no instructions for bfloat16 (AVX-512), or they are switched off")
    loaded = load_extension(NAME, [RowsArgs, LinearArgs, AttentionArgs, PromptAttentionArgs], FUNCTIONS)
    if loaded.extension is not None:
        # oneDNN's setting counts here, too, under both of its names.
        limit = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()
        loaded.extension.library.use_amx(limit in ("", "ALL", "DEFAULT") or "AMX" in limit)
    return loaded


def use_amx(wanted: bool) -> bool:
    """Switch AMX on, if `wanted` and the CPU has it, or off. Return True if it is now in use."""
    compiled = extension()
    return compiled is not None and bool(compiled.library.use_amx(wanted))


def uses_amx() -> bool:
    """Return True if AMX is in use."""
    compiled = extension()
    return compiled is not None and bool(ctypes.c_int.in_dll(compiled.library, "amx_in_use"))


def extension() -> CExtension | None:
    """Return the AVX-512 extension, or None if this machine cannot use it."""
    return status().extension


def call(name: str, *args: Any) -> None:
    """Call a C function of the AVX-512 extension on PyTorch's threads."""
    compiled = extension()
    assert compiled is not None
    compiled.call(name, *args)


def is_plain_bf16(*tensors: torch.Tensor) -> bool:
    """Return True if the AVX-512 extension may read the tensors: bfloat16 tensors that `is_plain_tensor` accepts."""
    if torch.compiler.is_compiling() or extension() is None:  # checked first, because torch.compile cannot trace `extension`
        return False
    return all(t.dtype == torch.bfloat16 for t in tensors) and is_plain_tensor(*tensors)


def supports_decode_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Return True if `decode_attention` supports q (B, K, G, hd), k and v (B, K, L, hd).

    The keys of one head in one row of the batch must be contiguous, and the values too.
    """
    (B, K, _, hd), same_layout = q.shape, k.shape == v.shape and k.stride() == v.stride()
    fits = same_layout and k.shape[:2] == (B, K) and k.shape[3] == hd and hd % 32 == 0 and k.stride()[2:] == (hd, 1)
    return fits and is_plain_bf16(q, k, v)


def decode_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return attention of one query token per row, q (B, K, G, hd), over k and v (B, K, L, hd), with the shape of q."""
    B, K, G, hd = q.shape
    q, y, L = q.contiguous(), q.new_empty(B, K, G, hd), k.shape[2]
    rows_and_positions = torch.tensor([(row, L - 1) for row in range(B)], dtype=torch.int64, device="cpu")
    scores = torch.empty(B * K * G * L, dtype=torch.float32, device="cpu")
    tensors = {"q": q, "keys": k, "values": v, "rows_and_positions": rows_and_positions, "scores": scores, "y": y}
    sizes = {"n": B, "K": K, "G": G, "hd": hd, "max_seq_len": L, "q_stride": K * G * hd}
    strides = {"row_stride": k.stride(0), "head_stride": k.stride(1)}
    call("decode_attention", ctypes.byref(fill_struct(AttentionArgs(), **tensors, **sizes, **strides)))
    return y


def supports_prompt_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Return True if `prompt_attention` supports q (B, S, K, G, hd), k and v (B, K, L, hd).

    At each position, all heads of q together must be contiguous in memory, and so must each head of k and of v.
    """
    _, S, K, G, hd = q.shape
    same_layout = k.shape == v.shape and k.stride() == v.stride() and k.shape[:2] == (len(q), K) and k.shape[3] == hd
    contiguous_heads = q.stride()[2:] == (G * hd, hd, 1) and k.stride(3) == 1
    return same_layout and contiguous_heads and hd % 64 == 0 and 0 < S <= k.shape[2] and is_plain_bf16(q, k, v)


def prompt_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return causal attention of q (B, S, K, G, hd), at the last S of L positions, over k and v (B, K, L, hd)."""
    B, S, K, G, hd = q.shape
    L, y = k.shape[2], torch.empty(q.shape, dtype=q.dtype, device="cpu")
    # Buffers for the C function: keys and values in blocks of 64 positions, and for each thread as many floats as AMX needs:
    # 1 row for the softmax of one query, the scores of 16 queries in bfloat16 (as much as 8 rows of floats), each row with 32
    # more values than there are positions, and 16 queries in bfloat16 (8 * hd floats). Without AMX, 6 rows are used: float32
    # scores and bfloat16 weights of 4 queries.
    packed_kv = torch.empty(2, B * K, -(-L // 64) * 64, hd, dtype=q.dtype, device="cpu")
    scores = torch.empty(torch.get_num_threads(), 9 * (packed_kv.shape[2] + 32) + 8 * hd, dtype=torch.float32, device="cpu")
    sizes = {"B": B, "S": S, "K": K, "G": G, "hd": hd, "L": L, "q_batch": q.stride(0), "q_stride": q.stride(1)}
    sizes["scores_size"] = scores.shape[1]
    strides = {"kv_batch": k.stride(0), "kv_head": k.stride(1), "kv_stride": k.stride(2)}
    call(
        "prompt_attention",
        ctypes.byref(
            fill_struct(
                PromptAttentionArgs(), q=q, keys=k, values=v, y=y, packed_kv=packed_kv, scores=scores, **sizes, **strides
            )
        ),
    )
    return y


def supports_rows(x: torch.Tensor, width: int, *weights: torch.Tensor) -> bool:
    """Return True if `rms_norm` (if a weight is given) or `swiglu` (if none is given) can compute rows of `width` outputs."""
    weights_fit = all(weight.shape == (width,) and weight.is_contiguous() for weight in weights)
    return (
        weights_fit
        and width > 0
        and width % 16 == 0
        and x.is_contiguous()
        and is_plain_bf16(x, *weights)
        and not torch.is_grad_enabled()
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x (..., width) normalized as by `llama.model.RMSNorm`."""
    y, width = torch.empty_like(x), len(weight)
    call(
        "normalize_or_gate_rows",
        ctypes.byref(fill_struct(RowsArgs(), x=x, weight=weight, y=y, eps=eps, n=x.numel() // width, width=width)),
    )
    return y


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """Return silu(first half of x) * second half of x, shaped (..., width), for x (..., 2 * width)."""
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    call("normalize_or_gate_rows", ctypes.byref(fill_struct(RowsArgs(), gated=1, x=x, y=y, n=y.numel() // width, width=width)))
    return y
