"""What a weight becomes that is held in a form of its own."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .quantize import Quantized


class Kernel:
    """A weight (out, in) in a form of its own, which multiplies x (..., in) to (..., out)."""

    kind: str | None = None  # of quantization
    again: Callable[..., Any]  # kernels.repacked

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out)."""
        if x.requires_grad and torch.is_grad_enabled():  # which the kernels have no derivative for
            return F.linear(x, self.dense())
        x = x.contiguous()
        if x.ndim == 2:
            return self.multiply(x)
        y = self.multiply(x.view(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])

    __call__ = product  # PyTorch 2.6 compiles anew for each object that is called, but not for each whose method is

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, in) -> (N, out)."""
        raise NotImplementedError

    def swiglu(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return silu of the first half of the outputs times the second, (N, out / 2), if there is a kernel that does both."""
        return None

    def part(self, first: int, last: int) -> "Kernel | None":
        """Return a kernel of the outputs first..last alone; None where that would take a copy."""
        return None

    def for_logits(self) -> None:
        """Multiply as exactly as it can from now on: what comes out tells which token is the likeliest."""

    def held(self) -> torch.Tensor | Quantized:
        """What `pack` was given."""
        raise NotImplementedError

    def dense(self) -> torch.Tensor:
        held = self.held()
        return held.dense() if isinstance(held, Quantized) else held

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as what it was made from: the form is this machine's."""
        return Kernel.again, (self.held(),)
