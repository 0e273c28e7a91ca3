"""What engines compute, counted. Hooks would not do: with one, the model goes through its own `forward`."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llama.engine.forward import EngineForward, MergedLinear


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """The number of tokens of each forward."""
    numbers: list[int] = []
    hidden = EngineForward.hidden_states

    def counting(self: EngineForward, tokens: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        numbers.append(len(tokens))
        return hidden(self, tokens, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineForward, "hidden_states", counting)
        yield numbers


@contextlib.contextmanager
def counted_rows() -> Iterator[tuple[list[int], list[int]]]:
    """The rows that each product of the layers multiplies, and those that become logits."""
    linear: list[int] = []
    head: list[int] = []
    multiply, logits = MergedLinear.forward, EngineForward.logits

    def multiplying(self: MergedLinear, x: torch.Tensor) -> torch.Tensor:
        linear.append(len(x))
        return multiply(self, x)

    def computing(self: EngineForward, hidden: torch.Tensor) -> torch.Tensor:
        head.append(len(hidden))
        found = logits(self, hidden)
        linear.pop()  # the head's own product
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MergedLinear, "forward", multiplying)
        patch.setattr(EngineForward, "logits", computing)
        yield linear, head
