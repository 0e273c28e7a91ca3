"""The interface of a backend: how decode steps are computed."""

from collections.abc import Callable
from typing import Any

import torch

from .forward import EngineForward

# Decode one token per row: tokens and positions (B,) -> float32 logits (B, vocab), valid until the next step. The list holds
# the positions as the host knows them: 0 for a free row, whose entry in the tensor is arbitrary.
DecodeFn = Callable[[torch.Tensor, torch.Tensor, list[int]], torch.Tensor]


class Backend:
    """How a model's decode steps are computed. `name` is the value of `build(backend=)`."""

    name = ""
    packs_weights = False  # True if weights are held in the forms of this library's kernels

    @staticmethod
    def unsupported(device: torch.device) -> str | None:
        """Return, in words, why this backend cannot serve a device on this machine; None if it can."""
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without captured steps, which belong to this process and its tensors."""
        return type(self), ()

    def begin(self, forward: EngineForward, n_rows: int) -> DecodeFn:
        """Return the function that runs a call's decode steps, with the model's weights as they are now."""
        raise NotImplementedError
