"""The key/value cache, and where the ids of one forward stand in it.

A cache slot's index is the id's position, so a query at position p may see exactly the slots 0..p of its row, and
whatever an earlier prompt left beyond them is never read. Rows have positions and lengths of their own: ids are packed
side by side, with no padding, through everything that works id by id, and only attention goes row by row.

    three prompts in rows 0, 1, 2       ids         a b c | d e | f g
    Batch.of([(0, 0, 3), (1, 0, 2),     rows        0 0 0   1 1   2 2
              (2, 0, 2)])               positions   0 1 2   0 1   0 1
                                        spans       rows 0:1 of 3 ids; rows 1:3 of 2 ids each

    one decode step of these rows       ids         h | i | j
    Batch.of([(0, 3, 1), (1, 2, 1),     positions   3   2   2
              (2, 2, 1)])               spans       row 0:1 looks at slots 0:4; rows 1:3 at slots 0:3
    the same on a GPU: Batch.step       spans       rows 0:3 look at slots 0:4, through a mask
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

if TYPE_CHECKING:
    from .model import Transformer


class Span(NamedTuple):
    """Cache rows row..row+n_rows that each bring `length` ids: one call of the attention kernel."""

    row: int
    n_rows: int
    length: int
    end: int  # cache slots 0..end hold all that these ids may see
    ragged: bool = False  # the rows stand at positions of their own, below end; else their last ids stand at end - 1

    @property
    def fresh(self) -> bool:
        """Nothing stands before these ids: their own keys and values are all they see."""
        return self.end == self.length and not self.ragged


@dataclass(frozen=True)
class Batch:
    """N packed ids: `rows` and `positions` (N,) on the device, and on the host the spans they form, in order."""

    rows: torch.Tensor
    positions: torch.Tensor
    spans: tuple[Span, ...]

    @staticmethod
    def of(pieces: Iterable[tuple[int, int, int]], device: torch.device | str = "cpu") -> "Batch":
        """From (row, start, length) for each piece; neighbours of one length and start share a span."""
        spans: list[Span] = []
        rows: list[int] = []
        positions: list[int] = []
        for row, start, length in pieces:
            rows += [row] * length
            positions += range(start, start + length)
            last = spans[-1] if spans else None
            if last and (row, length, start + length) == (last.row + last.n_rows, last.length, last.end):
                spans[-1] = last._replace(n_rows=last.n_rows + 1)
            else:
                spans.append(Span(row, 1, length, start + length))
        both = torch.tensor([rows, positions], dtype=torch.int64, device=device)
        return Batch(both[0], both[1], tuple(spans))

    @staticmethod
    def step(positions: torch.Tensor, end: int) -> "Batch":
        """One id for each of the rows 0..B, at `positions` (B,), below `end`. Nothing is read from the device."""
        rows = torch.arange(len(positions), device=positions.device)
        return Batch(rows, positions, (Span(0, len(rows), 1, end, ragged=True),))

    def masks(self, dtype: torch.dtype) -> list[torch.Tensor | None]:
        """For each span what its ids may not see, as -inf to be added to the scores, (n_rows or 1, 1, length, end).

        None where the kernel's own causal mask serves, and where a single id sees all.
        """
        masks: list[torch.Tensor | None] = []
        first = 0
        for span in self.spans:
            if span.fresh or (span.length == 1 and not span.ragged):
                masks.append(None)
            else:
                rows = span.n_rows if span.ragged else 1  # the others have what the first has
                positions = self.positions[first : first + rows * span.length].view(rows, 1, span.length, 1)
                slots = torch.arange(span.end, device=positions.device)
                mask = torch.zeros(rows, 1, span.length, span.end, dtype=dtype, device=positions.device)
                masks.append(mask.masked_fill_(slots > positions, float("-inf")))
            first += span.n_rows * span.length
        return masks


def chunked(lengths: list[int], most: int, block: int = 1) -> Iterator[list[tuple[int, int, int]]]:
    """The pieces (row, start, length) of rows of these lengths, in order, at most `most` ids at a time. A row is cut at
    multiples of `block` (`most` if that is less): where attention's blocks end, whose sums then are those of the whole row."""
    pieces, room = [], most
    for row, length in enumerate(lengths):
        start = 0
        while start < length:
            n = min(length - start, room)
            if start + n < length:
                n -= n % min(block, most)
            if n:
                pieces.append((row, start, n))
            start, room = start + n, room - n
            if start < length:
                yield pieces
                pieces, room = [], most
    if pieces:
        yield pieces


class KVCache:
    """Keys and values of every layer in one allocation, (n_layers, 2, rows, n_kv_heads, positions, head_dim).

    Each head's positions lie side by side, so that a step reads them as one stream. `cache_k` and `cache_v` of the model's
    attention layers are views of it, (rows, positions, n_kv_heads, head_dim).
    """

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data
        self.layers = data.unbind()
        self.views = [tuple(layer.transpose(2, 3).unbind()) for layer in self.layers]  # cache_k and cache_v
        self.logits: torch.Tensor | None = None  # of the last step, (rows, vocab)
        self.stream: torch.cuda.Stream | None = None  # on which it was launched
        self.turn: list[int] | None = None  # tokens whose keys and values row 0 holds; each call makes a new list
        self.made_by: object = None  # the weights that computed them
        self.version = -1  # of `data` after the engine's last write: any other write changes it

    def is_of(self, model: "Transformer") -> bool:
        """Tell whether the model's layers look at this cache, and compute in its dtype, on its device."""
        weight, layers = model.norm.weight, cast("list[Any]", list(model.layers))
        fits = (self.data.device, self.data.dtype, len(self.views)) == (weight.device, weight.dtype, len(layers))
        return fits and all(
            layer.attention.cache_k is keys and layer.attention.cache_v is values
            for layer, (keys, values) in zip(layers, self.views, strict=True)
        )

    def seen(self) -> None:
        """Record the version of the cache, after the engine's own writes."""
        self.version = self.data._version

    def untouched(self) -> bool:
        """Tell whether nobody but the engine has written into the cache since `seen`."""
        return self.version == self.data._version

    @staticmethod
    def adopt(model: "Transformer") -> "KVCache":
        """Copy the layers' caches into one allocation, and make them views of it."""
        layers = [layer.attention for layer in cast("list[Any]", list(model.layers))]
        weight, (rows, positions, heads, head_dim) = model.norm.weight, layers[0].cache_k.shape
        # Made outside inference mode: an inference tensor could not be written by a later call outside of it.
        with torch.inference_mode(False), torch.no_grad():
            shape = (len(layers), 2, rows, heads, positions, head_dim)
            cache = KVCache(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
            for i, attention in enumerate(layers):
                for name, own in zip(("cache_k", "cache_v"), cache.views[i], strict=True):
                    before = getattr(attention, name)
                    if not before.is_meta and before.any():  # else nothing of the new one takes memory yet
                        own.copy_(before)
                    setattr(attention, name, own)
        return cache


def write(layer: torch.Tensor, batch: Batch, kv: torch.Tensor) -> None:
    """Put keys and values kv (N, 2, n_kv_heads, head_dim) into a layer of the cache, where their ids stand."""
    layer[:, batch.rows, :, batch.positions] = kv.detach().to(layer.dtype)  # autocast has one of its own


def read(layer: torch.Tensor, span: Span) -> tuple[torch.Tensor, ...]:
    """Keys and values of a layer that a span may see: views (n_rows, n_kv_heads, end, head_dim)."""
    return layer[:, span.row : span.row + span.n_rows, :, : span.end].unbind()
