"""A block of the Transformer by torch.compile, for decode steps: one code for all layers, made anew for each number of rows.

It is compiled in three parts. Attention, which lies between the first two, is a kernel already, and the only part for which
it matters how many slots a step sees. And what w2 multiplies is to stand in memory: fused into that product, it would be
computed anew for each output. On several ranks the sums over them part it once more.

Blocks, models and `where` are those of model.py, which imports this file.
"""

import contextlib
import functools
from typing import Any

import torch
from fairscale.nn.model_parallel.mappings import reduce_from_model_parallel_region

from .parallel import RowParallelLinear


def tuned() -> dict[str, Any]:
    """Options of torch.compile. The products of a single row are compiled, too, each tuned when it is first met: on an H100
    such kernels read weights at 2.6 to 3.1 TB/s, where cuBLAS's reach 2.0 to 2.8. And where GPU and PyTorch can, a kernel is
    launched before the last one has ended, and waits for it by itself: 4% of a step of 7B's width."""
    from torch._inductor import config

    early = {"triton.enable_pdl": True} if hasattr(config.triton, "enable_pdl") else {}
    return {"options": {"coordinate_descent_tuning": True} | early}


def before(block: Any, x: torch.Tensor, where: Any, cache: torch.Tensor | None) -> torch.Tensor:
    return block.attention.project(block.attention_norm(x), where, cache)[0]


def between(block: Any, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = x + (block.attention.wo(y) if block.attention.wo.ranks == 1 else y)
    return h, block.feed_forward.gated(block.ffn_norm(h))


def after(block: Any, h: torch.Tensor, gated: torch.Tensor) -> torch.Tensor:
    return h + block.feed_forward.w2(gated)


def product(layer: RowParallelLinear, x: torch.Tensor) -> torch.Tensor:
    return layer.multiply(x)


def logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    return model.output(hidden).float()


class CompiledBlock:
    """What `TransformerBlock.__call__` and `Transformer.logits` do, compiled with `options`, or with those of `tuned`."""

    def __init__(self, **options: Any) -> None:
        whole: Any = functools.partial(torch.compile, fullgraph=True, dynamic=False, **(options or tuned()))
        self.before, self.between, self.after = map(whole, (before, between, after))
        self.product, self.head = whole(product), whole(logits)

    def __call__(self, block: Any, x: torch.Tensor, where: Any, cache: torch.Tensor | None) -> torch.Tensor:
        q = self.before(block, x, where, cache)
        y = block.attention.attend(q, None, where, cache)
        if block.attention.wo.ranks == 1:
            return self.after(block, *self.between(block, x, y))
        h, gated = self.between(block, x, self.summed(block.attention.wo, y))
        return h + self.summed(block.feed_forward.w2, gated)

    def summed(self, layer: RowParallelLinear, x: torch.Tensor) -> torch.Tensor:
        """What the layer gives: its product is compiled; its sum over the ranks, which cannot be, is not."""
        return reduce_from_model_parallel_region(self.product(layer, x))

    def logits(self, model: Any, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(model, hidden) if model.output.ranks == 1 else model.logits(hidden)


def any_number_of_shapes() -> contextlib.AbstractContextManager[Any]:
    """For as long as it is entered, torch.compile makes code for any number of shapes; by itself it gives up after eight."""
    config = torch._dynamo.config
    limits = ("recompile_limit", "cache_size_limit", "accumulated_recompile_limit", "accumulated_cache_size_limit")
    return config.patch({name: 1 << 14 for name in limits if hasattr(config, name)})
