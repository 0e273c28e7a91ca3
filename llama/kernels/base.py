"""The base class of all linear kernels. A kernel contains a packed weight and multiplies activations by it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..quantization.weight import QuantizedWeight


class LinearKernel:
    """A packed weight (out, in) that multiplies activations x (..., in) to (..., out)."""

    format: str | None = None  # "int8" or "int4"; None if the weight is not quantized
    rebuild: Callable[..., Any]  # `packing.repack`; assigned by packing.py, because an import here would be circular

    # Call `forward` instead of the kernel itself: torch.compile in PyTorch 2.6 recompiles for each kernel that is called as a
    # function, but not for each kernel whose method is called.
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (..., in) times the weight, shaped (..., out)."""
        if x.requires_grad and torch.is_grad_enabled():  # kernels compute no gradients
            return F.linear(x, self.dequantize())
        x = x.contiguous()
        if x.ndim == 2:
            return self.forward_2d(x)
        y = self.forward_2d(x.view(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward(x)

    def prefill(self, x: torch.Tensor) -> torch.Tensor:
        """Return x times the weight, in a prefill. By default, this is `forward`.

        An override is fast for many rows, and computes each row in the same way for any number of rows.
        """
        return self.forward(x)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Return x times the weight, in a decode step. By default, this is `forward`.

        An override is fast for a few rows, and computes each row in the same way for any number of rows.
        """
        return self.forward(x)

    def forward_2d(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (N, in) times the weight, shaped (N, out)."""
        raise NotImplementedError

    def swiglu(self, x: torch.Tensor, decoding: bool) -> torch.Tensor | None:
        """Return silu(first half of outputs) * second half, (N, out / 2), for x (N, in); None if no fused kernel exists.

        decoding: True to multiply as `decode` does, False as `prefill`.
        """
        return None

    def rows(self, first: int, last: int) -> "LinearKernel | None":
        """Return a kernel for outputs `first` to `last` - 1 that shares this kernel's memory, or None if that needs a copy."""
        return None

    def use_highest_precision(self) -> None:
        """Make the kernel compute as precisely as it can from now on; logits need more precision."""

    def unpack(self) -> torch.Tensor | QuantizedWeight:
        """Return the unpacked weight, as a tensor or a QuantizedWeight. Packing may have rounded its values."""
        raise NotImplementedError

    def dequantize(self) -> torch.Tensor:
        """Return the weight as a plain tensor (out, in)."""
        weight = self.unpack()
        return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle or copy the unpacked weight, because another machine may need another packed form."""
        return LinearKernel.rebuild, (self.unpack(),)
