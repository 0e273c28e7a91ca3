"""The interface of all linear kernels: a weight packed in the kernel's own form, which multiplies activations."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..quantization.weight import QuantizedWeight


class LinearKernel:
    """A packed weight (out, in) that multiplies activations x (..., in) to (..., out)."""

    format: str | None = None  # "int8" or "int4"; None if the weight is not quantized
    rebuild: Callable[..., Any]  # `packing.repack`, which imports this module and so assigns itself here

    # Compiled code calls `forward`, not the object: PyTorch 2.6 recompiles for each object called, but not for each method.
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (..., in) times the weight: (..., out)."""
        if x.requires_grad and torch.is_grad_enabled():  # kernels compute no gradients
            return F.linear(x, self.dequantize())
        x = x.contiguous()
        if x.ndim == 2:
            return self.forward_2d(x)
        y = self.forward_2d(x.view(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward(x)

    def forward_2d(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (N, in) times the weight: (N, out)."""
        raise NotImplementedError

    def swiglu(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return silu of the first half of the outputs times the second half, (N, out / 2); None without a fused kernel."""
        return None

    def rows(self, first: int, last: int) -> "LinearKernel | None":
        """Return a kernel of the outputs first..last that shares the memory; None if it would need a copy."""
        return None

    def use_highest_precision(self) -> None:
        """Make all further products as precise as the kernel can, which logits need."""

    def unpack(self) -> torch.Tensor | QuantizedWeight:
        """Return the weight as it was before packing, except for rounding that packing needed."""
        raise NotImplementedError

    def dequantize(self) -> torch.Tensor:
        """Return the weight as a plain tensor (out, in)."""
        weight = self.unpack()
        return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle or copy the unpacked weight, because another machine may need another packed form."""
        return LinearKernel.rebuild, (self.unpack(),)
