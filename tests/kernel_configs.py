"""Configurations of BlockedLinear's kernels, and what their products are checked against."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from llama.kernels import avx2, avx512, pack
from llama.kernels.blocked_linear import ACTIVATION_GROUP, BlockedLinear, BlockedWeight
from llama.kernels.c_extension import CExtension
from llama.quantization.quantize import quantize

packs = pytest.mark.skipif(pack.extension() is None, reason="pack.c is not compiled, or this CPU has no AVX2")
DTYPES = torch.bfloat16, torch.float16, torch.float32
# The largest relative error of rounding a value to the dtype.
ROUNDING_ERROR = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}
ROWS = 1, 2, 3, 4, 5, 16, 130
EXTENSIONS = {"AVX-512": avx512.extension(), "AVX2": avx2.extension()}


class KernelConfig(NamedTuple):
    """A choice of extension, weight format and activation dtype, made by the test instead of by llama.

    `digits` is the number of 8-bit integers that represent one activation.
    """

    extension_name: str
    format: str
    dtype: torch.dtype
    digits: int

    def extension(self) -> CExtension:
        """Return the extension; skip the test if it is not compiled."""
        extension = EXTENSIONS[self.extension_name]
        if extension is None or pack.extension() is None:
            pytest.skip(f"the {self.extension_name} extension is not compiled here")
        return extension

    def kernel(self, blocks: BlockedWeight) -> BlockedLinear:
        """Return a kernel with this configuration that multiplies by the blocked weight."""
        extension = self.extension()
        kernel = BlockedLinear(blocks, self.dtype)
        kernel.extension, kernel.int8_per_activation = extension, self.digits
        if self.digits == 2:
            kernel.use_highest_precision()
        return kernel

    def pack(self, weight: torch.Tensor) -> tuple[BlockedLinear, torch.Tensor]:
        """Pack a weight (out, in); return its kernel and its dequantized values in float64."""
        self.extension()
        if self.format == "bfloat16":
            return self.kernel(
                BlockedWeight.from_rows(self.format, [weight.bfloat16()], ACTIVATION_GROUP)
            ), weight.bfloat16().double()
        quantized = quantize(weight, self.format, self.dtype)
        dequantized = dataclasses.replace(quantized, dtype=torch.float64).dequantize()
        return self.kernel(BlockedWeight.from_quantized(quantized)), dequantized

    def round_activations(self, x: torch.Tensor) -> torch.Tensor:
        """Return x in float64, rounded as the kernel rounds it before it multiplies."""
        return x.double() if self.format == "bfloat16" else round_to_8_bits(x, self.digits)


QUANTIZED_CONFIGS = [KernelConfig(*config) for config in itertools.product(EXTENSIONS, ("int8", "int4"), DTYPES, (1, 2))]
CONFIGS = [KernelConfig("AVX-512", "bfloat16", torch.bfloat16, 1), *QUANTIZED_CONFIGS]
NAMES = {
    config: f"{config.format} {str(config.dtype)[6:]} {config.digits} digit(s) {config.extension_name}" for config in CONFIGS
}
every_config = pytest.mark.parametrize("config", CONFIGS, ids=NAMES.get)
quantized_configs = pytest.mark.parametrize("config", QUANTIZED_CONFIGS, ids=NAMES.get)
# (outputs, inputs): a whole block; outputs that do not fill a block; inputs that do not fill a group; wider groups.
SHAPES = (64, 64), (100, 192), (37, 40), (129, 2304)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def round_to_8_bits(x: torch.Tensor, digits: int = 1, group: int = ACTIVATION_GROUP) -> torch.Tensor:
    """Return x (N, in) in float64, rounded as the kernels round activations.

    Each group of neighbouring activations shares a scale, and each activation becomes an 8-bit integer times the scale.
    If `digits` is 2, a second 8-bit integer with a smaller scale represents the rounding error of the first.
    """
    groups = F.pad(x.float(), (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    rounded = torch.zeros_like(groups, dtype=torch.float64)
    for _ in range(digits):
        scale = groups.abs().amax(2, keepdim=True).clamp(min=1e-30) / 127
        digit = (groups * scale.reciprocal()).round()
        rounded += digit.double() * scale.double()
        groups = groups - digit * scale
    return rounded.flatten(1)[:, : x.shape[1]]


def assert_product(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, atol: float = 1e-7) -> None:
    """Check that y is x @ weight.T up to the error of float32 sums and of one rounding to y's dtype."""
    want, sums = x @ weight.T, x.abs() @ weight.abs().T
    tolerance = 1e-6 * sums + 1.01 * ROUNDING_ERROR[y.dtype] * want.abs() + atol
    excess = ((y.double() - want).abs() - tolerance).max().item()
    assert excess <= 0
