"""Sequences side by side in one forward without the KV cache, where tokens with which sequences begin alike are computed once.

a b c d | a b c e f | a b c g h      sequences, sorted; each takes the tokens that it shares with the one before it
a b c d |       e f |       g h      tokens to compute
0 1 2 3 | 0 1 2 4 5 | 0 1 2 6 7      indices of each sequence's tokens among them
                                     segments: one row of 4 tokens, and two rows of 2 tokens that attend to 5 keys each
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from .. import tuning
from .kv_cache import RaggedBatch, Segment
from .prefix_cache import n_shared


class PackedSequences(NamedTuple):
    """The tokens to compute, the index among them of each token of each sequence, and the batch that computes them."""

    tokens: list[int]
    indices: list[list[int]]
    batch: RaggedBatch


def shared_with_previous(sequences: Sequence[list[int]], multiple: int) -> list[int]:
    """Return how many leading tokens each sequence takes from the one before it: 0, a multiple of `multiple`, or all.

    A sequence that does not take all computes at least two tokens, since attention rounds a single one as in a decode step.
    """
    pairs = itertools.pairwise(sequences)
    counts = [len(b) if a == b else n_shared(a, b, len(b) - 2, multiple) for a, b in pairs]
    return [0, *counts] if sequences else []


def divide_sequences(sequences: list[list[int]], multiple: int) -> list[list[int]]:
    """Sort sequences, and divide them into batches that compute at most PREFILL_CHUNK tokens, or one longer sequence.

    Return the indices of each batch.
    """
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    batches: list[list[int]] = []
    room = 0
    for i, n in zip(order, shared_with_previous([sequences[i] for i in order], multiple), strict=True):
        length = len(sequences[i])
        if not batches or length - n > room:
            batches, room, n = [*batches, []], tuning.PREFILL_CHUNK, 0
        batches[-1].append(i)
        room = max(0, room - (length - n))
    return batches


def pack_sequences(sequences: list[list[int]], multiple: int, device: torch.device | str = "cpu") -> PackedSequences:
    """Pack sorted sequences into one batch. multiple: see `shared_with_previous`."""
    shared = shared_with_previous(sequences, multiple)
    # Sequences with equal numbers of new tokens and keys become adjacent, so that one segment computes them.
    order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]) - shared[i], len(sequences[i])))
    computed = [i for i in order if shared[i] < len(sequences[i])]
    tokens = [token for i in computed for token in sequences[i][shared[i] :]]
    positions = [position for i in computed for position in range(shared[i], len(sequences[i]))]
    ends = itertools.accumulate(len(sequences[i]) - shared[i] for i in computed)
    end_of = dict(zip(computed, ends, strict=True))
    indices: list[list[int]] = []
    for i, (sequence, n) in enumerate(zip(sequences, shared, strict=True)):
        before = indices[-1][:n] if n else []
        indices.append([*before, *range(end_of[i] + n - len(sequence), end_of[i])] if n < len(sequence) else before)
    segments = tuple(_segments([(shared[i], indices[i]) for i in computed], device))
    both = torch.tensor([[0] * len(positions), positions], dtype=torch.int64, device=device)
    return PackedSequences(tokens, indices, RaggedBatch(both[0], both[1], segments))


def _segments(rows: list[tuple[int, list[int]]], device: torch.device | str) -> Iterator[Segment]:
    """Yield the segments that compute rows. Each row is (number of tokens that it takes, indices of all its tokens)."""
    for (n, length), equal in itertools.groupby(rows, key=lambda row: (row[0], len(row[1]))):
        kv_indices = [indices for _, indices in equal]
        n_rows = max(1, tuning.PREFILL_CHUNK // length) if n else len(kv_indices)  # limits the keys that are copied at once
        for first in range(0, len(kv_indices), n_rows):
            part = kv_indices[first : first + n_rows]
            yield Segment(0, len(part), length - n, length, kv_indices=torch.tensor(part, device=device) if n else None)
