"""Attention with grouped query heads, in bounded memory and without a copy of the KV cache for each query head.

Shapes: B rows of the batch, S query tokens per row, K key/value heads, G query heads per key/value head, L keys per row, and
hd, the size of a head. The S queries are at the last S of the L positions, so query s attends to keys 0 to L - S + s. If S is
1, rows may have different lengths; a mask then hides the keys beyond the length of each row. All functions compute the same
attention as `attention_reference`.
"""

import torch
import torch.nn.functional as F

from .. import tuning
from . import avx512, half_precision


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return attention of q (B, S, K, G, hd) over k and v (B, K, L, hd), shaped (B, S, K, G, hd), by the fastest kernel.

    mask: the causal mask (1, 1, S, L) or, if S is 1, (B, 1, 1, L), which is added to the scores. The mask may be None if all
    rows have the same length and S is 1 or L.
    """
    if q.device.type == "mps":  # PyTorch's fused MPS kernel is wrong for some shapes: pytorch issues 169222, 181133
        return attention_reference(q, k, v, mask)
    B, S, K, G, hd = q.shape
    if S == 1:
        return decode_attention(q.squeeze(1), k, v, mask).unsqueeze(1)
    if q.device.type == "cpu" and not q.requires_grad:
        if avx512.supports_prompt_attention(q, k, v):
            return avx512.prompt_attention(q, k, v)
        return attention_chunked(q, k, v)  # faster on CPUs than F.scaled_dot_product_attention
    q = q.permute(0, 2, 3, 1, 4).reshape(B * K, G, S, hd)
    # k and v become (B * K, G, L, hd) without a copy: all G query heads read the same memory.
    k = k.flatten(0, 1).unsqueeze(1).expand(-1, G, -1, -1)
    v = v.flatten(0, 1).unsqueeze(1).expand(-1, G, -1, -1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return y.view(B, K, G, S, hd).permute(0, 3, 1, 2, 4)


def masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return attention of a few query tokens per row, q (B, S, K, G, hd), over k and v (B, K, L, hd), with the shape of q.

    mask: (B, 1, S, L), added to the scores. Unlike in `attention`, queries may be at any positions.
    """
    B, S, K, G, hd = q.shape
    y = decode_attention(q.transpose(1, 2).reshape(B, K, S * G, hd), k, v, mask.repeat_interleave(G, dim=2))
    return y.view(B, K, S, G, hd).transpose(1, 2)


def decode_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return attention of one query token per row, q (B, K, G, hd), over k and v (B, K, L, hd), with the shape of q.

    The G query heads of a key/value head share one pass over its keys.
    """
    if mask is None and avx512.supports_decode_attention(q, k, v):
        return avx512.decode_attention(q, k, v)
    if q.dtype == torch.float16 and q.is_cpu and not half_precision.is_native(q.dtype):
        return decode_attention(q.float(), k.float(), v.float(), None if mask is None else mask.float()).half()
    if not (q.is_cpu and q.dtype == torch.float32) or q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # In float32, two separate matrix products round exactly as Meta's implementation does.
    B, K, G, hd = q.shape
    scores = torch.baddbmm(
        q.new_empty(1, 1, 1), q.reshape(B * K, G, hd), k.flatten(0, 1).transpose(1, 2), beta=0, alpha=hd**-0.5
    )
    if mask is not None:
        scores.view(B, K, G, -1).add_(mask)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(B, K, G, hd)


def attention_chunked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return causal attention, computed by matrix products for tuning.ATTENTION_CHUNK query tokens of each row at a time.

    Each chunk of queries reads only the keys that it attends to. In bfloat16, scores are rounded to bfloat16 before the
    softmax, and the softmax is computed in float32, as in Meta's implementation. If the CPU is slow in q's dtype, everything is
    computed in float32.
    """
    if not half_precision.is_native(q.dtype):
        return attention_chunked(q.float(), k.float(), v.float()).to(q.dtype)
    B, S, K, G, hd = q.shape
    k, v = k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)  # k is now (B * K, hd, L), v is (B * K, L, hd)
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    for first in range(0, S, tuning.ATTENTION_CHUNK):
        n = min(tuning.ATTENTION_CHUNK, S - first)
        kv_len = v.shape[1] - S + first + n
        queries = q[:, first : first + n].permute(0, 2, 3, 1, 4).reshape(B * K, G * n, hd)
        scores = torch.baddbmm(q.new_empty(1, 1, 1), queries, k[:, :, :kv_len], beta=0, alpha=hd**-0.5)
        scores.view(B * K, G, n, kv_len)[..., kv_len - n :] += q.new_full((n, n), float("-inf")).triu(1)
        outputs = torch.bmm(scores.softmax(-1), v[:, :kv_len])
        y[:, first : first + n] = outputs.view(B, K, G, n, hd).permute(0, 3, 1, 2, 4)
    return y


def attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Compute `attention` by the textbook formula, with scores in float32 and all scores in memory at once."""
    scores = torch.einsum("bskgd,bkld->bkgsl", q.float(), k.float()) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask.unsqueeze(2)
    elif q.shape[1] > 1:
        scores = scores + scores.new_full(scores.shape[-2:], float("-inf")).triu(1)
    return torch.einsum("bkgsl,bkld->bskgd", scores.softmax(-1).type_as(v), v)
