"""Linear kernel for bfloat16 weights in oneDNN's layout, used if the C kernels are not available."""

import torch
import torch.nn.functional as F

from .. import compat, tuning
from .base import LinearKernel


class OneDnnLinear(LinearKernel):
    """Multiply by a weight in oneDNN's own layout, which is faster than `F.linear` with an ordinary tensor."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.packed = compat.onednn_pack(compat.detach(weight))

    def forward_2d(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.packed.dtype)  # autocast in the calling code may have changed the dtype of x
        if len(x) < tuning.ONEDNN_MIN_ROWS:
            return self.forward_2d(F.pad(x, (0, 0, 0, tuning.ONEDNN_MIN_ROWS - len(x))))[: len(x)]
        return compat.onednn_linear(x, self.packed)

    def unpack(self) -> torch.Tensor:
        return self.packed.to_dense()
