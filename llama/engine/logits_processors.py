"""Logits processors: functions of callers that change the logits of an answer before each of its tokens is chosen."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import InputError, describe

# (tokens of the prompt and of the answer so far, logits (vocab,) float32 on the model's device) -> logits of the same shape
LogitsProcessor = Callable[[list[int], torch.Tensor], torch.Tensor]


@dataclass
class ProcessedRow:
    """A row of the batch whose answer has a logits processor."""

    processor: LogitsProcessor
    label: str  # name of the prompt in errors
    tokens: list[int]  # tokens of the prompt and of the answer so far

    def process(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits (vocab,) as the processor changes them. The processor may change the tensor in place and return it.

        Raises InputError if it returns something else than logits, if one is NaN or +inf, or if no token is left to choose.
        """
        processed = self.processor([*self.tokens], logits)
        if not isinstance(processed, torch.Tensor) or processed.shape != logits.shape:
            shape = f" of shape {tuple(processed.shape)}" if isinstance(processed, torch.Tensor) else ""
            what = type(processed).__name__ if shape else describe(processed)
            raise InputError(
                f"{self.label}: its logits processor has returned {what}{shape}; it must return the logits, "
                f"a tensor of shape {tuple(logits.shape)}"
            )
        largest = processed.amax().item()
        if largest == -torch.inf:
            raise InputError(f"{self.label}: its logits processor has set all logits to -inf; it must leave a token to choose")
        if not abs(largest) < torch.inf:
            raise InputError(f"{self.label}: its logits processor has returned {largest}; logits are finite, or -inf")
        return processed


def on_rank0(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
    """Stand for a logits processor on ranks that follow rank 0, which alone calls it."""
    raise AssertionError("a logits processor has been called on another rank than rank 0")
