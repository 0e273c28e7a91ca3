"""With AMX, products are those of the plain weights and independent of other rows, and oneDNN's products do not change."""

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from llama.kernels import avx512
from llama.kernels.blocked_linear import BlockedLinear, BlockedWeight
from llama.quantization.quantize import quantize

from .kernel_configs import random

pytestmark = pytest.mark.skipif(not avx512.use_amx(True), reason="this CPU has no AMX")
ROWS = (1, 2, 15, 16, 17, 31, 32, 33, 49, 255, 257, 300, 517)  # tiles have 16 rows, tasks 256
SHAPES = ((64, 32), (72, 96), (200, 320), (640, 2816))  # outputs and inputs: panels have 256 inputs, tasks up to 4 * 64 outputs


@pytest.fixture(autouse=True)
def amx_in_use() -> Iterator[None]:
    yield
    avx512.use_amx(True)


def bf16_kernel(weight: torch.Tensor) -> BlockedLinear:
    return BlockedLinear(BlockedWeight.from_dense(weight), torch.bfloat16)


def quantized_kernel(format: str, weight: torch.Tensor) -> BlockedLinear:
    kernel = BlockedLinear(BlockedWeight.from_quantized(quantize(weight, format, torch.bfloat16)), torch.bfloat16)
    kernel.int8_per_activation = 1
    return kernel


@pytest.mark.parametrize("n_threads", [1, 3])
def test_bfloat16_products_are_those_of_float64(n_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        for out, width in SHAPES:
            weight, x = random(out, width).bfloat16(), random(max(ROWS), width, seed=1).bfloat16()
            kernel, exact = bf16_kernel(weight), x.double() @ weight.double().T
            for n in ROWS:
                y = kernel.prefill(x[:n])
                assert torch.equal(y, kernel.decode(x[:n]))
                assert (y.double() - exact[:n]).abs().max() < 0.006 * exact[:n].abs().max()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_prefill_multiplies_by_the_weight_converted_to_bfloat16(format: str) -> None:
    """Compare with the bfloat16 kernel, bitwise; a decode step rounds activations to 8 bits instead."""
    for out, width in SHAPES:
        kernel = quantized_kernel(format, random(out, width).bfloat16())
        twin = bf16_kernel(kernel.blocks.dequantize(torch.bfloat16))
        x = random(max(ROWS), width, seed=1).bfloat16()
        for n in ROWS:
            assert torch.equal(kernel.prefill(x[:n]), twin.prefill(x[:n]))
        decoded = kernel.decode(x).double()
        assert not torch.equal(decoded, twin.decode(x).double())
        assert (decoded - twin.decode(x).double()).norm() < 0.01 * decoded.norm()


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_a_row_is_bitwise_the_same_alone_and_in_any_batch(format: str) -> None:
    weight = random(200, 2816).bfloat16()
    kernel = bf16_kernel(weight) if format == "bf16" else quantized_kernel(format, weight)
    x = random(530, 2816, seed=1).bfloat16()
    together = kernel.prefill(x)
    for n in (1, 2, 7, 16, 17, 40, 256):
        assert torch.equal(torch.cat([kernel.prefill(rows) for rows in x.split(n)]), together), n


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_decode_steps_of_quantized_weights_do_not_change_with_amx(format: str) -> None:
    kernel, x = quantized_kernel(format, random(200, 320)), random(40, 320, seed=1).bfloat16()
    with_amx = kernel.decode(x)
    assert not avx512.use_amx(False)
    assert torch.equal(kernel.decode(x), with_amx) and torch.equal(kernel.prefill(x), with_amx)


def test_without_amx_bfloat16_is_multiplied_by_avx512() -> None:
    kernel, x = bf16_kernel(random(200, 2816).bfloat16()), random(40, 2816, seed=1).bfloat16()
    with_amx = kernel.prefill(x)
    assert not avx512.use_amx(False)
    y = kernel.prefill(x)
    assert not torch.equal(y, with_amx) and (y - with_amx).float().norm() < 0.002 * with_amx.float().norm()


def test_products_of_onednn_before_and_after_are_the_same() -> None:
    """oneDNN keeps the shapes of its tiles from one product to the next; our kernels set other shapes in between."""
    weight, x = random(256, 512).bfloat16(), random(64, 512, seed=1).bfloat16()
    kernel, want = bf16_kernel(weight), F.linear(x, weight)
    for n in ROWS:
        kernel.prefill(x[:n])
        assert torch.equal(F.linear(x, weight), want)


@pytest.mark.parametrize(
    ("limit", "used"), [("AVX512_CORE_BF16", False), ("AVX512_CORE_AMX", True), ("all", True), (None, True)]
)
def test_amx_obeys_the_setting_of_onednn(limit: str | None, used: bool) -> None:
    code = """
import torch
from llama.kernels import avx512
from llama.kernels.blocked_linear import BlockedLinear, BlockedWeight
torch.manual_seed(0)
weight, x = torch.randn(512, 2816).bfloat16(), torch.randn(64, 2816).bfloat16()
kernel = BlockedLinear(BlockedWeight.from_dense(weight), torch.bfloat16)
y = kernel.prefill(x)
avx512.use_amx(True)
print(torch.equal(y, kernel.prefill(x)))
"""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        environment = {name: limit} if limit else {}
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert result.stdout.strip() == str(used)


def test_a_thread_with_a_small_stack_may_compute() -> None:
    kernel, x, results = bf16_kernel(random(200, 320).bfloat16()), random(40, 320, seed=1).bfloat16(), []
    before = threading.stack_size(128 << 10)
    try:
        thread = threading.Thread(target=lambda: results.append(kernel.prefill(x)))
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert torch.equal(results[0], kernel.prefill(x))


def test_attention_is_finite_for_very_large_scores() -> None:
    """Compare with AVX-512 alone, which computes exp in another way."""
    q, k, v = (random(1, n, 2, 64, seed=n).bfloat16() for n in (20, 21, 22))
    q, k, v = q[:, :20].unsqueeze(3) * 1e6, k[:, :20].transpose(1, 2) * 1e6, v[:, :20].transpose(1, 2)
    with_amx = avx512.prompt_attention(q, k.contiguous(), v.contiguous())
    avx512.use_amx(False)
    assert with_amx.isfinite().all()
    assert (with_amx - avx512.prompt_attention(q, k.contiguous(), v.contiguous())).abs().max() < 0.03
