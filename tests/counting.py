"""Count the tokens and rows that the engine computes.

Module hooks cannot count them: the engine runs a model that has hooks through the model's own `forward`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llama.engine.forward import EngineForward, MergedLinear


@contextlib.contextmanager
def count_forward_tokens() -> Iterator[list[int]]:
    """Yield a list that receives the number of tokens of each forward pass."""
    token_counts: list[int] = []
    hidden = EngineForward.hidden_states

    def counting(self: EngineForward, tokens: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        token_counts.append(len(tokens))
        return hidden(self, tokens, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineForward, "hidden_states", counting)
        yield token_counts


@contextlib.contextmanager
def count_matmul_rows() -> Iterator[tuple[list[int], list[int]]]:
    """Yield two lists of row counts: of all matrix multiplications in the layers, and of all calls of the output layer."""
    linear: list[int] = []
    head: list[int] = []
    multiply, logits = MergedLinear.forward, EngineForward.logits

    def multiplying(self: MergedLinear, x: torch.Tensor, decoding: bool) -> torch.Tensor:
        linear.append(len(x))
        return multiply(self, x, decoding)

    def computing(self: EngineForward, hidden: torch.Tensor) -> torch.Tensor:
        head.append(len(hidden))
        result = logits(self, hidden)
        linear.pop()  # removes the count of the output layer, which belongs in `head`
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MergedLinear, "forward", multiplying)
        patch.setattr(EngineForward, "logits", computing)
        yield linear, head
