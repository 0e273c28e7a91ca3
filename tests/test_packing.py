"""pack.c quantizes, packs and unpacks weights exactly as quantize.py does."""

import copy
import dataclasses
import pickle

import pytest
import torch

from llama.kernels.blocked_linear import ACTIVATION_GROUP, BlockedLinear, BlockedWeight
from llama.quantization.quantize import quantize
from llama.quantization.weight import QuantizedWeight, group_size

from . import kernel_configs
from .kernel_configs import (
    DTYPES,
    SHAPES,
    packs,
    random,
)

threads = kernel_configs.threads  # a fixture


def difficult_weight(out: int, width: int) -> torch.Tensor:
    """Return a weight with rows of all magnitudes, rows of equal values, an outlier, and values near the float16 maximum."""
    weight = random(out, width) * torch.logspace(-6, 1, out).unsqueeze(1)
    weight[1], weight[2, : width // 2], weight[3] = 0, 0, 0.37
    weight[4, width // 3], weight[5], weight[6] = 50, weight[5].abs(), -weight[6].abs()
    weight[7] *= 60000 / weight[7].abs().max()
    return weight


@packs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize(("out", "width"), [(64, 64), (100, 200), (37, 40), (20, 7), (70, 2048), (66, 2304), (66, 2080)])
def test_pack_c_quantizes_bitwise_as_quantize_py_does(format: str, dtype: torch.dtype, out: int, width: int) -> None:
    rows = difficult_weight(out, width).to(dtype)
    want, got = quantize(rows, format), BlockedWeight.from_rows(format, [rows], group_size(width, format)).to_quantized(dtype)
    assert torch.equal(got.values, want.values) and torch.equal(got.scales, want.scales)
    assert (got.zeros is None and want.zeros is None) or torch.equal(got.zeros, want.zeros)  # type: ignore[arg-type]


@packs
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-20, 1e20, 1e37])
def test_pack_c_quantizes_tiny_and_huge_weights_as_quantize_py_does(format: str, size: float) -> None:
    rows = random(70, 96).clamp(-3, 3) * size
    want, got = quantize(rows, format), BlockedWeight.from_rows(format, [rows], 32).to_quantized(torch.float32)
    assert torch.equal(got.dequantize(), want.dequantize()) and got.dequantize().isfinite().all()


@packs
@pytest.mark.parametrize("format", ["bfloat16", "int8", "int4"])
def test_several_views_are_packed_as_their_concatenation(format: str, threads: int) -> None:
    """Pack strided views of a wider matrix, as they occur in the shards of a checkpoint."""
    file = random(90, 400).bfloat16()
    views = [file[:10, 3:131], file[10:77, :128], file[::2, 200:328]]
    assert torch.equal(
        BlockedWeight.from_rows(format, views, ACTIVATION_GROUP).dequantize(torch.float32),
        BlockedWeight.from_rows(format, [torch.cat(views)], ACTIVATION_GROUP).dequantize(torch.float32),
    )


@packs
@pytest.mark.parametrize("format", ["bfloat16", "int8", "int4"])
def test_packing_ignores_the_callers_default_device(format: str) -> None:
    rows = random(70, 96).bfloat16()
    want = BlockedWeight.from_rows(format, [rows], ACTIVATION_GROUP)
    with torch.device("meta"):
        got = BlockedWeight.from_rows(format, [rows], ACTIVATION_GROUP)
    assert torch.equal(got.weight, want.weight)


@packs
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_unpacking_a_kernel_or_its_copy_returns_the_quantized_weight(format: str, out: int, width: int) -> None:
    quantized = quantize(random(out, width), format)
    blocks = BlockedWeight.from_quantized(quantized)
    kernel = BlockedLinear(blocks, torch.float32)
    for copied in (kernel, copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        unpacked = copied.unpack()
        assert isinstance(unpacked, QuantizedWeight)
        for field in dataclasses.fields(QuantizedWeight):
            a, b = getattr(quantized, field.name), getattr(unpacked, field.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
        assert torch.equal(copied.dequantize(), quantized.dequantize())
    if out > 64:  # ranks slice the output layer in whole blocks
        assert torch.equal(blocks.slice_outputs(64, out).dequantize(torch.float32), quantized.dequantize()[64:])


@packs
@pytest.mark.parametrize(("out", "width"), [(64, 64), (100, 190), (37, 2)])
def test_unpacking_bfloat16_blocks_returns_the_weight_unchanged(out: int, width: int) -> None:
    weight = random(out, width).bfloat16()
    blocks = BlockedWeight.from_rows("bfloat16", [weight], ACTIVATION_GROUP)
    assert torch.equal(blocks.dequantize(torch.bfloat16), weight)
    first, last = 1, width - width // 3
    assert torch.equal(blocks.slice_inputs(first, last).dequantize(torch.bfloat16), weight[:, first:last])
