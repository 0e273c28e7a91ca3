"""The engine's forward: compute what `Transformer` computes, for the tokens of several rows side by side, without padding.

`EngineForward` takes tokens (N,), and a `RaggedBatch` with the row and the position of each token. Activations are (N, dim), so
prompts of any lengths fit in one forward. The parameters are those of the model. Weights that multiply the same input and are
adjacent in memory are multiplied as one matrix.
Shapes: H query heads and K key/value heads of this rank, G = H / K, hd = head_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region, reduce_from_model_parallel_region

from .. import compat, tuning
from ..kernels import avx512
from ..kernels.attention import attention, masked_attention
from ..kernels.base import LinearKernel
from ..kernels.half_precision import linear
from ..kernels.packed_weight import PackedWeight, SharedKernel, merge_weights
from ..model import RMSNorm, Transformer, TransformerBlock
from .kv_cache import KVCache, RaggedBatch, kv_view, store_kv


def memory_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a tensor's address, dtype, shape and strides. A captured decode step is valid only while these do not change."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


class MergedLinear:
    """Multiply x (..., in) by one or more weights (out, in), and concatenate the products to (..., sum of all out)."""

    def __init__(self, *weights: torch.Tensor) -> None:
        merged = merge_weights(weights)
        self.kernel = merged if isinstance(merged, LinearKernel) else None
        self.weight = merged if isinstance(merged, torch.Tensor) else None
        self.parts = [MergedLinear(weight) for weight in weights] if merged is None and len(weights) > 1 else []
        # A packed weight whose rows of a shared kernel cannot be multiplied alone without a copy; None in all other cases.
        self.rows_of_kernel = None
        if merged is None and not self.parts:
            assert isinstance(weights[0], PackedWeight)
            self.rows_of_kernel = weights[0]

    def dependencies(self) -> list[Any]:
        """Return what a captured step depends on: kernels and, for each unpacked weight, a key that identifies its memory."""
        if self.parts:
            return [each for part in self.parts for each in part.dependencies()]
        if self.rows_of_kernel is not None:
            return [self.rows_of_kernel.shared.kernel]
        return [self.kernel if self.weight is None else memory_key(self.weight)]

    def forward(self, x: torch.Tensor, decoding: bool) -> torch.Tensor:
        """Return x (N, in) times the weight, (N, out).

        decoding: True in a decode step, False in a prefill. A kernel may round the two differently.
        """
        if self.kernel is not None:
            return self.kernel.decode(x) if decoding else self.kernel.prefill(x)
        if self.weight is not None:
            return linear(x, self.weight)
        if self.rows_of_kernel is not None:
            return F.linear(x, self.rows_of_kernel)
        return torch.cat([part.forward(x, decoding) for part in self.parts], dim=-1)


class EngineNorm:
    """Compute `RMSNorm` with the fastest kernel available."""

    def __init__(self, norm: RMSNorm) -> None:
        self.weight, self.eps = compat.detach(norm.weight), norm.eps
        self.rounds_eps = compat.rms_norm_rounds_eps()  # code for torch.compile cannot call a cached function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x (..., dim) as `RMSNorm` does."""
        if avx512.supports_rows(x, x.shape[-1], self.weight):
            return avx512.rms_norm(x, self.weight, self.eps)
        wide = x.float() if x.dtype.itemsize == 2 and (x.is_cpu or self.rounds_eps) else x
        return F.rms_norm(wide, self.weight.shape, None, self.eps).type_as(x) * self.weight


def avoids_complex(x: torch.Tensor) -> bool:
    """Return True where complex numbers are slow or not supported: in code compiled by torch.compile, and on MPS."""
    return torch.compiler.is_compiling() or x.device.type == "mps"


def apply_rope_(heads: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """Apply RoPE to heads (N, n, hd) in place, in float32. freqs: cosines and sines of the rotations, (N, 1, hd/2, 2)."""
    wide = heads.float()  # no copy if heads are float32 already
    pairs = torch.view_as_complex(wide.view(*heads.shape[:-1], -1, 2))
    # On the CPU, rotate only a few rows at a time, so that PyTorch uses a single thread: see compat.MAX_SERIAL_COMPLEX.
    n = max(1, compat.MAX_SERIAL_COMPLEX // (heads.shape[-2] * heads.shape[-1] // 2)) if heads.is_cpu else len(heads)
    for rows, rotations in zip(pairs.split(n), torch.view_as_complex(freqs).split(n), strict=True):
        rows.mul_(rotations)
    return heads if wide is heads else heads.copy_(wide)


def apply_rope_real(heads: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """Return heads with RoPE applied, as `apply_rope_` does, but in a new tensor and without complex numbers."""
    a, b = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = freqs.unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(heads.dtype)


@dataclass(frozen=True)
class ForwardContext:
    """The inputs that all layers share: the batch, its RoPE rotations (N, 1, hd/2, 2), and an attention mask per segment."""

    batch: RaggedBatch
    freqs: torch.Tensor
    masks: list[torch.Tensor | None]


class EngineLayer:
    """Compute what a `TransformerBlock` computes, with the weights of that block."""

    def __init__(self, block: TransformerBlock) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        self.K, self.G, self.hd = attention.n_local_kv_heads, attention.n_rep, attention.head_dim
        self.ranks = attention.wo.ranks
        self.attention_norm, self.ffn_norm = EngineNorm(block.attention_norm), EngineNorm(block.ffn_norm)
        self.wqkv = MergedLinear(attention.wq.weight, attention.wk.weight, attention.wv.weight)
        self.wo = MergedLinear(attention.wo.weight)
        self.w13 = MergedLinear(feed_forward.w1.weight, feed_forward.w3.weight)
        self.w2 = MergedLinear(feed_forward.w2.weight)

    def forward(self, x: torch.Tensor, context: ForwardContext, cache: torch.Tensor | None) -> torch.Tensor:
        """Run the layer on x (N, dim), and return (N, dim). cache: the KV cache of this layer, or None."""
        h = self.add_attention(x, context, cache)
        return self.add_feed_forward(h, context)

    def add_attention(self, x: torch.Tensor, context: ForwardContext, cache: torch.Tensor | None) -> torch.Tensor:
        """Return x (N, dim) plus the output of attention."""
        q, kv = self.project_qkv(self.attention_norm.forward(x), context, cache)
        return x + self.all_reduced(self.wo.forward(self.attend(q, kv, context, cache), context.batch.decoding))

    def add_feed_forward(self, h: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Return h (N, dim) plus the output of the feed-forward network."""
        decoding = context.batch.decoding
        return h + self.all_reduced(self.w2.forward(self.swiglu(self.ffn_norm.forward(h), decoding), decoding))

    def all_reduced(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.ranks == 1 else reduce_from_model_parallel_region(y)

    def project_qkv(
        self, x: torch.Tensor, context: ForwardContext, cache: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Project x (N, dim) to queries, keys and values, and apply RoPE. Store keys and values in the cache, if there is one.

        Return the queries (N, H, hd), and the keys and values in one tensor (N, 2, K, hd).
        """
        N, K, G, hd = len(x), self.K, self.G, self.hd
        heads = self.wqkv.forward(x, context.batch.decoding).view(N, (G + 2) * K, hd)
        if avoids_complex(x):
            rotated = apply_rope_real(heads[:, : (G + 1) * K], context.freqs)
            kv = torch.stack((rotated[:, G * K :], heads[:, (G + 1) * K :]), dim=1)
        else:
            rotated = apply_rope_(heads[:, : (G + 1) * K], context.freqs)
            kv = heads[:, G * K :].view(N, 2, K, hd)
        if cache is not None:
            store_kv(cache, context.batch, kv)
        return rotated[:, : G * K], kv

    def attend(
        self, q: torch.Tensor, kv: torch.Tensor | None, context: ForwardContext, cache: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the attention (N, H * hd) of queries q (N, H, hd).

        kv: keys and values of the new tokens, as returned by `project_qkv`; None to read all keys and values from the cache.
        """
        K, G, hd = self.K, self.G, self.hd
        outputs, first = [], 0
        for segment, mask in zip(context.batch.segments, context.masks, strict=True):
            B, S = segment.n_rows, segment.length
            tokens = slice(first, first := first + B * S)
            if segment.starts_at_zero and kv is not None:  # the new tokens attend only to each other
                keys, values = kv[tokens].view(B, S, 2, K, hd).permute(2, 0, 3, 1, 4).unbind()
            elif segment.kv_indices is not None and kv is not None:
                keys, values = kv[segment.kv_indices].permute(2, 0, 3, 1, 4).unbind()
            else:
                assert cache is not None, "without the cache a sequence must be whole"
                keys, values = kv_view(cache, segment)
            queries = q[tokens].view(B, S, K, G, hd)
            if segment.per_row_positions and S > 1 and mask is not None:
                outputs.append(masked_attention(queries, keys, values, mask).reshape(B * S, -1))
            else:
                outputs.append(attention(queries, keys, values, mask).reshape(B * S, -1))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def swiglu(self, x: torch.Tensor, decoding: bool) -> torch.Tensor:
        """Return silu(w1(x)) * w3(x) of shape (N, width) for x (N, dim)."""
        kernel = self.w13.kernel
        if kernel is not None and (y := kernel.swiglu(x, decoding)) is not None:
            return y
        both = self.w13.forward(x, decoding)
        if avx512.supports_rows(both, both.shape[-1] // 2):
            return avx512.swiglu(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up


LayerFn = Callable[[EngineLayer, torch.Tensor, ForwardContext, "torch.Tensor | None"], torch.Tensor]


class EngineForward:
    """Run a model with its current weights and its KV cache.

    The engine creates an `EngineForward` for each call, since parameters may have been replaced between two calls.
    """

    def __init__(self, model: Transformer, cache: KVCache, n_words: int | None = None) -> None:
        """Prepare a forward. n_words: number of tokens in the logits, the first in the vocabulary; None for all."""
        self.model, self.cache = model, cache
        self.n_words = min(n_words or model.vocab_size, model.vocab_size)
        self.layers = [EngineLayer(block) for block in cast("list[TransformerBlock]", list(model.layers))]
        self.embedding = compat.detach(model.tok_embeddings.weight)
        self.norm, self.output = EngineNorm(model.norm), MergedLinear(model.output.weight)
        self.ranks = model.output.ranks
        model.freqs_cis = model.freqs_cis.to(self.device)
        cosines_and_sines = torch.view_as_real(model.freqs_cis.resolve_conj())
        self.freqs = cosines_and_sines.unsqueeze(1)  # RoPE rotations, (positions, 1, hd/2, 2)

    def weights_version(self) -> list[Any]:
        """Return a list that changes if a weight is replaced or edited in place.

        Edits through `.data` do not change the list, since PyTorch does not count them: see `notices_edits`.
        """
        freqs = self.model.freqs_cis
        weights = [(id(weight), weight.data_ptr(), compat.version_of(weight)) for weight in self.model.parameters()]
        eps = [norm.eps for norm in self.norms]
        return [SharedKernel.n_edits, id(freqs), compat.version_of(freqs), *eps, *weights]

    @property
    def norms(self) -> list[EngineNorm]:
        return [self.norm, *(norm for layer in self.layers for norm in (layer.attention_norm, layer.ffn_norm))]

    def notices_edits(self) -> bool:
        """Return True if no edit of a weight or of the cache escapes `weights_version` and `KVCache.is_unchanged`.

        Edits escape if a caller has taken a tensor's `.data`, or has put in a tensor of their own.
        """
        attentions = [block.attention for block in cast("list[TransformerBlock]", list(self.model.layers))]
        caches = [cache for attention in attentions for cache in (attention.cache_k, attention.cache_v)]
        weights = [weight for weight in self.model.parameters() if not isinstance(weight, PackedWeight)]
        return all(map(compat.is_observed, [self.model.freqs_cis, *caches, *weights]))

    @property
    def is_batch_invariant(self) -> bool:
        """Return True if results do not depend on the batch: with AVX-512 kernels and bfloat16 activations, on one rank.

        On several ranks it is False, since they must share prefixes alike, and their CPUs may differ.
        """
        return self.ranks == 1 and avx512.is_plain_bf16(self.norm.weight)

    def prefix_multiple(self, score_only: bool) -> int:
        """Return a number: prompts share prefixes whose lengths are multiples of it.

        A prefill that begins there rounds its results as a prefill of the whole prompt does: anywhere with the AVX-512 kernel
        for prompts, else where a chunk of attention begins. score_only: for a call that only scores sequences, this is only so
        if results do not depend on the batch; elsewhere, to share more is worth different last digits.
        """
        has_kernel = self.is_batch_invariant and self.layers[0].hd % 64 == 0
        return 1 if has_kernel or (score_only and not self.is_batch_invariant) else tuning.ATTENTION_CHUNK

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def hidden_states(
        self,
        tokens: torch.Tensor,
        batch: RaggedBatch,
        use_cache: bool = True,
        layer_fn: LayerFn = EngineLayer.forward,
        logits_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the hidden states (N, dim) of tokens (N,) after the last layer and norm. Keys and values go into the cache.

        use_cache: False if the batch has whole sequences that are not continued, whose segments start at position 0 or have
        `kv_indices`; the cache is then neither read nor written.
        logits_indices: indices (M,) of the tokens whose hidden states (M, dim) are needed; by default all are returned.
        """
        context = ForwardContext(batch, self.freqs[batch.positions], batch.masks(self.dtype))
        h = self.model.tok_embeddings.embed(tokens, self.embedding)
        *layers, last = self.layers
        for i, layer in enumerate(layers):
            h = layer_fn(layer, h, context, self.cache.layers[i] if use_cache else None)
        cache = self.cache.layers[len(layers)] if use_cache else None
        if logits_indices is None:
            return self.norm.forward(layer_fn(last, h, context, cache))
        rows = logits_indices if len(logits_indices) else logits_indices.new_zeros(1)  # kernels need at least one row
        h = last.add_feed_forward(last.add_attention(h, context, cache)[rows], context)
        return self.norm.forward(h)[: len(logits_indices)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return float32 logits (..., n_words) of hidden states (..., dim)."""
        y = self.output.forward(hidden, decoding=True).float()
        return self.without_spare_rows(y if self.ranks == 1 else gather_from_model_parallel_region(y))

    def without_spare_rows(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits (..., n_words) of the tokenizer's tokens, given logits (..., vocab)."""
        return logits if logits.shape[-1] == self.n_words else logits[..., : self.n_words]

    def graph_dependencies(self) -> list[Any]:
        """Return the cache, kernels and memory that a captured decode step reads. If one changes, recapture the step."""
        found: list[Any] = [self.cache, self.n_words, memory_key(self.freqs), memory_key(self.model.tok_embeddings.weight)]
        for norm in self.norms:
            found += [memory_key(norm.weight), norm.eps]
        for weight in (self.output, *(p for layer in self.layers for p in (layer.wqkv, layer.wo, layer.w13, layer.w2))):
            found += weight.dependencies()
        return found
