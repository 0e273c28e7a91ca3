"""The KV cache, and the rows and positions in the cache of the tokens of one forward.

Each row of the cache stores the keys and values of one sequence, by position. A query at position p attends only to positions 0
to p of its row, so keys and values of an earlier sequence after position p are never read. Rows may have different lengths. The
tokens of one forward are placed side by side without padding, and only attention is computed separately for each row.

    prefill of three prompts in rows 0, 1, 2           tokens      a b c | d e | f g
    from_segments([(0, 0, 3), (1, 0, 2), (2, 0, 2)])   rows        0 0 0   1 1   2 2
                                                       positions   0 1 2   0 1   0 1
                                                       segments    row 0: 3 tokens; rows 1 and 2: 2 tokens each

    one decode step of these rows                      tokens      h | i | j
    from_segments([(0, 3, 1), (1, 2, 1), (2, 2, 1)])   positions   3   2   2
                                                       segments    row 0 attends to 0-3; rows 1 and 2 to 0-2

    the same decode step on a GPU                      segments    rows 0, 1, 2 attend to positions 0-3, with a mask
    decode(positions, 4)
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch

from .. import compat
from ..model import Transformer
from .prefix_cache import PrefixCache


class Segment(NamedTuple):
    """Adjacent rows of the cache with the same number of new tokens. One call of an attention kernel computes all of them."""

    row: int
    n_rows: int
    length: int  # number of new tokens in each row
    kv_len: int  # the last new token of a row attends to positions 0 to kv_len - 1
    per_row_positions: bool = False  # True if new tokens of the rows may be at different positions
    # None, or for a forward without the cache, the indices (n_rows, kv_len) of the new tokens that a row attends to. Some of
    # them are new tokens of other segments.
    kv_indices: torch.Tensor | None = None

    @property
    def starts_at_zero(self) -> bool:
        """Return True if the new tokens start at position 0, and so attend only to each other."""
        return self.kv_len == self.length and not self.per_row_positions


@dataclass(frozen=True)
class RaggedBatch:
    """N tokens of several rows, side by side. `rows` and `positions` (N,) are on the device, and `segments` on the host."""

    rows: torch.Tensor
    positions: torch.Tensor
    segments: tuple[Segment, ...]
    decoding: bool = False  # True in a decode step, False in a prefill: linear kernels may round the two differently

    @staticmethod
    def from_segments(
        pieces: Iterable[tuple[int, int, int]], device: torch.device | str = "cpu", decoding: bool = False
    ) -> "RaggedBatch":
        """Return a batch of the tokens in `pieces`: tuples (row, position of the first token, number of tokens).

        Adjacent rows with the same position and number of tokens become one segment.
        """
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
        return RaggedBatch(both[0], both[1], tuple(segments), decoding)

    @staticmethod
    def decode(positions: torch.Tensor, kv_len: int, length: int = 1) -> "RaggedBatch":
        """Return a batch of `length` tokens in each of B rows, at positions (B * length,) less than kv_len.

        Nothing is copied to the host.
        """
        n_rows = len(positions) // length
        rows = torch.arange(n_rows, device=positions.device).repeat_interleave(length, output_size=len(positions))
        return RaggedBatch(rows, positions, (Segment(0, n_rows, length, kv_len, per_row_positions=True),), True)

    def masks(self, dtype: torch.dtype) -> list[torch.Tensor | None]:
        """Return an attention mask (n_rows or 1, 1, length, kv_len) per segment, with -inf where a token must not attend.

        A mask is None for tokens that start at position 0, where attention kernels apply a causal mask by themselves, and for a
        single token that attends to all positions.
        """
        masks: list[torch.Tensor | None] = []
        first = 0
        for segment in self.segments:
            if segment.starts_at_zero or (segment.length == 1 and not segment.per_row_positions):
                masks.append(None)
            else:
                rows = segment.n_rows if segment.per_row_positions else 1  # rows at equal positions share one mask
                shape = rows, 1, segment.length
                positions = self.positions[first : first + rows * segment.length].view(*shape, 1)
                keys = torch.arange(segment.kv_len, device=positions.device)
                mask = torch.zeros(*shape, segment.kv_len, dtype=dtype, device=positions.device)
                masks.append(mask.masked_fill_(keys > positions, float("-inf")))
            first += segment.n_rows * segment.length
        return masks


def prefill_chunks(lengths: list[int], max_tokens: int, multiple: int = 1) -> Iterator[list[tuple[int, int, int]]]:
    """Divide prompts of these lengths into chunks of at most max_tokens. Yield each chunk as a list of (row, start, length).

    A prompt is cut only at multiples of `multiple` tokens (or of max_tokens, if smaller). Attention kernels work in blocks of
    `multiple` tokens, so cutting a prompt does not change how results are rounded.
    """
    pieces: list[tuple[int, int, int]] = []
    room = max_tokens
    for row, length in enumerate(lengths):
        start = 0
        while start < length:
            n = min(length - start, room)
            if start + n < length:
                n -= n % (step := min(multiple, max_tokens))
                # Leave no single token, which attention rounds as in a decode step, unless a chunk has no room for two steps.
                if start + n == length - 1 and n >= step and (n > step or pieces):
                    n -= step
            if n:
                pieces.append((row, start, n))
            start, room = start + n, room - n
            if start < length:
                yield pieces
                pieces, room = [], max_tokens
    if pieces:
        yield pieces


class KVCache:
    """The keys and values of all layers in one tensor `data`, (n_layers, 2, rows, n_kv_heads, positions, head_dim).

    The positions of a head are adjacent in memory, since a decode step reads them one after another. `cache_k` and `cache_v` of
    the model's attention layers are views of `data` with shape (rows, positions, n_kv_heads, head_dim).
    """

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data
        self.layers = data.unbind()
        self.views = [tuple(layer.transpose(2, 3).unbind()) for layer in self.layers]  # cache_k and cache_v of each layer
        self.logits: torch.Tensor | None = None  # None, or the logits (rows, vocab) of the last decode step
        self.stream: torch.cuda.Stream | None = None  # None, or the CUDA stream on which the last step was launched
        self.prefixes = PrefixCache(data)
        self.weights_version: object = None  # the model's weights_version when `prefixes` were computed
        self.version = -1  # PyTorch's version counter of `data` after the engine's last write

    def belongs_to(self, model: Transformer) -> bool:
        """Return True if the model's layers use this cache, and compute in its dtype and on its device."""
        weight, layers = model.norm.weight, cast("list[Any]", list(model.layers))
        fits = (self.data.device, self.data.dtype, len(self.views)) == (weight.device, weight.dtype, len(layers))
        return fits and all(
            layer.attention.cache_k is keys and layer.attention.cache_v is values
            for layer, (keys, values) in zip(layers, self.views, strict=True)
        )

    def sync_streams(self) -> None:
        """Make the current CUDA stream wait for the stream used before, on which a step launched ahead may still be running."""
        if self.data.device.type == "cuda":
            before, self.stream = self.stream, torch.cuda.current_stream(self.data.device)
            if before is not None and before != self.stream:
                self.stream.wait_stream(before)

    def record_version(self) -> None:
        """Record the version counter of `data` after a write by the engine, so that `is_unchanged` detects other writes."""
        self.version = compat.version_of(self.data)

    def is_unchanged(self) -> bool:
        """Return True if only the engine has written into the cache since `record_version`."""
        return self.version == compat.version_of(self.data)

    @staticmethod
    def adopt(model: Transformer) -> "KVCache":
        """Return a new KV cache with the contents of the present caches of all layers.

        `cache_k` and `cache_v` of each layer become views of the new cache.
        """
        layers = [layer.attention for layer in cast("list[Any]", list(model.layers))]
        weight, (rows, positions, heads, head_dim) = model.norm.weight, layers[0].cache_k.shape
        # Leave inference mode, since a tensor created in inference mode cannot be modified outside of it.
        with torch.inference_mode(False), torch.no_grad():
            shape = (len(layers), 2, rows, heads, positions, head_dim)
            cache = KVCache(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
            for i, attention in enumerate(layers):
                for name, view in zip(("cache_k", "cache_v"), cache.views[i], strict=True):
                    before = getattr(attention, name)
                    if not before.is_meta and before.any():  # skip zeros, since copying would allocate memory too early
                        view.copy_(before)
                    setattr(attention, name, compat.observe(view))
        return cache


def store_kv(layer: torch.Tensor, batch: RaggedBatch, kv: torch.Tensor) -> None:
    """Write keys and values kv (N, 2, n_kv_heads, head_dim) of N tokens into one layer of the cache."""
    # Convert, since autocast of a caller may have changed the dtype of kv.
    layer[:, batch.rows, :, batch.positions] = kv.detach().to(layer.dtype)


def kv_view(layer: torch.Tensor, segment: Segment) -> tuple[torch.Tensor, ...]:
    """Return views of the keys and of the values that a segment attends to, each (n_rows, n_kv_heads, kv_len, head_dim)."""
    return layer[:, segment.row : segment.row + segment.n_rows, :, : segment.kv_len].unbind()
