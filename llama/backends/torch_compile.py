"""A layer by torch.compile, for decode steps: one code for all layers, made anew for each number of rows.

It is compiled in three parts. Attention, which lies between the first two, is a kernel already, and the only part for which it
matters how many positions a step sees. And what w2 multiplies is to stand in memory: fused into that product, it would be
computed anew for each output. On several ranks the sums over them part it once more.
"""

import functools
from typing import Any

import torch
from fairscale.nn.model_parallel.mappings import reduce_from_model_parallel_region

from .. import compat
from ..engine.forward import EngineForward, EngineLayer, ForwardContext, MergedLinear
from .cuda_graphs import CudaGraphsBackend


def pre_attention(layer: EngineLayer, x: torch.Tensor, context: ForwardContext, cache: torch.Tensor | None) -> torch.Tensor:
    return layer.project_qkv(layer.attention_norm.forward(x), context, cache)[0]


def post_attention(layer: EngineLayer, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = x + (layer.wo.forward(y) if layer.ranks == 1 else y)
    return h, layer.swiglu(layer.ffn_norm.forward(h))


def ffn_down(layer: EngineLayer, h: torch.Tensor, gated: torch.Tensor) -> torch.Tensor:
    return h + layer.w2.forward(gated)


def linear(weight: MergedLinear, x: torch.Tensor) -> torch.Tensor:
    return weight.forward(x)


def logits(forward: EngineForward, hidden: torch.Tensor) -> torch.Tensor:
    return forward.output.forward(hidden).float()


class CompiledLayer:
    """What `Layer.__call__` and `Forward.logits` do, compiled with `options`, or with those of `tuned`."""

    def __init__(self, **options: Any) -> None:
        whole: Any = functools.partial(torch.compile, fullgraph=True, dynamic=False, **(options or compat.inductor_options()))
        self.pre_attention, self.post_attention, self.ffn_down = map(whole, (pre_attention, post_attention, ffn_down))
        self.product, self.head = whole(linear), whole(logits)

    def __call__(
        self, layer: EngineLayer, x: torch.Tensor, context: ForwardContext, cache: torch.Tensor | None
    ) -> torch.Tensor:
        q = self.pre_attention(layer, x, context, cache)
        y = layer.attend(q, None, context, cache)
        if layer.ranks == 1:
            return self.ffn_down(layer, *self.post_attention(layer, x, y))
        h, gated = self.post_attention(layer, x, self.all_reduced(layer.wo, y))
        return h + self.all_reduced(layer.w2, gated)

    def all_reduced(self, weight: MergedLinear, x: torch.Tensor) -> torch.Tensor:
        """Multiply, compiled, and sum over the ranks, which cannot be."""
        return reduce_from_model_parallel_region(self.product(weight, x))

    def logits(self, forward: EngineForward, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(forward, hidden) if forward.ranks == 1 else forward.logits(hidden)


class TorchCompileBackend(CudaGraphsBackend):
    name = "torch_compile"

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = CompiledLayer(**options)
