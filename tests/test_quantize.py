"""Test quantization to int8 and int4: accuracy, kernels, and refused arguments."""

import copy
import dataclasses
import itertools
import pickle
from typing import Any

import pytest
import torch

from llama import DeviceError, InputError, Llama, compat, tuning
from llama.checkpoint import packed_file
from llama.kernels import half_precision, int4, int8, packing
from llama.quantization.quantize import quantize
from llama.quantization.weight import QuantizedWeight

from .support import quantize_int8_per_row

DTYPES = torch.float32, torch.bfloat16, torch.float16
SHAPES = (384, 192), (344, 172), (64, 1088), (20, 7)  # 344 x 172 and 20 x 7 are not multiples of the kernels' block sizes


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a random matrix whose rows differ in scale, as rows of trained weights do."""
    g = torch.Generator().manual_seed(shape[0])
    return (torch.randn(shape, generator=g) * torch.rand(shape[0], 1, generator=g)).to(dtype)


def in_groups(x: torch.Tensor, group: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[1] % group)).unflatten(1, (-1, group))


@pytest.mark.parametrize("shape", [*SHAPES, (64, 2304)], ids=str)
def test_int8_errors_stay_within_one_step_and_both_formats_use_their_full_range(shape: tuple[int, int]) -> None:
    """Allow an int8 value an error of half a step, because the value is rounded, plus a quarter step, because the scale is."""
    weight = random(*shape)
    int8_weight, int4_weight = quantize(weight, "int8"), quantize(weight, "int4")
    error = in_groups(int8_weight.dequantize() - weight, int8_weight.group_size).abs()
    assert (error <= 0.76 * int8_weight.scales.unsqueeze(2)).all()
    assert in_groups(int8_weight.values, int8_weight.group_size).abs().amax(2).ge(126).all()
    assert int4_weight.values.min() == -8 and int4_weight.values.max() == 7


def test_an_outlier_changes_the_values_of_its_own_group_only() -> None:
    weight = random(64, 2304)
    with_outlier = weight.clone()
    with_outlier[:, 200] = 50
    for format in ("int8", "int4"):
        before, after = quantize(weight, format), quantize(with_outlier, format)
        other_groups = torch.arange(2304) // before.group_size != 200 // before.group_size
        assert torch.equal(after.dequantize()[:, other_groups], before.dequantize()[:, other_groups])


@pytest.mark.parametrize(("format", "max_error"), [("int8", 4.5e-5), ("int4", 0.00665)])
def test_the_squared_error_of_gaussian_weights_is_that_of_least_squares(format: str, max_error: float) -> None:
    """Divide the mean squared error by the mean square of the weights. For int4 this ratio must stay below 0.00665. The ratio
    would be 0.0080 if each group were rounded between its minimum and maximum, and 0.0067 with the best fixed fraction of that
    range."""
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    assert (quantize(weight, format).dequantize() - weight).square().mean() < max_error * weight.square().mean()


def test_weights_of_zero_stay_zero() -> None:
    for format in ("int8", "int4"):
        zeros = quantize(torch.zeros(64, 64), format)
        kernel = packing.pack_weight(zeros)
        assert kernel
        assert zeros.dequantize().abs().max() < 1e-20
        assert kernel(torch.ones(2, 64)).abs().max() < 1e-20
        assert not kernel(torch.zeros(1, 64)).any()


def int8_matmul_overflows() -> bool:
    """Return True if the 8-bit matrix product overflows on this CPU. On a CPU with AVX2 and nothing newer, oneDNN adds 8-bit
    products in 16 bits."""
    largest = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((compat.int8_matmul(largest, largest.t()) != 64 * 127 * 127).any())


KERNELS = {
    "Int8": ("int8", int8.Int8DequantLinear),
    "Int8Cuda": ("int8", int8.Int8CudaLinear),
    "Int4": ("int4", int4.Int4CpuLinear),
}


@pytest.mark.parametrize("n", [1, 3, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel_name", KERNELS)
def test_kernels_multiply_by_the_dequantized_weight(
    kernel_name: str, shape: tuple[int, int], dtype: torch.dtype, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test the kernels that need no compiled C. One of them is Int8CudaLinear, which runs on the CPU in this test. Each kernel
    must also work under torch.compile, and keep its weight when it is copied or pickled. test_blocked_linear.py tests the
    compiled kernels."""
    if kernel_name == "Int8Cuda" and int8_matmul_overflows():
        pytest.skip("this CPU's 8-bit matrix product overflows")
    monkeypatch.setattr(tuning, "PIECE_BYTES", 1 << 15)  # divide each weight into several pieces
    format, kernel_class = KERNELS[kernel_name]
    weight = random(*shape, dtype=dtype)
    quantized = quantize_int8_per_row(weight, dtype) if kernel_name == "Int8Cuda" else quantize(weight, format)
    kernel, x = kernel_class(quantized), random(n, shape[1]).to(dtype)
    rows = x.double()
    if kernel_name == "Int8Cuda":  # Int8CudaLinear rounds each row of x to integers of 15 bits
        scale = (x.float().abs().amax(1, keepdim=True) / 16256).double()
        rows = (rows / scale).round() * scale
    want = rows @ dataclasses.replace(quantized, dtype=torch.float64).dequantize().T
    got = kernel(x)
    assert got.dtype == dtype
    tolerance = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    if kernel_name == "Int8Cuda" and dtype == torch.float32:
        tolerance = 3e-5  # near the middle between two integers, float32 and float64 may round differently
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max()
    assert kernel(x.view(1, n, -1)).shape == (1, n, shape[0])
    torch.compiler.reset()
    compiled = torch.compile(kernel, fullgraph=True, dynamic=False, backend="eager")(x)
    assert compiled.dtype == dtype and (compiled.double() - want).abs().max() <= max(tolerance, 1e-2) * want.abs().max()

    for duplicate in (kernel, copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        unpacked = duplicate.unpack()
        assert torch.equal(unpacked.values, quantized.values)
        # Kernels in float16 round the scales, so unpacking does not give the exact scales back.
        for field in dataclasses.fields(QuantizedWeight) if dtype != torch.float16 else ():
            a, b = getattr(quantized, field.name), getattr(unpacked, field.name)
            assert not isinstance(a, torch.Tensor) or torch.equal(a, b), field.name


def test_int4_products_of_many_rows_equal_those_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """For many rows, the int4 CPU kernel unpacks its weight in pieces. If PyTorch packs weights in an unknown layout, PyTorch's
    own kernel multiplies any number of rows."""
    kernel = int4.Int4CpuLinear(quantize(random(200, 192, dtype=torch.bfloat16), "int4"))
    x = random(7, 192, dtype=torch.bfloat16)
    want, linear_in_pieces, n_unpacked = kernel(x), half_precision.linear_in_pieces, []
    monkeypatch.setattr(
        half_precision, "linear_in_pieces", lambda x, *rest: (n_unpacked.append(len(x)), linear_in_pieces(x, *rest))[1]
    )
    monkeypatch.setattr(tuning, "INT4_CPU_MAX_ROWS", 0)
    monkeypatch.setattr(tuning, "PIECE_BYTES", 192 * 64 * 2)
    torch.testing.assert_close(kernel(x), want, atol=0.05, rtol=0.02)
    assert n_unpacked == ([7] if int4._half_block_outputs() else [])
    monkeypatch.setattr(int4, "_half_block_outputs", lambda: None)
    assert torch.equal(kernel(x), want)


def pack_as_cuda_does(q: torch.Tensor, tiles: int) -> torch.Tensor:
    """Pack 4-bit values in the layout of PyTorch's CUDA kernel `matrix_to_m16n8k16_Bint4_layout`, which stores the values for
    each of 32 threads next to each other."""
    u = (q + 8).tolist()
    blocks = torch.zeros(len(u) // 8, len(u[0]) // (16 * tiles), 32, tiles // 2, dtype=torch.int64)
    for n, k, thread, pair in itertools.product(*map(range, blocks.shape)):
        first = (k * tiles + 2 * pair) * 16 + thread % 4 * 2
        values = [u[8 * n + thread // 4][first + i] for i in (0, 1, 8, 9, 16, 17, 24, 25)]
        blocks[n, k, thread, pair] = sum(values[v] << 4 * i for i, v in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
    return torch.where(blocks >= 2**31, blocks - 2**32, blocks).to(torch.int32)


@pytest.mark.parametrize("tiles", [2, 4, 8])
def test_int4_weights_packed_on_a_gpu_are_unpacked(tiles: int) -> None:
    q = torch.randint(-8, 8, (16, 16 * tiles * 3), dtype=torch.int8)
    assert torch.equal(int4._unpack_int4_cuda(pack_as_cuda_does(q, tiles), torch.bfloat16), q.bfloat16())


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_slice_of_inputs_inside_one_group_is_packed_and_multiplied(format: str) -> None:
    quantized, x = quantize(random(64, 32), format), random(3, 16)
    kernel = packing.pack_weight(quantized.slice_inputs(8, 24))
    assert kernel and torch.equal(kernel.dequantize(), quantized.dequantize()[:, 8:24])
    torch.testing.assert_close(kernel(x), x @ quantized.dequantize()[:, 8:24].T, atol=0.05, rtol=0.02)


def test_int8_products_in_float16_neither_overflow_nor_underflow() -> None:
    """Test sums that are large before they are scaled, and rows of x whose scale is below the smallest positive float16
    value."""
    quantized = quantize(random(64, 4096) * 0.02, "int8")
    weight, in_float16 = quantized.dequantize().double(), quantized.to(quantized.device, torch.float16)
    x = random(130, 4096)
    x[:, 7] = 700
    want = x.half().double() @ weight.T
    assert (int8.Int8DequantLinear(in_float16)(x.half()).double() - want).abs().max() < 0.01 * want.abs().max()
    x = random(8, 4096) * 1e-4
    want, kernel = x.half().double() @ weight.T, packing.pack_weight(in_float16)
    assert kernel and (kernel(x.half()).double() - want).norm() < 0.03 * want.norm()


# --- refused arguments, special shapes and dtypes ---


@pytest.mark.parametrize("bad", ["int3", "", 8, True, ["int8"], "INT8"])
def test_unknown_formats_are_refused(bad: Any) -> None:
    with pytest.raises(InputError, match=r"quantize is .*use 'int8' or 'int4'"):
        Llama.build("nowhere", "nowhere", quantize=bad)
    with pytest.raises(InputError, match=r"format is .*one of 'bfloat16', 'int8', 'int4'"):
        packed_file.save_packed_file("nowhere", bad)


def test_the_error_for_a_format_without_a_kernel_names_one_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match=r"no kernel on mps; use quantize='int8'"):
        packing.check_kernel("int4", torch.device("mps"), torch.float32)
    with pytest.raises(DeviceError, match=r"dtype is torch.float16; use dtype='bfloat16'"):
        packing.check_kernel("int4", torch.device("cuda"), torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(DeviceError, match=r"capability 8.0 or higher, and cuda:0 has 7.5; use quantize='int8'"):
        packing.check_kernel("int4", torch.device("cuda:0"), torch.bfloat16)
    packing.check_kernel("int4", torch.device("cuda"), torch.bfloat16)
    for format, device in (("int8", "cuda"), ("int8", "mps"), ("int4", "cpu")):
        packing.check_kernel(format, torch.device(device), torch.float16)


def test_a_row_of_zeros_has_a_scale_above_zero() -> None:
    assert quantize(torch.zeros(2, 64), "int8").scales.min() > 0


@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int4_kernels_multiply_inputs_of_another_dtype(dtype: torch.dtype, x_dtype: torch.dtype, rows: int) -> None:
    kernel = packing.pack_weight(quantize(random(384, 1024), "int4", dtype))
    x = random(rows, 1024).to(x_dtype)
    want = x.float() @ kernel.dequantize().float().t()  # type: ignore[union-attr]
    assert (kernel(x) - want).norm() < 0.02 * want.norm()  # type: ignore[misc]
