"""Find a rank's part of each weight in the shards, for any number of shards and ranks."""

import re

import torch

from ..distributed.groups import model_parallel
from ..model import Transformer
from .shards import Shards, split_dim


def shard_views(parts: list[torch.Tensor], dim: int, rank: int, ranks: int) -> list[torch.Tensor]:
    """Return views of a weight's parts that, joined along `dim`, are one rank's part of the whole weight.

    parts: the part of the weight in each shard. Example: with 3 parts of 4 rows each and 2 ranks, rank 0 gets 6 rows: all of
    part 0, and the first 2 rows of part 1.
    """
    width = parts[0].shape[dim]
    first, last = (width * len(parts) * r // ranks for r in (rank, rank + 1))
    views = []
    for i, part in enumerate(parts):
        begin, end = max(first - i * width, 0), min(last - i * width, width)
        if begin < end:
            views.append(part.narrow(dim, begin, end - begin))
    return views


# The engine multiplies the same input by several linear weights at once, so these weights are adjacent in memory. Each key is
# the first weight, and its value lists all weights in their order in memory.
MERGED_WEIGHTS = {
    "attention.wq": ("attention.wq", "attention.wk", "attention.wv"),
    "feed_forward.w1": ("feed_forward.w1", "feed_forward.w3"),
}
_MERGED_INTO_ANOTHER = {name for names in MERGED_WEIGHTS.values() for name in names[1:]}


def weight_groups(model: Transformer, joint: bool) -> list[list[str]]:
    """Return the names of a model's weights, as one list for each group of weights that are loaded together.

    joint: if True, the weights of an entry of MERGED_WEIGHTS form one group in each layer. Every other weight is a group alone.
    """
    groups = []
    for name, _ in model.named_parameters():
        layer, module = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", name).groups("")  # type: ignore[union-attr]
        if not joint or module not in _MERGED_INTO_ANOTHER:
            modules = MERGED_WEIGHTS.get(module, (module,)) if joint else (module,)
            groups.append([f"{layer or ''}{name}.weight" for name in modules])
    return groups


def shard_parts(name: str, shards: Shards) -> list[torch.Tensor]:
    """Return the part of a weight in each shard, in order; a single part if every shard contains the whole weight."""
    parts = [tensors[name] for tensors in shards.values()]
    return parts[:1] if split_dim(name) is None else parts


def rank_views(name: str, shards: Shards) -> list[torch.Tensor]:
    """Return views of the shards that, joined, are this rank's part of a weight.

    The views are to be joined along the weight's `split_dim`.
    """
    parts, dim = shard_parts(name, shards), split_dim(name)
    return parts if dim is None else shard_views(parts, dim, *model_parallel())
