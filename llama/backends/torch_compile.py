"""The torch_compile backend: captured decode steps whose layers are compiled by torch.compile.

All layers share the same compiled code, which is compiled again for each number of rows. A layer is compiled in three parts.
Attention runs between the first and the second part and is not compiled, because its shapes depend on the context length. The
second part ends with the input of w2, so that this input is written to memory; if it were fused into the product with w2, it
would be computed again for each output. On several ranks, the sums over the ranks split a layer into more parts.
"""

import functools
from typing import Any

import torch
from fairscale.nn.model_parallel.mappings import reduce_from_model_parallel_region

from .. import compat
from ..engine.forward import EngineForward, EngineLayer, ForwardContext, MergedLinear
from ..engine.kv_cache import RaggedBatch
from ..errors import DeviceError
from .cuda_graphs import CapturedStep, CudaGraphsBackend


def pre_attention(layer: EngineLayer, x: torch.Tensor, context: ForwardContext, cache: torch.Tensor | None) -> torch.Tensor:
    """Return the queries (B, heads, hd) of hidden states x (B, dim). Store their keys and values in the KV cache."""
    return layer.project_qkv(layer.attention_norm.forward(x), context, cache)[0]


def post_attention(layer: EngineLayer, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the result of attention to x (B, dim). Return the sum h (B, dim) and the input of w2 (B, width).

    y: the output of attention; on several ranks, already multiplied by wo.
    """
    h = x + (layer.wo.forward(y, decoding=True) if layer.ranks == 1 else y)
    return h, layer.swiglu(layer.ffn_norm.forward(h), decoding=True)


def ffn_down(layer: EngineLayer, h: torch.Tensor, gated: torch.Tensor) -> torch.Tensor:
    """Multiply `gated`, the input of w2 (B, width), by w2, and return the product plus h: (B, dim)."""
    return h + layer.w2.forward(gated, decoding=True)


def linear(weight: MergedLinear, x: torch.Tensor) -> torch.Tensor:
    """Multiply x (B, in) by a weight: (B, out)."""
    return weight.forward(x, decoding=True)


def logits(forward: EngineForward, hidden: torch.Tensor) -> torch.Tensor:
    """Multiply hidden states (B, dim) by the output weight, and return float32 logits (B, vocab)."""
    return forward.output.forward(hidden, decoding=True).float()


class CompiledLayer:
    """Compiled versions of `EngineLayer.forward` and `EngineForward.logits`.

    options: arguments of torch.compile; default: `compat.inductor_options()`.
    """

    def __init__(self, **options: Any) -> None:
        compile_: Any = functools.partial(
            torch.compile, fullgraph=True, dynamic=False, **(options or compat.inductor_options())
        )
        self.pre_attention, self.post_attention, self.ffn_down = map(compile_, (pre_attention, post_attention, ffn_down))
        self.linear, self.compiled_logits = compile_(linear), compile_(logits)

    def __call__(
        self, layer: EngineLayer, x: torch.Tensor, context: ForwardContext, cache: torch.Tensor | None
    ) -> torch.Tensor:
        """Run one layer of a decode step: x (B, dim) -> (B, dim)."""
        q = self.pre_attention(layer, x, context, cache)
        y = layer.attend(q, None, context, cache)
        if layer.ranks == 1:
            return self.ffn_down(layer, *self.post_attention(layer, x, y))
        h, gated = self.post_attention(layer, x, self.all_reduced(layer.wo, y))
        return h + self.all_reduced(layer.w2, gated)

    def all_reduced(self, weight: MergedLinear, x: torch.Tensor) -> torch.Tensor:
        """Multiply x by a weight with compiled code. Then sum over the ranks, which torch.compile cannot compile."""
        return reduce_from_model_parallel_region(self.linear(weight, x))

    def logits(self, forward: EngineForward, hidden: torch.Tensor) -> torch.Tensor:
        """Compute float32 logits (B, n_words) from hidden states (B, dim)."""
        if forward.ranks > 1:
            return forward.logits(hidden)
        return forward.without_spare_rows(self.compiled_logits(forward, hidden))


class TorchCompileBackend(CudaGraphsBackend):
    """Run captured decode steps whose layers torch.compile compiles. options: arguments of torch.compile."""

    name = "torch_compile"

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = CompiledLayer(**options)

    def compute_logits(self, forward: EngineForward, tokens: torch.Tensor, batch: RaggedBatch) -> torch.Tensor:
        return self.layer.logits(forward, forward.hidden_states(tokens, batch, layer_fn=self.layer))

    def run_first(self, step: CapturedStep, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Compile the step by running it. Raises DeviceError if torch.compile fails."""
        try:
            with compat.unlimited_recompiles():
                return super().run_first(step, tokens, positions)
        except Exception as e:
            raise DeviceError(
                f"torch.compile failed; leave compile=True out, or use backend='cuda_graphs' ({' '.join(str(e).split()):.200})"
            ) from e
