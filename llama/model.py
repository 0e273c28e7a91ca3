"""The Transformer of Llama 2.

Ids enter packed, (N,) for all rows together, with a `Batch` that says where each stands; so do all activations, (N, dim).
Shapes are written with N ids, B rows of S ids, H query heads and K key/value heads of this rank, G = H / K, hd = head_dim.
The model knows nothing of text, sampling or files.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .cache import Batch, KVCache, Span
from .errors import InputError
from .parallel import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear, divide
from .runtime import model_parallel


@dataclass
class ModelArgs:
    """`params.json`, and the sizes of the cache."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    vocab_size: int = -1  # -1: the tokenizer's
    multiple_of: int = 256  # the feed-forward's hidden width is a multiple of this
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5

    max_batch_size: int = 32
    max_seq_len: int = 2048

    rope_theta: float = 10000.0  # Code Llama: 1e6

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, cast back, times a weight per feature."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return y.type_as(x) * self.weight


def precompute_freqs_cis(dim: int, end: int, theta: float = 10000.0) -> torch.Tensor:
    """e^(i * angle) for positions 0..end, complex64 (end, dim / 2); the angle is position * theta^(-2j/dim)."""
    freqs = 1.0 / theta ** (torch.arange(0, dim, 2, device="cpu")[: dim // 2].float() / dim)
    angles = torch.outer(torch.arange(end, device="cpu").float(), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def reshape_for_broadcast(freqs_cis: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """freqs_cis (S, hd/2) -> (1, S, 1, hd/2), to go with x (B, S, heads, hd/2)."""
    if freqs_cis.shape != (x.shape[1], x.shape[-1]):
        raise InputError(
            f"freqs_cis is {tuple(freqs_cis.shape)}; for x {tuple(x.shape)} it must be {(x.shape[1], x.shape[-1])}"
        )
    return freqs_cis.view(1, x.shape[1], *[1] * (x.ndim - 3), x.shape[-1])


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn adjacent pairs of x (..., heads, hd) by their angles, in float32; cos and sin broadcast to (..., heads, hd/2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)


def apply_rotary_emb(xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """xq, xk (B, S, heads, hd) turned by freqs_cis, complex (S, hd/2)."""
    freqs = reshape_for_broadcast(freqs_cis, xq[..., ::2])
    return rotate(xq, freqs.real, freqs.imag), rotate(xk, freqs.real, freqs.imag)


def repeat_kv(x: torch.Tensor, n_rep: int) -> torch.Tensor:
    """(B, S, kv, hd) -> (B, S, kv * n_rep, hd), each head repeated in place. The model itself never expands its cache."""
    return x.repeat_interleave(n_rep, dim=2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """q (B, S, K, G, hd) over k and v (B, K, L, hd) -> (B, S, K, G, hd), with mask (B, K, S, L); None: causal, S = L.

    Each key/value head is a batch entry of its own whose G query heads see it through a view of stride 0.
    """
    if q.device.type == "mps":  # its kernel gives wrong answers for some of these calls: pytorch issues 169222, 181133
        return attend_plainly(q, k, v, mask)
    B, S, K, G, hd = q.shape
    q = q.permute(0, 2, 3, 1, 4).reshape(B * K, G, S, hd)
    k = k.flatten(0, 1).unsqueeze(1).expand(-1, G, -1, -1)  # (B * K, G, L, hd)
    v = v.flatten(0, 1).unsqueeze(1).expand(-1, G, -1, -1)
    if mask is not None:
        mask = mask.flatten(0, 1).unsqueeze(1)  # (B * K, 1, S, L)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return y.view(B, K, G, S, hd).permute(0, 3, 1, 2, 4)


def attend_plainly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`attend`, written out."""
    scores = torch.einsum("bskgd,bkld->bkgsl", q.float(), k.float()) / q.shape[-1] ** 0.5
    if mask is None:
        mask = torch.full(scores.shape[-2:], float("-inf"), device=q.device).triu(1)[None, None]
    weights = (scores + mask.unsqueeze(2)).softmax(-1).type_as(v)
    return torch.einsum("bkgsl,bkld->bskgd", weights, v)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        ranks = model_parallel()[1]
        self.head_dim = args.head_dim
        self.n_local_kv_heads = divide(args.kv_heads, ranks, "key/value heads")
        self.n_rep = args.n_heads // args.kv_heads  # query heads to each
        self.wq = ColumnParallelLinear(args.dim, args.n_heads * args.head_dim)
        self.wk = ColumnParallelLinear(args.dim, args.kv_heads * args.head_dim)
        self.wv = ColumnParallelLinear(args.dim, args.kv_heads * args.head_dim)
        self.wo = RowParallelLinear(args.n_heads * args.head_dim, args.dim)

    def forward(self, x: torch.Tensor, where: "Where", cache: KVCache | None, layer: int) -> torch.Tensor:
        N, K, G, hd = x.shape[0], self.n_local_kv_heads, self.n_rep, self.head_dim
        q = rotate(self.wq(x).view(N, K * G, hd), where.cos, where.sin)
        k = rotate(self.wk(x).view(N, K, hd), where.cos, where.sin)
        v = self.wv(x).view(N, K, hd)
        if cache is not None:
            cache.write(layer, where.batch, k, v)

        outputs, first = [], 0
        for span, mask in zip(where.batch.spans, where.masks, strict=True):
            B, S = span.n_rows, span.length
            ids = slice(first, first := first + B * S)
            if span.fresh:  # its own keys and values, not the cache's: exact, and differentiable
                keys, values = (t[ids].view(B, S, K, hd).transpose(1, 2) for t in (k, v))
            else:
                assert cache is not None, "without the cache a sequence must be whole"
                keys, values = cache.read(layer, span)
            outputs.append(attend(q[ids].view(B, S, K, G, hd), keys, values, mask).reshape(B * S, -1))
        return self.wo(torch.cat(outputs) if len(outputs) > 1 else outputs[0])


def ffn_width(hidden_dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """The feed-forward's inner width: two thirds of `hidden_dim` (4 * dim), scaled, up to the next multiple."""
    width = int(2 * hidden_dim / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


class FeedForward(nn.Module):
    """w2(silu(w1(x)) * w3(x))."""

    def __init__(self, dim: int, hidden_dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> None:
        super().__init__()
        width = ffn_width(hidden_dim, multiple_of, ffn_dim_multiplier)
        self.w1 = ColumnParallelLinear(dim, width)
        self.w2 = RowParallelLinear(width, dim)
        self.w3 = ColumnParallelLinear(dim, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, layer_id: int, args: ModelArgs) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args.dim, 4 * args.dim, args.multiple_of, args.ffn_dim_multiplier)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: torch.Tensor, where: "Where", cache: KVCache | None) -> torch.Tensor:
        h = x + self.attention(self.attention_norm(x), where, cache, self.layer_id)
        return h + self.feed_forward(self.ffn_norm(h))


@dataclass(frozen=True)
class Where:
    """What all layers of one forward share: the batch, its angles (N, 1, hd/2) and its masks."""

    batch: Batch
    cos: torch.Tensor
    sin: torch.Tensor
    masks: list[torch.Tensor | None]


class Transformer(nn.Module):
    """`forward` is the reference's call; `hidden` and `logits` are its two halves for packed ids.

    Made under `torch.device("meta")` it allocates nothing. The cache is made by `allocate`, or by the first forward.
    """

    def __init__(self, params: ModelArgs) -> None:
        super().__init__()
        if params.vocab_size < 1:
            raise InputError(f"vocab_size is {params.vocab_size}; set it to the tokenizer's n_words")
        if params.dim % params.n_heads or params.head_dim % 2 or params.n_heads % params.kv_heads:
            raise InputError(
                f"dim={params.dim}, n_heads={params.n_heads}, n_kv_heads={params.n_kv_heads}: "
                "dim must make n_heads of even width, and n_heads be a multiple of n_kv_heads"
            )
        self.n_local_kv_heads = divide(params.kv_heads, model_parallel()[1], "key/value heads")
        self.params = params
        self.vocab_size = params.vocab_size
        self.n_layers = params.n_layers
        self.tok_embeddings = ParallelEmbedding(params.vocab_size, params.dim)
        self.layers = nn.ModuleList(TransformerBlock(i, params) for i in range(params.n_layers))
        self.norm = RMSNorm(params.dim, params.norm_eps)
        self.output = ColumnParallelLinear(params.dim, params.vocab_size, gather_output=True)
        self.cache: KVCache | None = None
        self.rope: torch.Tensor | None = None  # float32 (2, max_seq_len, hd/2): cosines and sines

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def allocate(self) -> KVCache:
        """Make the cache, where the weights are."""
        args = self.params
        self.cache = KVCache(
            args.n_layers, args.max_batch_size, self.n_local_kv_heads, args.max_seq_len, args.head_dim, self.dtype, self.device
        )
        return self.cache

    def _angles(self, positions: torch.Tensor) -> torch.Tensor:
        """Cosines and sines at positions (N,), (2, N, 1, hd/2)."""
        if self.rope is None or self.rope.device != self.device:
            args = self.params
            freqs = precompute_freqs_cis(args.head_dim, args.max_seq_len, args.rope_theta)
            with torch.inference_mode(False):
                self.rope = torch.stack((freqs.real, freqs.imag)).to(self.device)
        return self.rope[:, positions].unsqueeze(2)

    def hidden(self, tokens: torch.Tensor, batch: Batch, keep: bool = True) -> torch.Tensor:
        """ids (N,) -> the last layer's normed output (N, dim). Their keys and values go into the cache.

        keep=False: for whole sequences that nothing will follow (training): no cache is needed, nor its limit of rows.
        """
        cache = self.cache if keep else None
        if keep and (cache is None or cache.data.device != self.device or cache.data.dtype != self.dtype):
            cache = self.allocate()
        cos, sin = self._angles(batch.positions)
        where = Where(batch, cos, sin, batch.masks(self.n_local_kv_heads, self.dtype))
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h, where, cache)
        return self.norm(h)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> float32 (..., vocab)."""
        return self.output(hidden).float()

    def forward(self, tokens: torch.Tensor, start_pos: int) -> torch.Tensor:
        """ids (B, S) of the cache's rows 0..B, at positions start_pos..start_pos + S -> float32 logits (B, S, vocab)."""
        if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise InputError(f"tokens is {tuple(tokens.shape)} of {tokens.dtype}; it must be ids (B, S) of int64")
        B, S = tokens.shape
        args = self.params
        if B > args.max_batch_size:
            raise InputError(f"{B} rows, but the model was built for max_batch_size={args.max_batch_size}")
        if not isinstance(start_pos, int) or start_pos < 0 or start_pos + S > args.max_seq_len:
            raise InputError(f"start_pos={start_pos} and {S} ids do not fit into the window of max_seq_len={args.max_seq_len}")
        if B == 0 or S == 0:
            return torch.empty(B, S, args.vocab_size, device=self.device)
        batch = Batch.of([(row, start_pos, S) for row in range(B)], self.device)
        hidden = self.hidden(tokens.to(self.device).flatten(), batch)
        self.cache.turn = None  # type: ignore[union-attr]
        return self.logits(hidden).view(B, S, -1)


__all__ = [
    "Attention", "Batch", "FeedForward", "KVCache", "ModelArgs", "RMSNorm", "Span", "Transformer", "TransformerBlock",
    "apply_rotary_emb", "attend", "precompute_freqs_cis", "repeat_kv", "reshape_for_broadcast", "rotate",
]  # fmt: skip
