"""The key/value cache, and where the ids of one forward stand in it.

A cache slot's index is the id's position, so a query at position p may see exactly the slots 0..p of its row, and
whatever an earlier prompt left beyond them is never read. Rows have positions and lengths of their own: ids are packed
side by side, with no padding, through everything that works id by id, and only attention goes row by row.

    three prompts in rows 0, 1, 2       ids         a b c | d e | f g
    Batch.of([(0, 0, 3), (1, 0, 2),     rows        0 0 0   1 1   2 2
              (2, 0, 2)])               positions   0 1 2   0 1   0 1
                                        spans       rows 0:1 of 3 ids; rows 1:3 of 2 ids each

    one decode step, prompts of         ids         h | i | j
    3, 2 and 2 ids before               rows        0   1   2
                                        positions   3   2   2
                                        spans       rows 0:3 of 1 id each, looking at slots 0:4
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Span(NamedTuple):
    """Cache rows row..row+n_rows that each bring `length` ids: one call of the attention kernel."""

    row: int
    n_rows: int
    length: int
    end: int  # cache slots 0..end hold all that these ids may see

    @property
    def fresh(self) -> bool:
        """Nothing stands before these ids: their own keys and values are all they see."""
        return self.end == self.length


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
        rows, positions = [], []
        for row, start, length in pieces:
            rows.append(torch.full((length,), row))
            positions.append(torch.arange(start, start + length))
            last = spans[-1] if spans else None
            if last and (row, length, start + length) == (last.row + last.n_rows, last.length, last.end):
                spans[-1] = last._replace(n_rows=last.n_rows + 1)
            else:
                spans.append(Span(row, 1, length, start + length))
        return Batch(torch.cat(rows).to(device), torch.cat(positions).to(device), tuple(spans))

    @staticmethod
    def step(rows: torch.Tensor, positions: torch.Tensor, end: int) -> "Batch":
        """One id for each of the rows 0..B, at `positions` (B,), all below `end`. Nothing is read from the device."""
        return Batch(rows, positions, (Span(0, len(rows), 1, end),))

    def masks(self, n_heads: int, dtype: torch.dtype) -> list[torch.Tensor | None]:
        """For each span what its ids may not see, as -inf to be added to the scores, (n_rows, n_heads, length, end).

        None for fresh spans, which the kernel's own causal mask serves.
        """
        masks: list[torch.Tensor | None] = []
        first = 0
        for span in self.spans:
            count = span.n_rows * span.length
            if span.fresh:
                masks.append(None)
            else:
                positions = self.positions[first : first + count].view(span.n_rows, 1, span.length, 1)
                slots = torch.arange(span.end, device=positions.device)
                mask = torch.zeros(span.n_rows, 1, span.length, span.end, dtype=dtype, device=positions.device)
                masks.append(mask.masked_fill_(slots > positions, float("-inf")).repeat(1, n_heads, 1, 1))
            first += count
        return masks


class KVCache:
    """Keys and values of every layer in one allocation, (n_layers, 2, rows, n_kv_heads, positions, head_dim).

    Each head's slots lie side by side, so that a step reads them as one stream.
    """

    def __init__(
        self, n_layers: int, rows: int, n_kv_heads: int, positions: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        # Made outside inference mode: an inference tensor could not be written by a later call outside of it.
        with torch.inference_mode(False):
            shape = (n_layers, 2, rows, n_kv_heads, positions, head_dim)
            self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.layers = [self.data[i].unbind() for i in range(n_layers)]
        self.turn: object = None  # the one call whose keys and values these are

    def write(self, layer: int, batch: Batch, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put k and v (N, n_kv_heads, head_dim) where their ids stand."""
        keys, values = self.layers[layer]
        keys[batch.rows, :, batch.positions] = k.detach()
        values[batch.rows, :, batch.positions] = v.detach()

    def read(self, layer: int, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """All that a span may see: views (n_rows, n_kv_heads, end, head_dim)."""
        keys, values = self.layers[layer]
        rows = slice(span.row, span.row + span.n_rows)
        return keys[rows, :, : span.end], values[rows, :, : span.end]
