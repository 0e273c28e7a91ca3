"""avx2.c multiplies a few rows by a row-major weight, each row independently. It is for CPUs without 16-bit instructions."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import Llama, tuning
from llama.kernels import avx2, avx512, c_extension, half_precision

from .support import no_extension, write_shards
from .test_kernels import float32_model

compiled = pytest.mark.skipif(avx2.extension() is None, reason="avx2.c is not compiled, or this CPU has no AVX2")
# The largest relative rounding error of an output.
ROUNDING_ERROR = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.fixture(autouse=True)
def any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply float32 weights of all widths."""
    monkeypatch.setattr(tuning, "AVX2_MIN_WIDTH_FP32", 0)


@compiled
def test_narrow_float32_weights_are_multiplied_as_in_metas_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x, weight = random(3, 96), random(300, 96)
    assert not avx2.supports(x, weight) and avx2.supports(x.bfloat16(), weight.bfloat16())
    assert torch.equal(half_precision.linear(x, weight), torch.nn.functional.linear(x, weight))


@compiled
@pytest.mark.parametrize("dtype", ROUNDING_ERROR, ids=str)
@pytest.mark.parametrize(("out", "width"), [(64, 64), (37, 1088), (100, 32), (16, 2752)])
def test_results_match_float64_and_do_not_depend_on_the_other_rows(out: int, width: int, dtype: torch.dtype) -> None:
    weight = random(out, width).mul_(0.1).to(dtype)
    for scale in (3, 0.05):
        x = (
            random(tuning.AVX2_MAX_ROWS_FP32 if dtype == torch.float32 else tuning.AVX2_MAX_ROWS_16BIT, width)
            .mul_(scale)
            .to(dtype)
        )
        x[:, width // 3] *= 20
        assert avx2.supports(x, weight)
        y, want = avx2.linear(x, weight), x.double() @ weight.double().T
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), want, atol=1e-6 * want.abs().max().item(), rtol=ROUNDING_ERROR[dtype] * 1.01)
        for n in (1, 2, 3, 4, 5, 7):
            assert torch.equal(avx2.linear(x[-n:], weight), y[-n:])


@compiled
@pytest.mark.parametrize("dtype", ROUNDING_ERROR, ids=str)
def test_nan_and_infinity_in_a_row_do_not_affect_other_rows(dtype: torch.dtype) -> None:
    weight, x = random(37, 1088, dtype=dtype), random(6, 1088, dtype=dtype)
    x[1, 7], x[2, 9] = float("nan"), float("inf")
    y = avx2.linear(x, weight)
    assert y[1].isnan().all() and not y[2].isfinite().any()
    assert torch.equal(y[[0, 3, 4, 5]], avx2.linear(x[[0, 3, 4, 5]], weight))
    assert not avx2.linear(torch.zeros_like(x), weight).any()


@compiled
@pytest.mark.parametrize("n", [1, 3, tuning.AVX2_MAX_ROWS_FP32, tuning.AVX2_MAX_ROWS_FP32 + 1])
def test_float32_rows_up_to_the_limit_are_multiplied_by_avx2(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)
    row_counts, multiply = [], avx2.linear
    monkeypatch.setattr(avx2, "linear", lambda x, w: (row_counts.append(len(x)), multiply(x, w))[1])
    x, weight = random(n, 2, 64), random(100, 64)
    y = half_precision.linear(x[:, 0], weight)
    assert row_counts == ([n] if n <= tuning.AVX2_MAX_ROWS_FP32 else [])
    torch.testing.assert_close(y, x[:, 0] @ weight.T, atol=1e-5, rtol=0)
    (gradient,) = torch.autograd.grad(half_precision.linear(x.requires_grad_(), weight).sum(), x)
    torch.testing.assert_close(gradient, weight.sum(0).expand(n, 2, -1), atol=1e-5, rtol=1e-5)


@compiled
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # a warning of PyTorch's forward-mode differentiation
def test_avx2_refuses_unsupported_shapes_dtypes_layouts_and_gradients() -> None:
    x, w = random(3, 64, dtype=torch.bfloat16), random(8, 64, dtype=torch.bfloat16)
    assert avx2.supports(x, w) and avx2.supports(x.float(), w.float())
    unsupported = [
        (x.float(), w), (x.double(), w.double()), (x.half(), w), (x[:, :32], w[:, :32]), (x[:, :63].contiguous(), w),
        (x, w[:, :32]), (x, random(64, 8, dtype=torch.bfloat16).t()), (x[0], w), (x[:0], w), (x, w.to(torch.int8)),
        (random(tuning.AVX2_MAX_ROWS_16BIT + 1, 64, dtype=torch.bfloat16), w),
        (random(tuning.AVX2_MAX_ROWS_FP32 + 1, 64), w.float()),
        (x, w.clone().requires_grad_()), (x.to("meta"), w),
    ]  # fmt: skip
    assert not any(avx2.supports(x, w) for x, w in unsupported)
    with torch.autograd.forward_ad.dual_level():
        assert not avx2.supports(torch.autograd.forward_ad.make_dual(x, x), w)


@compiled
@pytest.mark.parametrize("quantized", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_16_bit_model_on_a_cpu_without_16_bit_instructions_matches_float32(
    tmp_path: Path, small: SimpleNamespace, dtype: torch.dtype, quantized: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare log probabilities, for one row and for 12 rows, with those of a float32 model that has the same weights."""
    monkeypatch.setattr(half_precision, "slow_dtypes", lambda: frozenset({torch.float16, torch.bfloat16}))
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)
    monkeypatch.setattr(avx512, "status", no_extension)
    multiplied: set[tuple[int, int]] = set()  # pairs (number of rows, format of the weight)
    call = avx2.extension().call  # type: ignore[union-attr]

    def record(name: str, args: Any) -> None:
        linear_args = args._obj  # the struct that was passed with ctypes.byref
        multiplied.add((linear_args.n // linear_args.int8_per_activation, linear_args.format))
        call(name, args)

    monkeypatch.setattr(avx2.extension(), "call", record)
    weights = {name: w.to(dtype) for name, w in small.weights.items()}
    folder = write_shards(tmp_path, small.params, weights)
    llama = Llama.build(folder, small.tokenizer_path, 64, 12, device="cpu", quantize=quantized)
    twin = float32_model(small.params, llama.model.state_dict())
    prompts = [[1, *range(5 * i + 5, 5 * i + 15)] for i in range(12)]
    atol = {None: 25 * ROUNDING_ERROR[dtype], "int8": 0.12, "int4": 0.12}[quantized]
    for rows in (prompts, prompts[:1]):
        answers, values = llama.generate(rows, 5, temperature=0, logprobs=True)
        for prompt, answer, logprobs in zip(rows, answers, values or [], strict=True):
            after = twin.forward(torch.tensor([prompt + answer]), 0)[0, len(prompt) - 1 : -1].log_softmax(1)
            chosen = after.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(torch.tensor(logprobs), chosen, atol=atol, rtol=0)
            assert (after.amax(1) - chosen).max() < 2 * atol
    format = {None: c_extension.DTYPE_CODES[dtype], "int8": c_extension.INT8, "int4": c_extension.INT4}[quantized]
    assert {(12, format), (1, format)} <= multiplied
