"""The interface of a weight that is held in a kernel's own form."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..quantization.weight import QuantizedWeight


class LinearKernel:
    """A weight (out, in) in a form of its own that multiplies x (..., in) to (..., out)."""

    format: str | None = None  # "int8" or "int4" if quantized
    rebuild: Callable[..., Any]  # packing.repack, set there: packs a weight again on another machine

    # Compiled code calls this by name: PyTorch 2.6 recompiles for each object that is called, but not for each method.
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x (..., in): (..., out)."""
        if x.requires_grad and torch.is_grad_enabled():  # the kernels have no derivative
            return F.linear(x, self.dequantize())
        x = x.contiguous()
        if x.ndim == 2:
            return self.forward_2d(x)
        y = self.forward_2d(x.view(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward(x)

    def forward_2d(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x (N, in): (N, out)."""
        raise NotImplementedError

    def swiglu(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return silu of the first half of the outputs times the second, (N, out / 2); None without a kernel that does both."""
        return None

    def rows(self, first: int, last: int) -> "LinearKernel | None":
        """Return a kernel of the outputs first..last; None if that would take a copy."""
        return None

    def use_highest_precision(self) -> None:
        """Multiply as precisely as the kernel can from now on, for logits."""

    def unpack(self) -> torch.Tensor | QuantizedWeight:
        """Return the weight that `pack_weight` was given."""
        raise NotImplementedError

    def dequantize(self) -> torch.Tensor:
        """Return the weight as a plain tensor (out, in)."""
        weight = self.unpack()
        return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the weight that was packed: the form belongs to this machine."""
        return LinearKernel.rebuild, (self.unpack(),)
