"""Attention of grouped heads that never expands the cache, and never holds a long prompt's scores.

Shapes: B rows of S ids, K key/value heads, G query heads to each, L slots. The S ids of a row are its last ones of L, so
that id s sees the slots 0..L - S + s; where single ids stand at positions of their own, a mask says so. Each way gives
what `attend_plainly` gives.
"""

import torch
import torch.nn.functional as F

from .. import tuning
from . import avx512, half_precision


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """q (B, S, K, G, hd) over k and v (B, K, L, hd) -> (B, S, K, G, hd).

    mask is added to the scores: (1, 1, S, L), or (B, 1, 1, L) for single ids; needed where 1 < S < L, or for ragged ids.
    """
    if q.device.type == "mps":  # its kernel gives wrong answers for some of these calls: pytorch issues 169222, 181133
        return attention_reference(q, k, v, mask)
    B, S, K, G, hd = q.shape
    if S == 1:
        return decode_attention(q.squeeze(1), k, v, mask).unsqueeze(1)
    if q.device.type == "cpu" and not q.requires_grad:
        if avx512.supports_prompt_attention(q, k, v):
            return avx512.prompt_attention(q, k, v)
        return attention_chunked(q, k, v)  # faster than PyTorch's kernel
    q = q.permute(0, 2, 3, 1, 4).reshape(B * K, G, S, hd)
    k = k.flatten(0, 1).unsqueeze(1).expand(-1, G, -1, -1)  # (B * K, G, L, hd), G a view of stride 0
    v = v.flatten(0, 1).unsqueeze(1).expand(-1, G, -1, -1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return y.view(B, K, G, S, hd).permute(0, 3, 1, 2, 4)


def decode_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`attend` for a single id of each row: q (B, K, G, hd) -> (B, K, G, hd). A head's G queries read each key once."""
    if mask is None and avx512.supports_decode_attention(q, k, v):
        return avx512.decode_attention(q, k, v)
    if q.dtype == torch.float16 and q.is_cpu and not half_precision.is_native(q.dtype):
        return decode_attention(q.float(), k.float(), v.float(), None if mask is None else mask.float()).half()
    if not (q.is_cpu and q.dtype == torch.float32) or q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    B, K, G, hd = q.shape  # by matrix products, which give the reference's digits
    scores = torch.baddbmm(
        q.new_empty(1, 1, 1), q.reshape(B * K, G, hd), k.flatten(0, 1).transpose(1, 2), beta=0, alpha=hd**-0.5
    )
    if mask is not None:
        scores.view(B, K, G, -1).add_(mask)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(B, K, G, hd)


def attention_chunked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`attend` by matrix products, BLOCK ids of each row at a time over no more slots than they see.

    In bfloat16 the scores are rounded to it, as the reference's are, before softmax makes them float32; but where the CPU
    has no instructions for bfloat16, all is float32.
    """
    if not half_precision.is_native(q.dtype):
        return attention_chunked(q.float(), k.float(), v.float()).to(q.dtype)
    B, S, K, G, hd = q.shape
    k, v = k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)  # (B * K, hd, L), (B * K, L, hd)
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    for first in range(0, S, tuning.ATTENTION_CHUNK):
        n = min(tuning.ATTENTION_CHUNK, S - first)
        end = v.shape[1] - S + first + n
        block = q[:, first : first + n].permute(0, 2, 3, 1, 4).reshape(B * K, G * n, hd)
        scores = torch.baddbmm(q.new_empty(1, 1, 1), block, k[:, :, :end], beta=0, alpha=hd**-0.5)
        scores.view(B * K, G, n, end)[..., end - n :] += q.new_full((n, n), float("-inf")).triu(1)
        out = torch.bmm(scores.softmax(-1), v[:, :end])
        y[:, first : first + n] = out.view(B, K, G, n, hd).permute(0, 3, 1, 2, 4)
    return y


def attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`attend`, written out."""
    scores = torch.einsum("bskgd,bkld->bkgsl", q.float(), k.float()) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask.unsqueeze(2)
    elif q.shape[1] > 1:
        scores = scores + scores.new_full(scores.shape[-2:], float("-inf")).triu(1)
    return torch.einsum("bkgsl,bkld->bskgd", scores.softmax(-1).type_as(v), v)
