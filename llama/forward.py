"""The engine's forward: what `Transformer` computes, for the tokens of several rows packed side by side.

Tokens enter as (N,) with a `Batch` that says where each stands, and activations are (N, dim): no padding, and prompts of any
lengths in one pass. It uses the model's own parameters; those that share an input and adjoin in memory are multiplied as one.
Shapes: H query heads and K key/value heads of this rank, G = H / K, hd = head_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region, reduce_from_model_parallel_region

from . import native
from .attention import attend
from .cache import Batch, KVCache, read, write
from .kernel import Kernel
from .model import RMSNorm, Transformer, TransformerBlock
from .packed import PackedWeight, SharedKernel, as_one
from .widened import linear

# PyTorch 2.6 rounds eps to x's dtype where that has 16 bits: in float16 1e-9 to nothing.
EPS_IS_ROUNDED = bool(F.rms_norm(torch.zeros(1, dtype=torch.float16, device="cpu"), (1,), None, 1e-9).isnan())
# PyTorch splits more complex numbers than this among threads. A split may fall inside a head, and the last numbers before it
# round differently: a row's result would depend on the number of rows.
ALONE = 32767


def place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


class Product:
    """Multiply x (..., in) by one weight, or by several of one input: (..., sum of outs), this rank's part."""

    def __init__(self, *weights: torch.Tensor) -> None:
        one = as_one(weights)
        self.kernel = one if isinstance(one, Kernel) else None
        self.weight = one if isinstance(one, torch.Tensor) else None
        self.parts = [Product(weight) for weight in weights] if one is None and len(weights) > 1 else []
        self.part = None  # rows of a kernel that cannot be cut
        if one is None and not self.parts:
            assert isinstance(weights[0], PackedWeight)
            self.part = weights[0]

    def addresses(self) -> list[Any]:
        """Return what it multiplies by: kernels, and where plain weights lie."""
        if self.parts:
            return [address for part in self.parts for address in part.addresses()]
        if self.part is not None:
            return [self.part.shared.kernel]
        return [self.kernel if self.weight is None else place(self.weight)]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(x)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self.kernel is not None:
            return self.kernel.product(x)
        if self.weight is not None:
            return linear(x, self.weight)
        if self.part is not None:
            return F.linear(x, self.part)
        return torch.cat([part.multiply(x) for part in self.parts], dim=-1)


class Norm:
    def __init__(self, norm: RMSNorm) -> None:
        self.weight, self.eps = norm.weight.detach(), norm.eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.apply(x)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x (..., dim) as `RMSNorm` does."""
        if native.rows_taken(x, x.shape[-1], self.weight):
            return native.normalized(x, self.weight, self.eps)
        exactly = x.float() if x.dtype.itemsize == 2 and (x.is_cpu or EPS_IS_ROUNDED) else x
        return F.rms_norm(exactly, self.weight.shape, None, self.eps).type_as(x) * self.weight


def no_complex_numbers(x: torch.Tensor) -> bool:
    return torch.compiler.is_compiling() or x.device.type == "mps"


def rotate_(heads: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """Rotate adjacent pairs of heads (N, n, hd) in place, in float32, by cosines and sines (N, 1, hd/2, 2)."""
    wide = heads.float()  # heads itself where it is float32
    pairs = torch.view_as_complex(wide.view(*heads.shape[:-1], -1, 2))
    n = max(1, ALONE // (heads.shape[-2] * heads.shape[-1] // 2)) if heads.is_cpu else len(heads)
    for some, turns in zip(pairs.split(n), torch.view_as_complex(freqs).split(n), strict=True):
        some.mul_(turns)
    return heads if wide is heads else heads.copy_(wide)


def rotate_pairs(heads: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """Return what `rotate_` makes of heads, computed with real numbers."""
    a, b = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = freqs.unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(heads.dtype)


@dataclass(frozen=True)
class ForwardContext:
    """What all layers of one forward share: the batch, its rotations (N, 1, hd/2, 2), and a mask for each span."""

    batch: Batch
    freqs: torch.Tensor
    masks: list[torch.Tensor | None]


class Layer:
    """One layer's weights, and the computation of `TransformerBlock` with them."""

    def __init__(self, block: TransformerBlock) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        self.K, self.G, self.hd = attention.n_local_kv_heads, attention.n_rep, attention.head_dim
        self.ranks = attention.wo.ranks
        self.attention_norm, self.ffn_norm = Norm(block.attention_norm), Norm(block.ffn_norm)
        self.wqkv = Product(attention.wq.weight, attention.wk.weight, attention.wv.weight)
        self.wo = Product(attention.wo.weight)
        self.w13 = Product(feed_forward.w1.weight, feed_forward.w3.weight)
        self.w2 = Product(feed_forward.w2.weight)

    def __call__(self, x: torch.Tensor, context: ForwardContext, cache: torch.Tensor | None) -> torch.Tensor:
        h = self.attended(x, context, cache)
        return h + self.summed(self.w2.multiply(self.gated(self.ffn_norm.apply(h))))

    def attended(self, x: torch.Tensor, context: ForwardContext, cache: torch.Tensor | None) -> torch.Tensor:
        """x (N, dim) with attention added."""
        q, kv = self.project(self.attention_norm.apply(x), context, cache)
        return x + self.summed(self.wo.multiply(self.attend(q, kv, context, cache)))

    def summed(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.ranks == 1 else reduce_from_model_parallel_region(y)

    def project(
        self, x: torch.Tensor, context: ForwardContext, cache: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x (N, dim) -> queries (N, H, hd); keys and values (N, 2, K, hd), which go into this layer's cache, too."""
        N, K, G, hd = len(x), self.K, self.G, self.hd
        heads = self.wqkv.multiply(x).view(N, (G + 2) * K, hd)
        if no_complex_numbers(x):
            rotated = rotate_pairs(heads[:, : (G + 1) * K], context.freqs)
            kv = torch.stack((rotated[:, G * K :], heads[:, (G + 1) * K :]), dim=1)
        else:
            rotated = rotate_(heads[:, : (G + 1) * K], context.freqs)
            kv = heads[:, G * K :].view(N, 2, K, hd)
        if cache is not None:
            write(cache, context.batch, kv)
        return rotated[:, : G * K], kv

    def attend(
        self, q: torch.Tensor, kv: torch.Tensor | None, context: ForwardContext, cache: torch.Tensor | None
    ) -> torch.Tensor:
        """What `project` gives -> (N, H * hd). A decode step needs no kv: all that it looks at is in the cache."""
        K, G, hd = self.K, self.G, self.hd
        outputs, first = [], 0
        for span, mask in zip(context.batch.spans, context.masks, strict=True):
            B, S = span.n_rows, span.length
            own = slice(first, first := first + B * S)
            if span.fresh and kv is not None:  # its own keys and values, not the cache's: there may be none
                keys, values = kv[own].view(B, S, 2, K, hd).permute(2, 0, 3, 1, 4).unbind()
            else:
                assert cache is not None, "without the cache a sequence must be whole"
                keys, values = read(cache, span)
            outputs.append(attend(q[own].view(B, S, K, G, hd), keys, values, mask).reshape(B * S, -1))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, dim) -> silu(w1(x)) * w3(x), (N, width)."""
        kernel = self.w13.kernel
        if kernel is not None and (y := kernel.swiglu(x)) is not None:
            return y
        both = self.w13.multiply(x)
        if native.rows_taken(both, both.shape[-1] // 2):
            return native.gated(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up


Block = Callable[[Layer, torch.Tensor, ForwardContext, "torch.Tensor | None"], torch.Tensor]


class Forward:
    """A model's weights as they are now, and its cache. Made anew for each call: parameters may have been replaced."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.layers = [Layer(block) for block in cast("list[TransformerBlock]", list(model.layers))]
        self.norm, self.output = Norm(model.norm), Product(model.output.weight)
        self.ranks = model.output.ranks
        model.freqs_cis = model.freqs_cis.to(self.device)
        cosines_and_sines = torch.view_as_real(model.freqs_cis.resolve_conj())
        self.freqs = cosines_and_sines.unsqueeze(1)  # (positions, 1, hd/2, 2)

    def marks(self) -> list[Any]:
        """Return what changes when a weight is replaced or edited in place, though not through `.data`, which nobody counts."""
        freqs = self.model.freqs_cis
        weights = [(id(weight), weight.data_ptr(), weight._version) for weight in self.model.parameters()]
        return [SharedKernel.changes, id(freqs), freqs._version, *weights]

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def hidden(
        self,
        tokens: torch.Tensor,
        batch: Batch,
        keep: bool = True,
        block: Block = Layer.__call__,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """tokens (N,) -> the last layer's normalized output (N, dim). Their keys and values go into the cache.

        keep=False: for whole sequences that nothing will follow: the cache is neither needed nor touched.
        wanted: indices (M,) of the tokens to return, (M, dim); the last layer's feed-forward runs on these only.
        """
        context = ForwardContext(batch, self.freqs[batch.positions], batch.masks(self.dtype))
        h = self.model.tok_embeddings(tokens)
        *layers, last = self.layers
        for i, layer in enumerate(layers):
            h = block(layer, h, context, self.cache.layers[i] if keep else None)
        cache = self.cache.layers[len(layers)] if keep else None
        if wanted is None:
            return self.norm.apply(block(last, h, context, cache))
        rows = wanted if len(wanted) else wanted.new_zeros(1)  # kernels need a row
        h = last.attended(h, context, cache)[rows]
        h = h + last.summed(last.w2.multiply(last.gated(last.ffn_norm.apply(h))))
        return self.norm.apply(h)[: len(wanted)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> float32 (..., vocab)."""
        y = self.output.multiply(hidden).float()
        return y if self.ranks == 1 else gather_from_model_parallel_region(y)

    def addresses(self) -> list[Any]:
        """Return the kernels and the places of tensors that a captured step reads; loading weights may change them."""
        found: list[Any] = [self.cache, place(self.freqs), place(self.model.tok_embeddings.weight)]
        for norm in (self.norm, *(norm for layer in self.layers for norm in (layer.attention_norm, layer.ffn_norm))):
            found += [place(norm.weight), norm.eps]
        for product in (self.output, *(p for layer in self.layers for p in (layer.wqkv, layer.wo, layer.w13, layer.w2))):
            found += product.addresses()
        return found
