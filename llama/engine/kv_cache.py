"""The KV cache, and where the tokens of one forward stand in it.

A position of the cache holds the keys and values of the token at that position of its row. A query at position p attends to
positions 0..p of its row only, so what an earlier sequence left beyond them is never read. Rows have lengths of their own: the
tokens of a forward lie side by side without padding, and only attention goes row by row.

    prefill of three prompts in rows 0, 1, 2           tokens      a b c | d e | f g
    from_segments([(0, 0, 3), (1, 0, 2), (2, 0, 2)])   rows        0 0 0   1 1   2 2
                                                       positions   0 1 2   0 1   0 1
                                                       segments    row 0: 3 tokens; rows 1 and 2: 2 tokens each

    one decode step of these rows                      tokens      h | i | j
    from_segments([(0, 3, 1), (1, 2, 1), (2, 2, 1)])   positions   3   2   2
                                                       segments    row 0 attends to 0..3; rows 1 and 2 to 0..2
    the same on a GPU: decode(positions, 4)            segments    rows 0, 1, 2 attend to 0..3, through a mask
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch

from .. import compat
from ..model import Transformer


class Segment(NamedTuple):
    """Adjacent rows of the cache with the same number of new tokens: one call of an attention kernel."""

    row: int
    n_rows: int
    length: int  # new tokens of each row
    kv_len: int  # positions 0..kv_len hold all that these tokens attend to
    per_row_positions: bool = False  # True if each row has a position of its own below kv_len; else all end at kv_len

    @property
    def starts_at_zero(self) -> bool:
        """True if nothing stands before these tokens: their own keys and values are all they attend to."""
        return self.kv_len == self.length and not self.per_row_positions


@dataclass(frozen=True)
class RaggedBatch:
    """N tokens of several rows, side by side: `rows` and `positions` (N,) on the device, and their segments on the host."""

    rows: torch.Tensor
    positions: torch.Tensor
    segments: tuple[Segment, ...]

    @staticmethod
    def from_segments(pieces: Iterable[tuple[int, int, int]], device: torch.device | str = "cpu") -> "RaggedBatch":
        """Make a batch of pieces (row, start, length). Adjacent rows with the same start and length share a segment."""
        segments: list[Segment] = []
        rows: list[int] = []
        positions: list[int] = []
        for row, start, length in pieces:
            rows += [row] * length
            positions += range(start, start + length)
            last = segments[-1] if segments else None
            if last and (row, length, start + length) == (last.row + last.n_rows, last.length, last.kv_len):
                segments[-1] = last._replace(n_rows=last.n_rows + 1)
            else:
                segments.append(Segment(row, 1, length, start + length))
        both = torch.tensor([rows, positions], dtype=torch.int64, device=device)
        return RaggedBatch(both[0], both[1], tuple(segments))

    @staticmethod
    def decode(positions: torch.Tensor, kv_len: int) -> "RaggedBatch":
        """Make a batch of one token for each row 0..B, at `positions` (B,) below kv_len. Nothing is copied to the host."""
        rows = torch.arange(len(positions), device=positions.device)
        return RaggedBatch(rows, positions, (Segment(0, len(rows), 1, kv_len, per_row_positions=True),))

    def masks(self, dtype: torch.dtype) -> list[torch.Tensor | None]:
        """Return each segment's attention mask, with -inf where a token must not attend: (n_rows or 1, 1, length, kv_len).

        It is None where the kernel's own causal mask serves, and where a single token attends to all positions.
        """
        masks: list[torch.Tensor | None] = []
        first = 0
        for segment in self.segments:
            if segment.starts_at_zero or (segment.length == 1 and not segment.per_row_positions):
                masks.append(None)
            else:
                rows = segment.n_rows if segment.per_row_positions else 1  # else all rows have the first one's mask
                shape = rows, 1, segment.length
                positions = self.positions[first : first + rows * segment.length].view(*shape, 1)
                keys = torch.arange(segment.kv_len, device=positions.device)
                mask = torch.zeros(*shape, segment.kv_len, dtype=dtype, device=positions.device)
                masks.append(mask.masked_fill_(keys > positions, float("-inf")))
            first += segment.n_rows * segment.length
        return masks


def prefill_chunks(lengths: list[int], max_tokens: int, multiple: int = 1) -> Iterator[list[tuple[int, int, int]]]:
    """Divide rows of these lengths into chunks of at most max_tokens: lists of pieces (row, start, length), in order.

    A row is cut at a multiple of `multiple` (of max_tokens if that is less). Attention kernels work in blocks of that many
    tokens, so a row's sums are the same whether it is cut or not.
    """
    pieces, room = [], max_tokens
    for row, length in enumerate(lengths):
        start = 0
        while start < length:
            n = min(length - start, room)
            if start + n < length:
                n -= n % min(multiple, max_tokens)
            if n:
                pieces.append((row, start, n))
            start, room = start + n, room - n
            if start < length:
                yield pieces
                pieces, room = [], max_tokens
    if pieces:
        yield pieces


class KVCache:
    """Keys and values of every layer in one allocation, (n_layers, 2, rows, n_kv_heads, positions, head_dim).

    The positions of a head are adjacent in memory, so that a decode step reads them as one stream. `cache_k` and `cache_v` of
    the model's attention layers are views of it, (rows, positions, n_kv_heads, head_dim).
    """

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data
        self.layers = data.unbind()
        self.views = [tuple(layer.transpose(2, 3).unbind()) for layer in self.layers]  # cache_k and cache_v of each layer
        self.logits: torch.Tensor | None = None  # of the last step, (rows, vocab)
        self.stream: torch.cuda.Stream | None = None  # that the last step was launched on
        self.prefix_tokens: list[int] | None = None  # tokens whose keys and values row 0 holds; a new list for each call
        self.weights_version: object = None  # of the weights that computed them
        self.version = -1  # of `data` after the engine's last write; any other write changes it

    def belongs_to(self, model: Transformer) -> bool:
        """Return True if the model's layers use this cache, and compute in its dtype and on its device."""
        weight, layers = model.norm.weight, cast("list[Any]", list(model.layers))
        fits = (self.data.device, self.data.dtype, len(self.views)) == (weight.device, weight.dtype, len(layers))
        return fits and all(
            layer.attention.cache_k is keys and layer.attention.cache_v is values
            for layer, (keys, values) in zip(layers, self.views, strict=True)
        )

    def record_version(self) -> None:
        """Remember the version of `data`, after the engine's own writes."""
        self.version = compat.version_of(self.data)

    def is_unchanged(self) -> bool:
        """Return True if only the engine has written into the cache since `record_version`."""
        return self.version == compat.version_of(self.data)

    @staticmethod
    def adopt(model: Transformer) -> "KVCache":
        """Copy the layers' caches into one allocation, and make them views of it."""
        layers = [layer.attention for layer in cast("list[Any]", list(model.layers))]
        weight, (rows, positions, heads, head_dim) = model.norm.weight, layers[0].cache_k.shape
        # Outside inference mode, since an inference tensor cannot be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            shape = (len(layers), 2, rows, heads, positions, head_dim)
            cache = KVCache(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
            for i, attention in enumerate(layers):
                for name, view in zip(("cache_k", "cache_v"), cache.views[i], strict=True):
                    before = getattr(attention, name)
                    if not before.is_meta and before.any():  # else the new cache's pages need not be touched yet
                        view.copy_(before)
                    setattr(attention, name, view)
        return cache


def store_kv(layer: torch.Tensor, batch: RaggedBatch, kv: torch.Tensor) -> None:
    """Write keys and values kv (N, 2, n_kv_heads, head_dim) into one layer of the cache, at their tokens' positions."""
    layer[:, batch.rows, :, batch.positions] = kv.detach().to(layer.dtype)  # a caller's autocast may have changed the dtype


def kv_view(layer: torch.Tensor, segment: Segment) -> tuple[torch.Tensor, ...]:
    """Return the keys and values that a segment attends to: two views (n_rows, n_kv_heads, kv_len, head_dim)."""
    return layer[:, segment.row : segment.row + segment.n_rows, :, : segment.kv_len].unbind()
