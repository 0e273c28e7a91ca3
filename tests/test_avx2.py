"""avx2.c gives the products of the numbers that are held, each row's alone; and a CPU without bfloat16 multiplies by it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama import Llama, avx2, kernels, native, widened
from llama.quantize import quantize, to_nibbles

from .support import plain_logits, write_shards

compiled = pytest.mark.skipif(avx2.LIBRARY is None, reason="avx2.c is not compiled, or this CPU has no AVX2")
STEP = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # half of what is rounded last


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def weight(kind: str, out: int, width: int, dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """What is multiplied by, and what it stands for."""
    made = random(out, width).mul_(0.1).to(dtype)
    if kind == "16 bits":
        return (made,), made.double()
    held = quantize(made, kind)
    groups = held.q.unflatten(1, (held.scale.shape[1], -1)).double() * held.scale.double().unsqueeze(2)
    if held.zero is None:
        return (held.q, held.scale), groups.flatten(1)
    pairs = torch.stack((held.scale, held.zero), -1).contiguous()
    return (to_nibbles(held.q + 8), pairs), (groups + held.zero.double().unsqueeze(2)).flatten(1)


PRODUCTS = [
    ("16 bits", 64, 64), ("16 bits", 37, 1088), ("int8", 64, 32), ("int8", 100, 2752), ("int4", 64, 1024), ("int4", 37, 1088),
]  # fmt: skip


@compiled
@pytest.mark.parametrize(
    ("kind", "out", "width", "dtype"),
    [(*product, dtype) for product in PRODUCTS for dtype in STEP if dtype != torch.float32 or product[0] == "int8"],
)
def test_products(kind: str, out: int, width: int, dtype: torch.dtype) -> None:
    given, exact = weight(kind, out, width, dtype)
    least = 3e-4 if kind == "int4" else 1e-6  # rows of 15 bits, with one number that is large; and sums
    for scale in (3, 0.05):
        x = random(avx2.MOST, width).mul_(scale).to(dtype)
        x[:, width // 3] *= 20
        assert avx2.takes(x, given[0])
        y, want = avx2.multiply(x, *given), x.double() @ exact.T
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), want, atol=least * want.abs().max().item(), rtol=STEP[dtype] * 1.01)
        for n in (1, 2, 3, 4, 5, 7):  # a row is the same whatever stands beside it
            assert torch.equal(avx2.multiply(x[-n:], *given), y[-n:])


@compiled
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["16 bits", "int8", "int4"])
def test_what_is_no_number_stays_in_its_row(kind: str, dtype: torch.dtype) -> None:
    given, _ = weight(kind, 37, 1088, dtype)
    x = random(6, 1088, dtype=dtype)
    x[1, 7], x[2, 9] = float("nan"), float("inf")
    y = avx2.multiply(x, *given)
    assert y[1].isnan().all() and not y[2].isfinite().any()
    assert torch.equal(y[[0, 3, 4, 5]], avx2.multiply(x[[0, 3, 4, 5]], *given))
    assert not avx2.multiply(torch.zeros_like(x), *given).any()


@compiled
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # of PyTorch, in forward mode
def test_what_it_does_not_take() -> None:
    x, w = random(3, 64, dtype=torch.bfloat16), random(8, 64, dtype=torch.bfloat16)
    assert avx2.takes(x, w) and avx2.takes(x.float(), w.to(torch.int8)) and avx2.takes(x, torch.zeros(8, 32).byte())
    wrong = [
        (x.float(), w.float()), (x.float(), w), (x.float(), torch.zeros(8, 32).byte()), (x.half(), w), (x[:, :32], w[:, :32]),
        (x[:, :63].contiguous(), w),
        (x, w[:, :32]), (x, random(64, 8, dtype=torch.bfloat16).t()), (x[0], w), (x[:0], w), (x.double(), w.to(torch.int8)),
        (random(avx2.MOST + 1, 64, dtype=torch.bfloat16), w), (x, w.clone().requires_grad_()), (x.to("meta"), w),
    ]  # fmt: skip
    wrong += [(x[:, :32].repeat(1, 3), torch.zeros(8, 48).byte())]  # no whole groups
    assert not any(avx2.takes(*each) for each in wrong)
    with torch.autograd.forward_ad.dual_level():
        assert not avx2.takes(torch.autograd.forward_ad.make_dual(x, x), w)


@compiled
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_four_bits_row_by_row(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows and many, alike; what PyTorch's blocks serve better, or alone, is not held so."""
    monkeypatch.setattr(native, "COMPILED", None)
    held = quantize(random(200, 1088, dtype=dtype), "int4")
    kernel = kernels.pack(held)
    assert isinstance(kernel, kernels.Int4Rows)
    x = random(avx2.MOST + 6, 1088, dtype=dtype)
    many = kernel(x)
    peak = many.float().abs().max().item()
    assert torch.equal(many, torch.cat([kernel(x[:6]), kernel(x[6:])]))
    torch.testing.assert_close(many, x @ kernel.dense().T, atol=0.02 * peak, rtol=0)
    torch.testing.assert_close(torch.func.vmap(kernel)(x.unsqueeze(1)).squeeze(1), many, atol=0.05 * peak, rtol=0)
    with pytest.raises(RuntimeError):
        kernel(x[:1, :1024])
    for other in (quantize(random(200, 192, dtype=dtype), "int4"), quantize(random(64, 1088), "int4")):
        assert isinstance(kernels.pack(other), kernels.Int4)


@compiled
@pytest.mark.parametrize("quantized", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_where_the_cpu_has_nothing_of_16_bits(
    tmp_path: Path, small: SimpleNamespace, dtype: torch.dtype, quantized: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of one row and several; log probabilities are those of a full forward in float32."""
    monkeypatch.setattr(widened, "WIDENED", frozenset({torch.float16, torch.bfloat16}))
    monkeypatch.setattr(widened, "SMALLEST", 0)
    monkeypatch.setattr(native, "COMPILED", None)
    monkeypatch.setattr(kernels, "exact_in_8_bits", lambda: False)
    seen, multiply = set(), avx2.multiply
    monkeypatch.setattr(avx2, "multiply", lambda x, w, *s: (seen.add((len(x), w.dtype)), multiply(x, w, *s))[1])
    weights = {name: w.to(dtype) for name, w in small.weights.items()}
    folder = write_shards(tmp_path, small.params, weights)
    llama = Llama.build(folder, small.tokenizer_path, 64, 12, device="cpu", quantize=quantized)
    model = llama.model
    exact = {name: w.float() for name, w in model.state_dict().items()}
    prompts = [[1, *range(5 * i + 5, 5 * i + 15)] for i in range(12)]
    for rows in (prompts, prompts[:1]):
        answers, values = llama.generate(rows, 5, temperature=0, logprobs=True)
        for prompt, answer, given in zip(rows, answers, values or [], strict=True):
            after = plain_logits(small.params, exact, prompt + answer)[len(prompt) - 1 : -1].log_softmax(1)
            chosen = after.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(torch.tensor(given), chosen, atol=25 * STEP[dtype], rtol=0)
            assert (after.amax(1) - chosen).max() < 50 * STEP[dtype]
    kind = torch.int8 if quantized else dtype
    assert {(12, kind), (1, kind)} <= seen
