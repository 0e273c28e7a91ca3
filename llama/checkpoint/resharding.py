"""TODO."""

import re

import torch

from ..distributed.groups import model_parallel
from ..model import Transformer
from .shards import Shards, split_dim


def shard_views(parts: list[torch.Tensor], dim: int, rank: int, ranks: int) -> list[torch.Tensor]:
    """Views that, joined along `dim`, are the rank-th of `ranks` equal parts of the joined `parts`.

    3 parts of 4 rows, 2 ranks: rank 0 takes rows 0..6, which is part 0 whole and rows 0..2 of part 1.
    """
    width = parts[0].shape[dim]
    first, last = (width * len(parts) * r // ranks for r in (rank, rank + 1))
    views = []
    for i, part in enumerate(parts):
        begin, end = max(first - i * width, 0), min(last - i * width, width)
        if begin < end:
            views.append(part.narrow(dim, begin, end - begin))
    return views


# Linear layers of one input, which the engine multiplies as one: their weights are parts of one, one after the other.
MERGED_WEIGHTS = {
    "attention.wq": ("attention.wq", "attention.wk", "attention.wv"),
    "feed_forward.w1": ("feed_forward.w1", "feed_forward.w3"),
}
_MERGED_INTO_ANOTHER = {name for names in MERGED_WEIGHTS.values() for name in names[1:]}


def weight_groups(model: Transformer, joint: bool) -> list[list[str]]:
    """Return the names of a model's weights: those that are to be parts of one together if `joint`, all others alone."""
    found = []
    for name, _ in model.named_parameters():
        layer, own = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", name).groups("")  # type: ignore[union-attr]
        if not joint or own not in _MERGED_INTO_ANOTHER:
            names = MERGED_WEIGHTS.get(own, (own,)) if joint else (own,)
            found.append([f"{layer or ''}{each}.weight" for each in names])
    return found


def shard_parts(name: str, shards: Shards) -> list[torch.Tensor]:
    """A stored weight: the shards' parts of it."""
    parts = [tensors[name] for tensors in shards.values()]
    return parts[:1] if split_dim(name) is None else parts


def rank_views(name: str, shards: Shards) -> list[torch.Tensor]:
    """Views of what this rank takes of a stored weight."""
    parts, dim = shard_parts(name, shards), split_dim(name)
    return parts if dim is None else shard_views(parts, dim, *model_parallel())
