"""Linear kernels for int8 weights that use PyTorch only: one dequantizes the weight, the other calls cuBLAS."""

import torch
import torch.nn.functional as F

from .. import compat, tuning
from ..quantization.weight import QuantizedWeight
from . import half_precision
from .base import LinearKernel


class Int8DequantLinear(LinearKernel):
    """Dequantize an int8 weight whenever it is multiplied.

    On the CPU, one piece of the weight is dequantized at a time. torch.compile may fuse dequantizing and multiplying into one
    kernel.
    """

    format = "int8"

    def __init__(self, weight: QuantizedWeight) -> None:
        self.weight = weight

    def forward_2d(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        x = x.to(weight.dtype)
        if not x.is_cpu or torch.compiler.is_compiling() or weight.in_features != weight.values.shape[1]:
            return F.linear(x, weight.dequantize())
        groups = weight.scales.shape[1]

        def piece(outs: slice, buffer: torch.Tensor) -> torch.Tensor:
            scale = weight.scales[outs].view(len(buffer), -1, groups, 1).to(buffer.dtype)
            buffer.copy_(weight.values[outs].view_as(buffer)).unflatten(2, (groups, -1)).mul_(scale)
            return buffer.transpose(1, 2)

        return half_precision.linear_in_pieces(x, len(weight.values), piece)

    def unpack(self) -> QuantizedWeight:
        return self.weight


def split_into_two_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows x (N, in) to integers of 15 bits, and split each integer into 128 * high + low.

    Return high and low stacked as int8 (2, N, in), and the scale of each row as (N, 1).
    """
    scale = (torch.linalg.vector_norm(x, torch.inf, 1, keepdim=True) / 16256).clamp_(min=1e-30)  # 16256 = 127 * 128
    integers = (x / scale).round_()
    high = (integers / 128).round_()
    return torch.stack((high, integers - 128 * high)).clamp_(-128, 127).to(torch.int8), scale


class Int8CudaLinear(LinearKernel):
    """Multiply int8 activations by an int8 weight that has one scale per row, with cuBLAS.

    Each activation is quantized to 15 bits, stored as two int8 values, with one scale per row. With only 8 bits, one large
    activation would make the rest of its row too imprecise. Under torch.compile, a single row is not quantized, because
    quantizing it launches many small kernels; one fused kernel multiplies it in float32 instead.
    """

    format = "int8"

    def __init__(self, weight: QuantizedWeight) -> None:
        self.weight, self.scale = weight, weight.scales.flatten().float()

    def forward_2d(self, x: torch.Tensor) -> torch.Tensor:
        values, n, dtype = self.weight.values, len(x), self.weight.dtype
        if n == 1 and torch.compiler.is_compiling():
            return ((x.float() * values.float()).sum(1) * self.scale).to(dtype).unsqueeze(0)
        if n > tuning.INT8_CUDA_ROWS:
            return torch.cat([self.forward_2d(rows) for rows in x.split(tuning.INT8_CUDA_ROWS)])
        high_and_low, scales = split_into_two_int8(x.float())
        rows = values.new_zeros(max(2 * n, 32), x.shape[1])  # `compat.int8_matmul` requires at least 17 rows
        rows[: 2 * n] = high_and_low.flatten(0, 1)
        high, low = compat.int8_matmul(rows, values.t())[: 2 * n].float().view(2, n, len(values))
        return (high.mul_(128).add_(low).mul_(self.scale).mul_(scales)).to(dtype)

    def unpack(self) -> QuantizedWeight:
        return self.weight

    @staticmethod
    def supports(weight: QuantizedWeight) -> bool:
        """Return True if cuBLAS can multiply the weight.

        The weight must have one scale per row and sizes divisible by 8, and the GPU must have compute capability 7.5 or higher.
        """
        fits = weight.scales.shape[1] == 1 and not any(size % 8 for size in weight.values.shape)
        return fits and torch.cuda.get_device_capability(weight.device) >= (7, 5)
