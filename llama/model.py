"""The Transformer of Llama 2.

Ids enter packed, (N,) for all rows together, with a `Batch` that says where each stands; so do all activations, (N, dim).
Shapes are written with N ids, B rows of S ids, H query heads and K key/value heads of this rank, G = H / K, hd = head_dim.
The model knows nothing of text, sampling or files.
"""

import math
import operator
from collections.abc import Iterable
from ctypes import c_float as Float  # whose value is rounded to float32
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as nn_module

from . import native
from .attention import attend
from .cache import Batch, KVCache, Span, read, write
from .compiled import CompiledBlock
from .errors import InputError, kind
from .parallel import ColumnParallelLinear, JoinedColumnParallelLinear, ParallelEmbedding, RowParallelLinear, divide, join_parts
from .ranks import model_parallel
from .rotary import apply_rotary_emb, precompute_freqs_cis, reshape_for_broadcast, rotate_, rotate_plainly


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

    @property
    def ffn_width(self) -> int:
        return ffn_width(4 * self.dim, self.multiple_of, self.ffn_dim_multiplier)


# PyTorch 2.6 rounds eps to x's dtype where that has 16 bits: in float16 1e-9 to nothing.
EPS_IS_ROUNDED = bool(F.rms_norm(torch.zeros(1, dtype=torch.float16, device="cpu"), (1,), None, 1e-9).isnan())


class RMSNorm(nn.Module):
    """x (..., dim) -> (..., dim): x / sqrt(mean(x^2) + eps) in float32, cast back, times a weight per feature."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if native.rows_taken(x, x.shape[-1], self.weight):
            return native.normalized(x, self.weight, self.eps)
        if not x.is_cpu or x.dtype == torch.float64 or torch.is_grad_enabled() or torch.compiler.is_compiling():
            exactly = x.float() if EPS_IS_ROUNDED and x.dtype.itemsize == 2 else x
            normed = F.rms_norm(exactly, self.weight.shape, None, self.eps).type_as(x)
        else:
            normed = norm_one(x, self.eps) if x.numel() == x.shape[-1] else norm_rows(x, self.eps)
        return normed * self.weight  # apart: it multiplies what was cast


def norm_one(x: torch.Tensor, eps: float) -> torch.Tensor:
    """`norm_rows` of a decode step's only row, in 16 bits to the digit: two small kernels instead of eight, as the row's
    factor is a plain number, which multiplies in float32 whatever x's dtype and costs nothing to read on the CPU."""
    norm = torch.linalg.vector_norm(x, dtype=torch.float32).item()
    square = Float(Float(Float(norm * norm).value / x.shape[-1]).value + Float(eps).value).value
    return x * (Float(1 / Float(math.sqrt(square)).value).value if square else math.inf)


def norm_rows(x: torch.Tensor, eps: float) -> torch.Tensor:
    """The same of many rows; in 16 bits in two passes over them instead of six. Batch normalization by a given mean and
    variance is the kernel that scales rows, its channels, in float32: x / sqrt(variance + eps), here of the squares' mean."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, x.shape[-1:], None, eps)
    rows = x.flatten(0, -2)
    squares = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32).square_().div_(x.shape[-1])
    mean = torch.zeros_like(squares)
    return torch.batch_norm(rows.unsqueeze(0), None, None, mean, squares, False, 0.0, eps, False).view_as(x)


def repeat_kv(x: torch.Tensor, n_rep: int) -> torch.Tensor:
    """(B, S, kv, hd) -> (B, S, kv * n_rep, hd), each head repeated in place. The model itself never expands its cache."""
    return x.repeat_interleave(n_rep, dim=2)


class Attention(nn.Module):
    """Grouped-query attention: wo(attend(rotated queries and keys, values)), this rank's heads of it."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        ranks = model_parallel()[1]
        self.head_dim = args.head_dim
        self.n_local_kv_heads = divide(args.kv_heads, ranks, "key/value heads")
        self.n_rep = args.n_heads // args.kv_heads  # query heads to each
        queries, keys = args.n_heads * args.head_dim, args.kv_heads * args.head_dim
        self.wqkv = JoinedColumnParallelLinear(args.dim, {"wq": queries, "wk": keys, "wv": keys})
        self.wo = RowParallelLinear(queries, args.dim)
        self.register_load_state_dict_pre_hook(join_parts)

    def forward(self, x: torch.Tensor, where: "Where", cache: torch.Tensor | None) -> torch.Tensor:
        """x (N, dim) -> (N, dim). `cache` is this layer's, (2, rows, K, positions, hd)."""
        return self.wo(self.attend(*self.project(x, where, cache), where, cache))

    def project(self, x: torch.Tensor, where: "Where", cache: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """x (N, dim) -> queries (N, H, hd); keys and values (N, 2, K, hd), which go into the cache, too."""
        N, K, G, hd = x.shape[0], self.n_local_kv_heads, self.n_rep, self.head_dim
        heads = self.wqkv(x).view(N, K * G + 2 * K, hd)
        if torch.compiler.is_compiling():  # it fuses no complex numbers, and what is in place only after copying it
            q, k = rotate_plainly(heads[:, : K * G + K], where.freqs).split((K * G, K), 1)
            kv = torch.stack((k, heads[:, K * G + K :]), 1)
        else:
            rotate_(heads[:, : K * G + K], where.freqs)
            q, kv = heads[:, : K * G], heads[:, K * G :].view(N, 2, K, hd)
        if cache is not None:
            write(cache, where.batch, kv)
        return q, kv

    def attend(self, q: torch.Tensor, kv: torch.Tensor | None, where: "Where", cache: torch.Tensor | None) -> torch.Tensor:
        """What `project` gives -> (N, H * hd). A decode step needs no kv: all that it looks at is in the cache."""
        K, G, hd = self.n_local_kv_heads, self.n_rep, self.head_dim
        outputs, first = [], 0
        for span, mask in zip(where.batch.spans, where.masks, strict=True):
            B, S = span.n_rows, span.length
            ids = slice(first, first := first + B * S)
            if span.fresh:  # its own keys and values, not the cache's: exact, and differentiable
                assert kv is not None
                keys, values = kv[ids].view(B, S, 2, K, hd).permute(2, 0, 3, 1, 4).unbind()
            else:
                assert cache is not None, "without the cache a sequence must be whole"
                keys, values = read(cache, span)
            outputs.append(attend(q[ids].view(B, S, K, G, hd), keys, values, mask).reshape(B * S, -1))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def ffn_width(hidden_dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """The feed-forward's inner width: two thirds of `hidden_dim` (4 * dim), scaled, up to the next multiple."""
    width = int(2 * hidden_dim / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


class FeedForward(nn.Module):
    """x (N, dim) -> (N, dim): w2(silu(w1(x)) * w3(x)). `hidden_dim` is 4 * dim; see `ffn_width`."""

    def __init__(self, dim: int, hidden_dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> None:
        super().__init__()
        width = ffn_width(hidden_dim, multiple_of, ffn_dim_multiplier)
        self.w13 = JoinedColumnParallelLinear(dim, {"w1": width, "w3": width})
        self.w2 = RowParallelLinear(width, dim)
        self.register_load_state_dict_pre_hook(join_parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.gated(x))

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        packed = self.w13.packed
        if packed and self.w13.ranks == 1 and untouched([self.w13]) and (y := packed.swiglu(x)) is not None:
            return y
        both = self.w13(x)
        if native.rows_taken(both, both.shape[-1] // 2):
            return native.gated(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up


def check_ranks(args: ModelArgs, ranks: int) -> None:
    """Raise DeviceError unless a model can be divided among so many ranks."""
    for n, what in (
        (args.kv_heads, "key/value heads"),
        (args.ffn_width, "feed-forward width"),
        (args.vocab_size, "vocabulary"),
    ):
        divide(n, ranks, what)


class TransformerBlock(nn.Module):
    """x (N, dim) -> (N, dim): h = x + attention(norm(x)), then h + feed_forward(norm(h))."""

    def __init__(self, layer_id: int, args: ModelArgs) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args.dim, 4 * args.dim, args.multiple_of, args.ffn_dim_multiplier)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: torch.Tensor, where: "Where", cache: torch.Tensor | None) -> torch.Tensor:
        h = x + self.attention(self.attention_norm(x), where, cache)
        if where.wanted is not None:
            h = h[where.wanted]
        return h + self.feed_forward(self.ffn_norm(h))


@dataclass(frozen=True)
class Where:
    """What all layers of one forward share: the batch, its angles (N, 1, hd/2, 2) and its masks.

    wanted: the ids whose outputs the last layer is to give, (M,), where nothing but keys and values of the others is needed.
    """

    batch: Batch
    freqs: torch.Tensor
    masks: list[torch.Tensor | None]
    wanted: torch.Tensor | None = None


LAYERS = ColumnParallelLinear, JoinedColumnParallelLinear, RowParallelLinear, ParallelEmbedding
OURS: dict[type, dict[str, Any]] = {
    kind: {name: getattr(kind, name) for name in ("attend", "forward", "gated", "multiply", "project") if hasattr(kind, name)}
    for kind in (Attention, FeedForward, RMSNorm, TransformerBlock, *LAYERS)
}


def untouched(modules: Iterable[nn.Module]) -> bool:
    """Whether all of these, and there are some, are modules of ours that do what this file says: no function of a caller's in
    them, not compiled, not watched by a hook."""

    def plain(module: nn.Module, name: str) -> bool:
        method = getattr(module, name, None)  # a caller may have put it back, bound, where it was
        return getattr(method, "__func__", None) is OURS[type(module)][name] and getattr(method, "__self__", module) is module

    modules = list(modules)
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return False
    return bool(modules) and all(
        type(m) in OURS
        and not (m._forward_hooks or m._forward_pre_hooks or m._compiled_call_impl)
        and all(plain(m, name) for name in OURS[type(m)])
        for m in modules
    )


def forget(model: "Transformer", _: object) -> None:
    """After `load_state_dict`: the cache holds keys and values of other weights."""
    if model.cache is not None:
        model.cache.turn = None


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
        ranks = model_parallel()[1]
        check_ranks(params, ranks)
        self.n_local_kv_heads = params.kv_heads // ranks
        self.params = params
        self.vocab_size = params.vocab_size
        self.n_layers = params.n_layers
        self.tok_embeddings = ParallelEmbedding(params.vocab_size, params.dim)
        self.layers = nn.ModuleList(TransformerBlock(i, params) for i in range(params.n_layers))
        self.norm = RMSNorm(params.dim, params.norm_eps)
        self.output = ColumnParallelLinear(params.dim, params.vocab_size, gather_output=True)
        self.cache: KVCache | None = None
        self.compiled: CompiledBlock | None = None
        self.register_load_state_dict_post_hook(forget)
        self.rope: torch.Tensor | None = None  # float32 (max_seq_len, 1, hd/2, 2): cosines and sines

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

    def ready_cache(self) -> KVCache:
        """The cache, made anew where there is none or the weights have gone to another device or dtype."""
        cache = self.cache
        if cache is None or cache.data.device != self.device or cache.data.dtype != self.dtype:
            return self.allocate()
        return cache

    def angles(self, positions: torch.Tensor | slice) -> torch.Tensor:
        """Cosines and sines at positions (N,), (N, 1, hd/2, 2)."""
        if self.rope is None or self.rope.device != self.device:
            args = self.params
            freqs = precompute_freqs_cis(args.head_dim, args.max_seq_len, args.rope_theta)
            with torch.inference_mode(False):
                self.rope = torch.view_as_real(freqs).unsqueeze(1).to(self.device)
        return self.rope[positions]

    def compile(self, **options: Any) -> None:  # type: ignore[override]
        """Have torch.compile fuse the small kernels of a block, for forwards that ask for it (compiled.py)."""
        self.compiled = CompiledBlock(**options)

    def hidden(
        self,
        tokens: torch.Tensor,
        batch: Batch,
        keep: bool = True,
        compiled: bool = False,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """ids (N,) -> the last layer's normed output (N, dim). Their keys and values go into the cache.

        wanted: of these ids only, (M,): the output is (M, dim), and so is what the last layer's feed-forward sees.
        keep=False: for whole sequences that nothing will follow (training): no cache is needed, nor its limit of rows.
        compiled=True: by the compiled block, if there is one, which is compiled anew for each number of ids.
        """
        cache = self.ready_cache() if keep else None
        where = Where(batch, self.angles(batch.positions), batch.masks(self.dtype))
        h = self.tok_embeddings(tokens)
        block = self.compiled if compiled and self.compiled else TransformerBlock.__call__
        rows = None if wanted is None else wanted if len(wanted) else wanted.new_zeros(1)  # kernels need a row
        few = rows is not None and untouched(list(self.layers)[-1:])
        for i, layer in enumerate(self.layers):
            if few and i == len(self.layers) - 1:
                where = replace(where, wanted=rows)
            h = block(layer, h, where, cache.layers[i] if cache else None)
        if rows is None:
            return self.norm(h)
        return self.norm(h if few else h[rows])[: len(wanted)]  # type: ignore[arg-type]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> float32 (..., vocab)."""
        return self.output(hidden).float()

    def forward(self, tokens: torch.Tensor, start_pos: int) -> torch.Tensor:
        """ids (B, S) of the cache's rows 0..B, at positions start_pos..start_pos + S -> float32 logits (B, S, vocab).

        Differentiable at start_pos 0; what an earlier call left in the cache is a constant.
        """
        if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise InputError(f"tokens is {tuple(tokens.shape)} of {tokens.dtype}; it must be ids (B, S) of int64")
        B, S = tokens.shape
        args = self.params
        if B > args.max_batch_size:
            raise InputError(f"{B} rows, but the model was built for max_batch_size={args.max_batch_size}")
        if not isinstance(start_pos, int):  # NumPy's numbers are welcome
            try:
                start_pos = operator.index(start_pos)
            except TypeError as e:
                raise InputError(f"start_pos is {kind(start_pos)}; it must be a whole number") from e
        if start_pos < 0 or start_pos + S > args.max_seq_len:
            raise InputError(f"start_pos={start_pos} and {S} ids do not fit into the window of max_seq_len={args.max_seq_len}")
        if B == 0 or S == 0:
            return torch.empty(B, S, args.vocab_size, dtype=torch.float32, device=self.device)
        if tokens.is_cpu and not torch.compiler.is_compiling() and not 0 <= tokens.min() <= tokens.max() < args.vocab_size:
            raise InputError(f"tokens are {int(tokens.min())} to {int(tokens.max())}; ids are 0 to {args.vocab_size - 1}")
        batch = Batch.of([(row, start_pos, S) for row in range(B)], self.device)
        self.ready_cache().turn = None  # before, since what fails midway has overwritten some of it
        hidden = self.hidden(tokens.to(self.device).flatten(), batch)
        return self.logits(hidden).view(B, S, -1)


__all__ = [
    "Attention", "Batch", "FeedForward", "KVCache", "ModelArgs", "RMSNorm", "Span", "Transformer", "TransformerBlock",
    "apply_rotary_emb", "precompute_freqs_cis", "repeat_kv", "reshape_for_broadcast",
]  # fmt: skip
