"""The C kernels of BlockedLinear multiply as a PyTorch reference does, and models use them or fall back to PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from llama import tuning
from llama.kernels import avx2, avx512, half_precision, int4, int8, onednn, pack, packing
from llama.kernels.blocked_linear import ACTIVATION_GROUP, BlockedLinear, BlockedWeight
from llama.quantization.quantize import quantize
from llama.quantization.weight import group_size

from . import kernel_configs
from .kernel_configs import (
    EXTENSIONS,
    ROWS,
    SHAPES,
    KernelConfig,
    assert_product,
    every_config,
    packs,
    quantized_configs,
    random,
    round_to_8_bits,
)
from .support import no_extension, quantize_int8_per_row

threads = kernel_configs.threads  # a fixture


# --- multiplication ----------------------------------------------------------------------------------------------------------


@every_config
def test_kernels_multiply_rounded_activations_by_dequantized_weights(config: KernelConfig) -> None:
    for out, width in SHAPES:
        kernel, weight = config.pack(random(out, width))
        for n in ROWS:
            x = random(n, width, seed=1).to(config.dtype)
            y = kernel.decode(x)
            assert y.dtype == (torch.float32 if config.digits == 2 else config.dtype)
            assert_product(y, config.round_activations(x), weight)


@quantized_configs
def test_very_small_and_very_large_activations_are_multiplied_precisely(config: KernelConfig) -> None:
    kernel, weight = config.pack(random(100, 192))
    for scale in (1e-3, 1e3) if config.dtype == torch.float16 else (1e-20, 1e-3, 1e3, 1e20):
        x = (random(5, 192, seed=1) * scale).to(config.dtype)
        assert_product(kernel(x), config.round_activations(x), weight, atol=1e-7 * scale)


@every_config
def test_a_row_is_bitwise_the_same_alone_and_in_any_batch(config: KernelConfig, threads: int) -> None:
    kernel, _ = config.pack(random(200, 320))
    x = random(135, 320, seed=1).to(config.dtype)
    for multiply in (kernel.decode, kernel.prefill):
        together = multiply(x)
        for n in (1, 2, 3, 4, 5, 6, 7, 9, 17, 64):
            assert torch.equal(torch.cat([multiply(rows) for rows in x.split(n)]), together), n
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
        assert torch.equal(multiply(x[order]), together[order])


@every_config
def test_nan_and_infinity_in_a_row_do_not_affect_other_rows(config: KernelConfig) -> None:
    kernel, _ = config.pack(random(100, 192))
    x = random(7, 192, seed=1).to(config.dtype)
    clean = kernel(x)
    x[1, 7], x[3, 9], x[4, 191] = float("nan"), float("inf"), float("-inf")
    y = kernel(x)
    assert y[1].isnan().all() and not y[[1, 3, 4]].isfinite().any()
    assert torch.equal(y[[0, 2, 5, 6]], clean[[0, 2, 5, 6]])
    assert not kernel(torch.zeros_like(x)).any()


@pytest.mark.parametrize("extension_name", EXTENSIONS)
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_outputs_too_large_for_float16_are_infinite(extension_name: str, format: str) -> None:
    kernel, _ = KernelConfig(extension_name, format, torch.float16, 1).pack(torch.ones(64, 64))
    assert kernel(torch.full((1, 64), 4096.0).half()).eq(float("inf")).all()  # 64 * 4096 = 262144 exceeds the float16 maximum
    assert kernel(torch.full((1, 64), 512.0).half()).sub(32768).abs().max() < 64


@pytest.mark.parametrize("extension_name", EXTENSIONS)
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_two_8_bit_integers_per_activation_are_fifty_times_as_precise_as_one(extension_name: str, format: str) -> None:
    """Compare one and two 8-bit integers per activation with unrounded activations. Kernels that compute logits use two."""
    x = random(5, 2048, seed=1).bfloat16()
    errors = []
    for digits in (1, 2):
        kernel, weight = KernelConfig(extension_name, format, torch.bfloat16, digits).pack(random(100, 2048))
        exact = x.double() @ weight.T
        errors.append((kernel(x).double() - exact).norm() / exact.norm())
    assert errors[1] < 1e-4 and errors[1] < errors[0] / 50


# --- slices of a weight, as ranks store them ----------------------------------------------------------------------------


@every_config
@pytest.mark.parametrize(
    ("width", "first", "last"), [(176, 44, 88), (176, 88, 176), (2304, 576, 1152), (192, 7, 12), (40, 21, 40)]
)
def test_a_slice_of_the_inputs_has_the_values_of_the_whole_weight_even_within_a_group(
    config: KernelConfig, width: int, first: int, last: int
) -> None:
    """Slice a blocked weight, slice a quantized weight, and pack a slice of an unpacked weight: all give the same values.

    A slice that starts within a group is padded with zeros at its start, so that its groups match those of the whole weight.
    """
    rows = random(70, width).to(config.dtype)
    whole, weight = config.pack(rows)
    parts = [whole.blocks.slice_inputs(first, last)]
    if config.format != "bfloat16":
        assert parts[0].padding_before == first % group_size(width, config.format)
        parts.append(BlockedWeight.from_quantized(quantize(rows, config.format).slice_inputs(first, last)))
        packed = packing.pack_rows(config.format, [rows], config.dtype, width, first, last)
        assert isinstance(packed, BlockedLinear)
        parts.append(packed.blocks)
    x = random(5, last - first, seed=1).to(config.dtype)
    padded = F.pad(x, (first, width - last))  # sets all inputs outside of the slice to 0
    for part in parts:
        assert part.in_features == last - first
        assert torch.equal(part.dequantize(torch.float64), weight[:, first:last])
        assert_product(config.kernel(part)(x), config.round_activations(padded), weight)


@packs
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_the_outputs_of_all_input_slices_add_up_to_the_output_of_the_whole_weight(format: str) -> None:
    rows, x = random(70, 176), random(5, 176, seed=1)
    whole = packing.pack_rows(format, [rows], torch.float32, 176, 0, 176)
    parts = [packing.pack_rows(format, [rows], torch.float32, 176, first, first + 44) for first in range(0, 176, 44)]
    assert whole and all(parts)
    assert torch.equal(torch.cat([part.dequantize() for part in parts if part], 1), whole.dequantize())
    total = sum(part(inputs) for part, inputs in zip(parts, x.split(44, 1), strict=True) if part)
    assert (total - whole(x)).norm() < 0.01 * whole(x).norm()


@packs
@pytest.mark.parametrize("format", ["bfloat16", "int8", "int4"])
def test_a_slice_of_the_outputs_shares_memory_and_gives_bitwise_the_same_outputs(format: str) -> None:
    """The method `rows` slices the outputs. It returns None if the slice does not start at the first output of a block."""
    if format == "bfloat16" and avx512.extension() is None:
        pytest.skip("the AVX-512 extension is not compiled here")
    whole = BlockedLinear(BlockedWeight.from_rows(format, [random(200, 192).bfloat16()], ACTIVATION_GROUP), torch.bfloat16)
    x = random(5, 192, seed=1).bfloat16()
    for first, last in ((0, 64), (64, 200), (128, 150)):
        part = whole.rows(first, last)
        assert part is not None and torch.equal(part(x), whole(x)[:, first:last])
        assert torch.equal(part.dequantize(), whole.dequantize()[first:last])
        assert part.blocks.weight.untyped_storage().data_ptr() == whole.blocks.weight.untyped_storage().data_ptr()
    assert whole.rows(32, 64) is None


# --- use in models, and fallbacks to PyTorch -------------------------------------------------------------------------------


@packs
@pytest.mark.parametrize("format", [None, "int8", "int4"])
def test_without_extensions_the_outputs_are_nearly_the_same(format: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without extensions PyTorch computes the products, and activations are not rounded to 8 bits."""
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)
    rows, x = random(200, 192).bfloat16(), random(9, 192, seed=1).bfloat16()
    weight = quantize(rows, format) if format else rows
    compiled = packing.pack_weight(weight)
    for module, name in ((avx512, "status"), (avx2, "status"), (pack, "status")):
        monkeypatch.setattr(module, name, no_extension)
    fallback = packing.pack_weight(weight)
    assert isinstance(
        fallback, {"int8": int8.Int8DequantLinear, "int4": int4.Int4CpuLinear}.get(format or "", onednn.OneDnnLinear | None)
    )
    assert packing.pack_rows(format, [rows], rows.dtype, 192, 0, 192) is None
    want = rows.float() if fallback is None else fallback.dequantize().float()
    if format and compiled:
        assert torch.equal(compiled.dequantize().float(), want)
    y = half_precision.linear(x, rows) if fallback is None else fallback(x)
    for output in (y, compiled(x) if compiled else y):
        assert (output.float() - x.float() @ want.T).norm() < 0.01 * (x.float() @ want.T).norm()


@pytest.mark.parametrize("format", ["bfloat16", "int8", "int4"])
def test_traced_mapped_and_differentiated_inputs_go_through_pytorch(format: str) -> None:
    """The C code supports none of these, so PyTorch computes. Inputs of a wrong width raise PyTorch's own error."""
    extension_name = "AVX-512" if format == "bfloat16" or avx512.extension() else "AVX2"
    kernel, weight = KernelConfig(extension_name, format, torch.bfloat16, 1).pack(random(64, 64))
    x = random(3, 64, seed=1).bfloat16()
    want = x.double() @ weight.T

    def near(y: torch.Tensor) -> bool:
        return bool((y.double() - want).norm() < 0.02 * want.norm())

    assert near(torch.vmap(kernel)(x.unsqueeze(1)).squeeze(1))
    torch._dynamo.reset()
    assert near(torch.compile(kernel, fullgraph=True, backend="eager")(x))
    (gradient,) = torch.autograd.grad(kernel(x.requires_grad_()).float().sum(), x)
    torch.testing.assert_close(gradient.double(), weight.sum(0).expand(3, -1), atol=0.2, rtol=0.02)
    assert kernel(x[:0].detach()).shape == (0, 64) and kernel(x.detach().view(1, 3, 64)).shape == (1, 3, 64)
    for wrong in (x[:, :63], x.repeat(1, 2)):
        with pytest.raises(RuntimeError):
            kernel(wrong.detach())


FORMS = {
    "int8 in blocks": lambda weight: BlockedLinear(BlockedWeight.from_quantized(quantize(weight, "int8")), weight.dtype),
    "int4 in blocks": lambda weight: BlockedLinear(BlockedWeight.from_quantized(quantize(weight, "int4")), weight.dtype),
    "int8 on a GPU": lambda weight: int8.Int8CudaLinear(quantize_int8_per_row(weight, weight.dtype)),
}


@packs
@pytest.mark.parametrize("form", FORMS)
def test_a_large_activation_does_not_erase_small_ones(form: str) -> None:
    """In real models a few activations are a hundred times as large as the others.

    If a whole row shared one scale, 8 bits would leave only a few different values for the small activations.
    """
    weight, x = random(256, 4096), random(4, 4096, seed=1)
    x[:, 1234] = 100 * x.std()
    kernel = FORMS[form](weight)
    small = x.clone()
    small[:, 1234] = 0
    dequantized = kernel.dequantize().double()

    def relative_error(y: torch.Tensor) -> float:
        return float((y.double() - x.double() @ dequantized.T).norm() / (small.double() @ dequantized.T).norm())

    assert relative_error(kernel(x)) < 0.03
    assert relative_error(round_to_8_bits(x, group=4096) @ dequantized.T) > 0.15  # one scale for the whole row is less precise


@packs
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_narrow_rows_keep_16_bits_of_activations_and_wide_rows_8_bits(format: str) -> None:
    """Rounding activations to 8 bits costs small models the most quality, so kernels for narrow rows keep 16 bits."""
    errors = {}
    for width in (576, 2304):
        weight, x = random(64, width), random(4, width, seed=1)
        x[:, ::ACTIVATION_GROUP] *= 100
        kernel = packing.pack_rows(format, [weight], torch.float32, width, 0, width)
        assert isinstance(kernel, BlockedLinear)
        want = x.double() @ kernel.blocks.to_quantized(torch.float64).dequantize().T
        errors[width] = ((kernel(x) - want).norm() / want.norm()).item()
    assert errors[576] < 1e-4 < 1e-3 < errors[2304]
