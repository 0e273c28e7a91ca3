"""The interface of backends. A backend computes the decode steps of a model."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .forward import EngineForward

# A function that decodes one token per row. Arguments: tokens (B,), positions (B,), and a list of the same positions on the
# host. It returns float32 logits (B, n_words), which are valid until the next call. For a free row, the list contains 0, and
# the tensor contains an arbitrary position.
DecodeFn = Callable[[torch.Tensor, torch.Tensor, list[int]], torch.Tensor]


class Run(NamedTuple):
    """Adjacent tokens of a row of the cache, of which the first is at position `start`."""

    row: int
    start: int
    tokens: list[int]


# A function that decodes one or more tokens per row, as one decode step after another would. It takes runs of different rows,
# in order, N tokens in total, and returns float32 logits (N, n_words), which are valid until the next call.
DecodeRunsFn = Callable[[Sequence[Run]], torch.Tensor]


class Backend:
    """Base class of backends, which compute decode steps. `name` is the value of `build(backend=)` that selects a backend."""

    name = ""
    packs_weights = False  # True in backends whose weights are packed for this library's kernels

    @staticmethod
    def unsupported(device: torch.device) -> str | None:
        """Return the reason, as a text, why this backend cannot run on a device of this machine; None if it can."""
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy or pickle the backend without its captured decode steps, which are valid only in this process."""
        return type(self), ()

    def begin(self, forward: EngineForward, n_rows: int) -> DecodeFn:
        """Return the function that runs the decode steps of one call, for n_rows rows, with the model's current weights."""
        raise NotImplementedError

    def begin_runs(self, forward: EngineForward) -> DecodeRunsFn:
        """Return the function that decodes several tokens of a row at once, with the model's current weights."""
        raise NotImplementedError

    def n_computed(self, n_rows: int, n_guesses: int, longest: int) -> int:
        """Return how many tokens a step computes for n_rows rows, padding included.

        n_guesses: number of guesses in all rows. longest: the largest number of guesses in a row.
        """
        return n_rows + n_guesses
