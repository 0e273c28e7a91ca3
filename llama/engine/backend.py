"""The interface of backends. A backend computes the decode steps of a model."""

from collections.abc import Callable
from typing import Any

import torch

from .forward import EngineForward

# A function that decodes one token per row. Arguments: tokens (B,), positions (B,), and a list of the same positions on the
# host. It returns float32 logits (B, n_words), which are valid until the next call. For a free row, the list contains 0, and
# the tensor contains an arbitrary position.
DecodeFn = Callable[[torch.Tensor, torch.Tensor, list[int]], torch.Tensor]


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
