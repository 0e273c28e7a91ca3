"""A layer by torch.compile, for decode steps: one code for all layers, made anew for each number of rows.

It is compiled in three parts. Attention, which lies between the first two, is a kernel already, and the only part for which it
matters how many positions a step sees. And what w2 multiplies is to stand in memory: fused into that product, it would be
computed anew for each output. On several ranks the sums over them part it once more.
"""

import contextlib
import functools
from typing import Any

import torch
from fairscale.nn.model_parallel.mappings import reduce_from_model_parallel_region

from .forward import Forward, ForwardContext, Layer, Product


def tuned() -> dict[str, Any]:
    """Options of torch.compile. The products of a single row are compiled, too, each tuned when it is first met: on an H100
    such kernels read weights at 2.6 to 3.1 TB/s, where cuBLAS's reach 2.0 to 2.8. And where GPU and PyTorch can, a kernel is
    launched before the last one has ended, and waits for it by itself: 4% of a step of 7B's width."""
    from torch._inductor import config

    early = {"triton.enable_pdl": True} if hasattr(config.triton, "enable_pdl") else {}
    return {"options": {"coordinate_descent_tuning": True} | early}


def before(layer: Layer, x: torch.Tensor, context: ForwardContext, cache: torch.Tensor | None) -> torch.Tensor:
    return layer.project(layer.attention_norm.apply(x), context, cache)[0]


def between(layer: Layer, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = x + (layer.wo.multiply(y) if layer.ranks == 1 else y)
    return h, layer.gated(layer.ffn_norm.apply(h))


def after(layer: Layer, h: torch.Tensor, gated: torch.Tensor) -> torch.Tensor:
    return h + layer.w2.multiply(gated)


def product(weight: Product, x: torch.Tensor) -> torch.Tensor:
    return weight.multiply(x)


def logits(forward: Forward, hidden: torch.Tensor) -> torch.Tensor:
    return forward.output.multiply(hidden).float()


class CompiledLayer:
    """What `Layer.__call__` and `Forward.logits` do, compiled with `options`, or with those of `tuned`."""

    def __init__(self, **options: Any) -> None:
        whole: Any = functools.partial(torch.compile, fullgraph=True, dynamic=False, **(options or tuned()))
        self.before, self.between, self.after = map(whole, (before, between, after))
        self.product, self.head = whole(product), whole(logits)

    def __call__(self, layer: Layer, x: torch.Tensor, context: ForwardContext, cache: torch.Tensor | None) -> torch.Tensor:
        q = self.before(layer, x, context, cache)
        y = layer.attend(q, None, context, cache)
        if layer.ranks == 1:
            return self.after(layer, *self.between(layer, x, y))
        h, gated = self.between(layer, x, self.summed(layer.wo, y))
        return h + self.summed(layer.w2, gated)

    def summed(self, weight: Product, x: torch.Tensor) -> torch.Tensor:
        """Multiply, compiled, and sum over the ranks, which cannot be."""
        return reduce_from_model_parallel_region(self.product(weight, x))

    def logits(self, forward: Forward, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(forward, hidden) if forward.ranks == 1 else forward.logits(hidden)


def any_number_of_shapes() -> contextlib.AbstractContextManager[Any]:
    """For as long as it is entered, torch.compile makes code for any number of shapes; by itself it gives up after eight."""
    config = torch._dynamo.config
    limits = ("recompile_limit", "cache_size_limit", "accumulated_recompile_limit", "accumulated_cache_size_limit")
    return config.patch({name: 1 << 14 for name in limits if hasattr(config, name)})
