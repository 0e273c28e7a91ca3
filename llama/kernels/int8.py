"""TODO."""

import torch
import torch.nn.functional as F

from .. import compat, tuning
from ..quantization.weight import QuantizedWeight
from . import half_precision
from .base import LinearKernel


class Int8DequantLinear(LinearKernel):
    """Keep q as it is, and dequantize it for each product: a piece at a time on the CPU; on a GPU a compiler may fuse it."""

    format = "int8"

    def __init__(self, weight: QuantizedWeight) -> None:
        self.weight = weight

    def forward_2d(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        x = x.to(weight.dtype)
        if not x.is_cpu or torch.compiler.is_compiling() or weight.in_features != weight.values.shape[1]:
            return F.linear(x, weight.dequantize())
        groups = weight.scales.shape[1]

        def piece(out: slice, buffer: torch.Tensor) -> torch.Tensor:
            scale = weight.scales[out].view(len(buffer), -1, groups, 1).to(buffer.dtype)
            buffer.copy_(weight.values[out].view_as(buffer)).unflatten(2, (groups, -1)).mul_(scale)
            return buffer.transpose(1, 2)

        return half_precision.linear_in_pieces(x, len(weight.values), piece)

    def unpack(self) -> QuantizedWeight:
        return self.weight


def split_into_two_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows x (N, in) as whole numbers of 15 bits, 128 * high + low, in int8 (2, N, in), and the scale of each row, (N, 1)."""
    scale = (torch.linalg.vector_norm(x, torch.inf, 1, keepdim=True) / 16256).clamp_(min=1e-30)  # 127 * 128
    whole = (x / scale).round_()
    high = (whole / 128).round_()
    return torch.stack((high, whole - 128 * high)).clamp_(-128, 127).to(torch.int8), scale


class Int8CudaLinear(LinearKernel):
    """One scale for each row of the weight; cuBLAS multiplies int8 by int8. Rows of x are rounded to 15 bits, so that values
    beside a large one lose no more than in groups of 8 bits. Rounding the rows takes many small kernels: a single
    row that is compiled is not rounded, and all of its product is one kernel."""

    format = "int8"

    def __init__(self, weight: QuantizedWeight) -> None:
        self.weight, self.scale = weight, weight.scales.flatten().float()

    def forward_2d(self, x: torch.Tensor) -> torch.Tensor:
        q, n, dtype = self.weight.values, len(x), self.weight.dtype
        if n == 1 and torch.compiler.is_compiling():
            return ((x.float() * q.float()).sum(1) * self.scale).to(dtype).unsqueeze(0)
        if n > tuning.INT8_CUDA_ROWS:
            return torch.cat([self.forward_2d(rows) for rows in x.split(tuning.INT8_CUDA_ROWS)])
        digits, scales = split_into_two_int8(x.float())
        rows = q.new_zeros(max(2 * n, 32), x.shape[1])  # PyTorch asks for 17 or more
        rows[: 2 * n] = digits.flatten(0, 1)
        high, low = compat.int8_matmul(rows, q.t())[: 2 * n].float().view(2, n, len(q))
        return (high.mul_(128).add_(low).mul_(self.scale).mul_(scales)).to(dtype)

    def unpack(self) -> QuantizedWeight:
        return self.weight

    @staticmethod
    def serves(weight: QuantizedWeight) -> bool:
        fits = weight.scales.shape[1] == 1 and not any(size % 8 for size in weight.values.shape)
        return fits and torch.cuda.get_device_capability(weight.device) >= (7, 5)
