"""How a weight is held so that multiplying by it reads it as one stream.

A parallel layer gives its weight to `pack` once, when it is loaded. Where there is nothing better than the weight itself
and `F.linear`, it gets None.
"""

import torch
import torch.nn.functional as F

SMALLEST = 1 << 19  # bytes; calling oneDNN costs more than F.linear, and below this more than it saves


class Packed:
    """bfloat16 on the CPU, reordered once into the blocks that oneDNN's kernel reads."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad and torch.is_grad_enabled():  # which the kernel has no derivative for
            return F.linear(x, self.dense())
        return torch.ops.mkldnn._linear_pointwise(x, self.blocks, None, "none", [], "")

    def dense(self) -> torch.Tensor:
        return self.blocks.to_dense()

    def __reduce__(self) -> tuple[type["Packed"], tuple[torch.Tensor]]:
        """Copied and pickled as the weight: the blocks are this machine's."""
        return Packed, (self.dense(),)


def pack(weight: torch.Tensor) -> Packed | None:
    """The form that multiplies (..., in) to (..., out) fastest, for a weight (out, in); None: the weight as it is."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or weight.nbytes < SMALLEST:
        return None
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return None
    return Packed(weight)
