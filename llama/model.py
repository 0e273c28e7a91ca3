"""The Transformer of Llama 2, with the names, shapes and calls of Meta's reference.

A forward pass computes S new tokens in each of B rows, at positions from start_pos on. Activations are (B, S, dim). A rank has
H query heads and K key/value heads of hd (head_dim) values each. Queries are (B, S, H, hd); keys and values are (B, S, K, hd).

This module is plain PyTorch with tensor-parallel layers. It computes models that a caller has modified, and every faster
backend is tested against it.
"""

import math
import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .distributed import groups
from .distributed.groups import model_parallel
from .errors import InputError, describe
from .layers.embedding import ParallelEmbedding
from .layers.linear import ColumnParallelLinear, RowParallelLinear, divide


@dataclass
class ModelArgs:
    """The contents of `params.json`, and the size of the KV cache."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: equal to n_heads
    vocab_size: int = -1  # -1 in `params.json`: the tokenizer's n_words
    multiple_of: int = 256  # the feed-forward width is rounded up to a multiple of this number
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5

    max_batch_size: int = 32
    max_seq_len: int = 2048

    rope_theta: float = 10000.0  # 1e6 in Code Llama
    # Only models in Hugging Face's layout may have other values than these:
    rope_scale: float = 1.0  # rotary angles are divided by this number, for longer contexts
    attention_head_dim: int | None = None  # None: dim / n_heads

    @property
    def head_dim(self) -> int:
        return self.attention_head_dim or self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def ffn_width(self) -> int:
        return ffn_width(4 * self.dim, self.multiple_of, self.ffn_dim_multiplier)


class RMSNorm(nn.Module):
    """Divide x (..., dim) by the root mean square of its last dimension, and multiply by a weight per feature."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim), requires_grad=False)

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._norm(x.float()).type_as(x) * self.weight


def precompute_freqs_cis(dim: int, end: int, theta: float = 10000.0) -> torch.Tensor:
    """Return e^(i * position * theta^(-2j / dim)) for positions 0 to end - 1 and columns j: complex64 (end, dim / 2)."""
    return _rotations(rotary_frequencies(dim, theta), end)


def rotary_frequencies(dim: int, theta: float) -> torch.Tensor:
    """Return theta^(-2j / dim) for j = 0 to dim / 2 - 1: the angles in radians between adjacent positions, (dim / 2)."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, device="cpu")[: dim // 2].float() / dim)


def _rotations(freqs: torch.Tensor, end: int) -> torch.Tensor:
    """Return e^(i * position * frequency) for positions 0 to end - 1: complex64 (end, len(freqs))."""
    angles = torch.outer(torch.arange(end, device="cpu").float(), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def reshape_for_broadcast(freqs_cis: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return freqs_cis (S, hd/2) as (1, S, 1, hd/2), so that it can multiply x (B, S, heads, hd/2)."""
    if freqs_cis.shape != (x.shape[1], x.shape[-1]):
        expected = x.shape[1], x.shape[-1]
        raise InputError(f"freqs_cis is {tuple(freqs_cis.shape)}; for x {tuple(x.shape)} it must be {expected}")
    return freqs_cis.view(1, x.shape[1], *[1] * (x.ndim - 3), x.shape[-1])


def apply_rotary_emb(xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys (B, S, heads, hd) by freqs_cis (S, hd/2) in float32. Two adjacent values are a complex number."""

    def rotated(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * reshape_for_broadcast(freqs_cis, pairs)).flatten(3).type_as(x)

    return rotated(xq), rotated(xk)


def repeat_kv(x: torch.Tensor, n_rep: int) -> torch.Tensor:
    """Repeat each key/value head n_rep times, one copy after the other: (B, S, K, hd) -> (B, S, K * n_rep, hd)."""
    return x.repeat_interleave(n_rep, dim=2) if n_rep > 1 else x


class Attention(nn.Module):
    """Attend to all positions so far: (B, S, dim) -> (B, S, dim). H / K query heads share each key/value head."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        ranks = model_parallel()[1]
        self.n_kv_heads = args.kv_heads
        self.n_local_heads = divide(args.n_heads, ranks, "attention heads")
        self.n_local_kv_heads = divide(args.kv_heads, ranks, "key/value heads")
        self.n_rep = args.n_heads // args.kv_heads
        self.head_dim = args.head_dim
        queries, keys = args.n_heads * args.head_dim, args.kv_heads * args.head_dim
        self.wq = ColumnParallelLinear(args.dim, queries, bias=False, gather_output=False)
        self.wk = ColumnParallelLinear(args.dim, keys, bias=False, gather_output=False)
        self.wv = ColumnParallelLinear(args.dim, keys, bias=False, gather_output=False)
        self.wo = RowParallelLinear(queries, args.dim, bias=False, input_is_parallel=True)
        shape = args.max_batch_size, args.max_seq_len, self.n_local_kv_heads, args.head_dim
        self.cache_k, self.cache_v = torch.zeros(shape), torch.zeros(shape)

    def forward(self, x: torch.Tensor, start_pos: int, freqs_cis: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        B, S, _ = x.shape
        xq = self.wq(x).view(B, S, self.n_local_heads, self.head_dim)
        xk = self.wk(x).view(B, S, self.n_local_kv_heads, self.head_dim)
        xv = self.wv(x).view(B, S, self.n_local_kv_heads, self.head_dim)
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis)

        self.cache_k, self.cache_v = self.cache_k.to(xq), self.cache_v.to(xq)
        # Attend to copies of the cached keys and values with xk and xv inserted, because the cache itself keeps no gradient of
        # xk and xv. `torch.cat` could not make the copies: it does not join some dtypes under autocast.
        keys = self.cache_k[:B, : start_pos + S].slice_scatter(xk, 1, start_pos)
        values = self.cache_v[:B, : start_pos + S].slice_scatter(xv, 1, start_pos)
        self.cache_k[:B, start_pos : start_pos + S] = xk.detach()
        self.cache_v[:B, start_pos : start_pos + S] = xv.detach()

        queries = xq.transpose(1, 2)  # shape (B, H, S, hd)
        keys = repeat_kv(keys, self.n_rep).transpose(1, 2)  # shape (B, H, start_pos + S, hd)
        values = repeat_kv(values, self.n_rep).transpose(1, 2)
        scores = queries @ keys.transpose(2, 3) / math.sqrt(self.head_dim)
        if mask is not None:
            scores = scores + mask
        weights = F.softmax(scores.float(), dim=-1).type_as(xq)
        return self.wo((weights @ values).transpose(1, 2).flatten(2))


def ffn_width(hidden_dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """Return the inner width of the feed-forward: two thirds of hidden_dim, rounded up to a multiple of `multiple_of`.

    ffn_dim_multiplier: a factor for the width before it is rounded up.
    """
    width = int(2 * hidden_dim / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


class FeedForward(nn.Module):
    """Compute w2(silu(w1(x)) * w3(x)): (B, S, dim) -> (B, S, dim). `ffn_width` gives the inner width from hidden_dim."""

    def __init__(self, dim: int, hidden_dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> None:
        super().__init__()
        width = ffn_width(hidden_dim, multiple_of, ffn_dim_multiplier)
        self.w1 = ColumnParallelLinear(dim, width, bias=False, gather_output=False)
        self.w2 = RowParallelLinear(width, dim, bias=False, input_is_parallel=True)
        self.w3 = ColumnParallelLinear(dim, width, bias=False, gather_output=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """Compute h + feed_forward(ffn_norm(h)) with h = x + attention(attention_norm(x)): (B, S, dim) -> (B, S, dim)."""

    def __init__(self, layer_id: int, args: ModelArgs) -> None:
        super().__init__()
        self.n_heads = args.n_heads
        self.dim = args.dim
        self.head_dim = args.head_dim
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args.dim, 4 * args.dim, args.multiple_of, args.ffn_dim_multiplier)
        self.layer_id = layer_id
        self.attention_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, eps=args.norm_eps)

    def forward(self, x: torch.Tensor, start_pos: int, freqs_cis: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        h = x + self.attention(self.attention_norm(x), start_pos, freqs_cis, mask)
        return h + self.feed_forward(self.ffn_norm(h))


def check_ranks(args: ModelArgs, ranks: int) -> None:
    """Raise DeviceError unless a model with the sizes in `args` can be divided among `ranks` ranks."""
    divide(args.kv_heads, ranks, "key/value heads")
    divide(args.ffn_width, ranks, "feed-forward width")
    divide(args.vocab_size, ranks, "vocabulary")


class Transformer(nn.Module):
    """Compute the logits of the next tokens: tokens (B, S) at positions from start_pos on -> (B, S, vocab) in float32.

    Under `torch.device("meta")` the constructor allocates no memory. It leaves torch's default generator unchanged. Parameters
    require no gradient until `requires_grad_(True)` is called. From then on, `forward` is differentiable, and the keys and
    values of earlier calls are constants.
    """

    def __init__(self, params: ModelArgs) -> None:
        super().__init__()
        if params.vocab_size < 1:
            raise InputError(f"vocab_size is {params.vocab_size}; set it to the tokenizer's n_words")
        if params.dim % params.n_heads or params.head_dim % 2 or params.n_heads % params.kv_heads:
            raise InputError(
                f"dim={params.dim}, n_heads={params.n_heads}, n_kv_heads={params.n_kv_heads}: "
                "dim must be a multiple of n_heads, dim / n_heads even, and n_heads a multiple of n_kv_heads"
            )
        check_ranks(params, model_parallel()[1])
        self.params = params
        self.vocab_size = params.vocab_size
        self.n_layers = params.n_layers
        with torch.random.fork_rng(devices=[]):  # initializing the weights must not change torch's default generator
            self.tok_embeddings = ParallelEmbedding(params.vocab_size, params.dim)
            self.layers = nn.ModuleList(TransformerBlock(layer_id, params) for layer_id in range(params.n_layers))
            self.norm = RMSNorm(params.dim, eps=params.norm_eps)
            self.output = ColumnParallelLinear(params.dim, params.vocab_size, bias=False, gather_output=True)
        self._freqs_cis: torch.Tensor | None = None

    @property
    def freqs_cis(self) -> torch.Tensor:
        """Return rotations for 2 * max_seq_len positions, computed on first use so that a model on `meta` needs no memory."""
        if self._freqs_cis is None:
            args = self.params
            with torch.inference_mode(False):  # a tensor created in inference mode could not be used in training
                if args.rope_scale == 1:
                    self._freqs_cis = precompute_freqs_cis(args.head_dim, 2 * args.max_seq_len, args.rope_theta)
                else:
                    freqs = rotary_frequencies(args.head_dim, args.rope_theta) / args.rope_scale
                    self._freqs_cis = _rotations(freqs, 2 * args.max_seq_len)
        return self._freqs_cis

    @freqs_cis.setter
    def freqs_cis(self, freqs_cis: torch.Tensor) -> None:
        self._freqs_cis = freqs_cis

    def forward(self, tokens: torch.Tensor, start_pos: int) -> torch.Tensor:
        """Return the logits (B, S, vocab) of tokens (B, S).

        The tokens are at positions start_pos to start_pos + S - 1 of rows 0 to B - 1 of the KV cache. Raises InputError if the
        cache has too few rows or positions.
        """
        tokens, start_pos = self._checked(tokens, start_pos)
        S = tokens.shape[1]
        h = self.tok_embeddings(tokens)
        self.freqs_cis = self.freqs_cis.to(h.device)
        freqs_cis = self.freqs_cis[start_pos : start_pos + S]
        mask = None
        if S > 1:  # the token at position p attends to positions 0 to p
            mask = torch.full((S, start_pos + S), -math.inf, device=h.device, dtype=h.dtype).triu(start_pos + 1)
        for layer in self.layers:
            h = layer(h, start_pos, freqs_cis, mask)
        return self.output(self.norm(h)).float()

    def _checked(self, tokens: torch.Tensor, start_pos: int) -> tuple[torch.Tensor, int]:
        args = self.params
        if groups.rank0_leads:
            raise InputError(
                "the other ranks do not follow forward, only calls of `Llama`: end `lead`, and call it on all ranks"
            )
        if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise InputError(f"tokens is {tuple(tokens.shape)} of {tokens.dtype}; it must be (B, S), of int64")
        B, S = tokens.shape
        if B > args.max_batch_size:
            raise InputError(f"{B} rows, but the model was built for max_batch_size={args.max_batch_size}")
        try:
            start_pos = operator.index(start_pos)  # operator.index also accepts NumPy's integers
        except TypeError as e:
            raise InputError(f"start_pos is {describe(start_pos)}; it must be a whole number") from e
        if start_pos < 0 or start_pos + S > args.max_seq_len:
            raise InputError(f"start_pos={start_pos} and {S} tokens do not fit into max_seq_len={args.max_seq_len}")
        if tokens.is_cpu and tokens.numel() and not 0 <= tokens.min() <= tokens.max() < args.vocab_size:
            raise InputError(f"tokens are {tokens.min()} to {tokens.max()}; they must be from 0 to {args.vocab_size - 1}")
        return tokens.to(self.norm.weight.device), start_pos


__all__ = [
    "Attention", "FeedForward", "ModelArgs", "RMSNorm", "Transformer", "TransformerBlock",
    "apply_rotary_emb", "precompute_freqs_cis", "repeat_kv", "reshape_for_broadcast",
]  # fmt: skip
