"""native.c gives what PyTorch gives: to the last bit, but for attention, which sums in an order of its own. test_blocks.py has
the products."""

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from llama import ModelArgs, Transformer, tuning
from llama.backends import cpu
from llama.backends.cpu import CpuBackend, FusedDecodeStep
from llama.engine.forward import EngineForward, EngineNorm
from llama.engine.kv_cache import KVCache, RaggedBatch
from llama.kernels import avx2, avx512, c_extension, pack, packing
from llama.kernels.attention import attention_reference
from llama.kernels.blocked_linear import BlockedLinear
from llama.model import RMSNorm
from llama.quantization.quantize import quantize

from .support import ROOT, packed_model

compiled = pytest.mark.skipif(avx512.extension() is None, reason="native.c is not compiled, or this CPU is no such CPU")
MANY = 18  # rows of a step: several tiles, of which the last is not full
ARGS = ModelArgs(
    dim=128, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=96, multiple_of=64, max_seq_len=80, max_batch_size=MANY
)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def rows(n: int, width: int, scale: float = 1) -> torch.Tensor:
    return random(n, width).mul_(scale).bfloat16()


def in_blocks(weight: torch.Tensor) -> BlockedLinear:
    kernel = packing.pack_weight(weight)
    assert isinstance(kernel, BlockedLinear)
    return kernel


@pytest.fixture(autouse=True)
def however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)


def product(kernel: BlockedLinear, x: torch.Tensor, y: torch.Tensor, **fields: object) -> torch.Tensor:
    """With more around it, as a step has it."""
    avx512.call("multiply", ctypes.byref(kernel.args(n=len(x), x=x, y=y, **fields)))
    return y


@compiled
def test_the_gate_of_every_number() -> None:
    """All that bfloat16 has but denormals, which such instructions take for 0, through silu."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = numbers.where(numbers.isfinite() & (numbers.abs() > 1e-37), 0)
    weight = torch.zeros(2 << 16, 64, dtype=torch.bfloat16)
    weight[: 1 << 16, 0], weight[1 << 16 :, 0] = numbers, 1
    kernel = in_blocks(weight)
    x = torch.eye(1, 64, dtype=torch.bfloat16)
    y, wanted = product(kernel, x, rows(1, 1 << 16), gated=1, out=1 << 16), F.silu(numbers)
    normal = wanted.abs() > 1e-37
    assert torch.equal(y[0][normal], wanted[normal]) and not y[0][~normal].abs().max() > 1e-37
    up = rows(1, 1 << 16)
    y, wanted = avx512.swiglu(torch.cat((numbers.unsqueeze(0), up), 1)), F.silu(numbers) * up
    normal = wanted.abs() > 1e-37
    assert torch.equal(y[normal], wanted[normal]) and not y[~normal].abs().max() > 1e-37


@compiled
@pytest.mark.parametrize("width", [96, 2048, 5120])
def test_norms_and_residuals(width: int) -> None:
    kernel = in_blocks(rows(100, width))
    norm, normed = rows(1, width), rows(40, width)
    for scale in (1e-30, 1e-3, 1, 1e18, 1e22):  # squares of nothing, and beyond float32
        x = rows(40, width, scale)
        for part in (x[:16], x[:1]):
            wanted = avx512.rms_norm(part, norm[0], 1e-5)
            y = product(kernel, part, rows(len(part), 100), norm=norm, eps=1e-5, normed=normed)
            assert torch.equal(normed[: len(part)], wanted) and torch.equal(y, kernel(wanted))
        plain = RMSNorm(width, 1e-5).bfloat16()
        plain.weight.copy_(norm[0])
        if 1e-10 < scale < 1e10:  # beyond, PyTorch's sums overflow or vanish otherwise
            assert (avx512.rms_norm(x, norm[0], 1e-5) != plain(x)).float().mean() < 1e-3
    h = rows(5, 100)
    wanted = h + kernel(x[:5])
    assert torch.equal(product(kernel, x[:5], h, residual=h), wanted)


@compiled
@pytest.mark.parametrize(
    ("K", "G", "hd", "end"), [(2, 4, 64, 1), (2, 4, 64, 7), (1, 8, 128, 64), (3, 1, 32, 45), (2, 2, 96, 530)]
)
def test_attention(K: int, G: int, hd: int, end: int) -> None:
    """Of each row over its slots alone: the others, and what lies beyond, are no numbers."""
    cache = torch.full((2, 4, K, 600, hd), float("nan"), dtype=torch.bfloat16)
    cache[:, 1:3, :, :end] = random(2, 2, K, end, hd).bfloat16()
    k, v = cache[:, 1:3, :, :end]
    q = random(2, K, G, hd).mul_(5).bfloat16()
    assert avx512.supports_decode_attention(q, k, v)
    scores = ((q.float() @ k.float().transpose(2, 3)).bfloat16() / hd**0.5).float()  # rounded where the reference rounds them
    wanted = scores.softmax(-1).bfloat16().float() @ v.float()
    got = avx512.decode_attention(q, k, v)
    torch.testing.assert_close(got.float(), wanted, atol=2e-3, rtol=2**-7)
    assert torch.equal(avx512.decode_attention(q[1:], k[1:], v[1:]), got[1:])


def model(kind: str) -> Transformer:
    return packed_model(Transformer(ARGS).bfloat16(), None if kind == "bf16" else kind)


def forward_of(model: Transformer) -> EngineForward:
    return EngineForward(model, KVCache.adopt(model))


@compiled
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_a_step_is_the_engines_own(kind: str, threads: int) -> None:
    """Rows at positions of their own; hidden states, and keys and values, to the last bit."""
    made = forward_of(model(kind))
    data, before = made.cache.data, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            for n in (1, 3, MANY):
                assert cpu.why_unsupported(made) is None
                step = FusedDecodeStep(made, n)
                for start in (0, 1, 60):
                    data.copy_(random(*data.shape))
                    before_it, ids = data.clone(), torch.randint(0, 96, (n,), generator=torch.Generator().manual_seed(start))
                    batch = RaggedBatch.from_segments([(row, start + row % 3, 1) for row in range(n)])
                    got, kept = step(ids, batch).clone(), data.clone()
                    data.copy_(before_it)
                    assert torch.equal(made.hidden_states(ids, batch), got) and torch.equal(data, kept)
    finally:
        torch.set_num_threads(before)


@compiled
def test_a_step_holds_what_it_was_made_of() -> None:
    """Though the model gets other weights."""
    made, ids, batch = forward_of(model("bf16")), torch.tensor([5, 9]), RaggedBatch.from_segments([(0, 7, 1), (1, 7, 1)])
    with torch.inference_mode():
        step = FusedDecodeStep(made, 2)
        before = step(ids, batch).clone()
        for norm in (made.model.layers[0].attention_norm, made.model.layers[1].ffn_norm):
            norm.weight.data = torch.full((128,), float("nan"), dtype=torch.bfloat16)
        made.cache.data.zero_()
        assert torch.equal(step(ids, batch), before)


def set_weight(module: torch.nn.Module, weight: torch.Tensor) -> None:
    module.weight = torch.nn.Parameter(weight, requires_grad=False)


@compiled
@pytest.mark.parametrize(
    "change",
    [
        lambda made: made.layers[0].attention_norm.float(),
        lambda made: set_weight(made.layers[1].ffn_norm, rows(1, 256)[0, ::2]),
        lambda made: setattr(made.layers[1].feed_forward.w2.weight.shared.kernel, "extension", avx2.extension()),
        lambda made: set_weight(made.layers[1].feed_forward.w2, made.layers[1].feed_forward.w2.weight.clone()),
        lambda made: made.layers[1].feed_forward.w2.float(),
        lambda made: set_weight(made.layers[1].attention.wk, made.layers[1].attention.wk.weight.clone()),
    ],
)
def test_other_models_are_not_its_own(change: Callable[[Transformer], object]) -> None:
    """C would read and write beyond its rows."""
    made = model("int8")
    assert cpu.why_unsupported(forward_of(made)) is None
    change(made)
    assert cpu.why_unsupported(forward_of(made))


@compiled
@pytest.mark.parametrize(
    "shape", [(1, 5, 5, 2, 3, 64), (2, 64, 200, 2, 4, 64), (3, 17, 17, 4, 8, 128), (1, 130, 131, 1, 1, 64)]
)
def test_attention_of_a_prompt(shape: tuple[int, ...]) -> None:
    """As in float32; and each row as alone, wherever a prompt is cut, be keys and values new or in the cache."""
    B, S, L, K, G, hd = shape
    q, kv = random(B, S, K, G, hd).bfloat16(), random(B, L, 2, K, hd).bfloat16()
    k, v = kv.permute(2, 0, 3, 1, 4).unbind()
    assert avx512.supports_prompt_attention(q, k, v)
    y = avx512.prompt_attention(q, k, v)
    hidden = torch.full((S, L), float("-inf")).triu(L - S + 1)
    wanted = attention_reference(q.float(), k.float(), v.float(), hidden.expand(1, 1, S, L))
    torch.testing.assert_close(y.float(), wanted, atol=0.03, rtol=0.01)
    cached = [torch.cat((part, part.new_zeros(B, K, 9, hd)), 2)[:, :, :L] for part in (k, v)]
    assert torch.equal(avx512.prompt_attention(q, *cached), y)
    for n in {1, 3, S // 2 + 1}:
        assert torch.equal(avx512.prompt_attention(q[:, :n], k[:, :, : L - S + n], v[:, :, : L - S + n]), y[:, :n])
        assert torch.equal(avx512.prompt_attention(q[-1:, -n:], k[-1:], v[-1:]), y[-1:, -n:])
    k[0, 0, L - S + 2] = float("nan")  # which later rows see, and none before
    y = avx512.prompt_attention(q, k, v)[0, :, 0]
    assert y[:2].isfinite().all() and y[2:].isnan().all()


@compiled
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_the_gate_within_the_product_is_the_gate_after_it(kind: str) -> None:
    kernel = forward_of(model(kind)).layers[0].w13.kernel
    assert kernel is not None
    for n in (1, 5, 130):
        x = rows(n, 128)
        with torch.inference_mode():
            y = kernel.swiglu(x)
            assert y is not None and torch.equal(y, avx512.swiglu(kernel.forward(x)))


@compiled
def test_it_takes_only_what_lies_as_it_reads() -> None:
    """Else PyTorch's errors and gradients are lost, or what is traced is empty."""
    x, norm = rows(2, 64), EngineNorm(RMSNorm(64).bfloat16())
    with torch.no_grad():
        wanted = norm.forward(x)
        assert torch.equal(make_fx(lambda x: norm.forward(x))(x)(x), wanted)
        for wrong in (RMSNorm(32), RMSNorm(64).to("meta"), RMSNorm(128)):
            with pytest.raises(RuntimeError):
                EngineNorm(wrong.bfloat16()).forward(x)
    q, k = rows(2, 64).view(1, 2, 1, 64), rows(2, 64).view(1, 2, 1, 64)
    assert avx512.supports_decode_attention(q, k, k) and not avx512.supports_decode_attention(q, k.clone().requires_grad_(), k)
    assert not avx512.supports_decode_attention(q, k[:, :1], k[:, :1]) and not avx512.supports_decode_attention(
        q, k, k[..., :32]
    )


@compiled
def test_who_takes_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """native.c those of bfloat16 and float32; and what has another dtype, none."""
    made, seen = model("bf16"), []
    run: Callable[..., torch.Tensor] = FusedDecodeStep.__call__
    monkeypatch.setattr(FusedDecodeStep, "__call__", lambda self, ids, batch: (seen.append(len(ids)), run(self, ids, batch))[1])

    def step(n: int) -> None:
        ids = torch.zeros(n, dtype=torch.int64)
        CpuBackend().begin(forward_of(made), n)(ids, ids, [0] * n)

    with torch.inference_mode():
        step(2)
        step(MANY)
        assert seen == [2, MANY]
        made.float()
        step(2)
        assert seen == [2, MANY, 2]
        made.half()
        step(2)
        assert seen == [2, MANY, 2]


@pytest.mark.parametrize("content", [b"", b"no library"])
def test_without_it(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled, or something else: all goes the other way."""
    (tmp_path / "_any.so").write_bytes(content)
    spec = SimpleNamespace(origin=str(tmp_path / "_any.so")) if content else None
    monkeypatch.setattr(c_extension.importlib.util, "find_spec", lambda *args: spec)
    for module in (avx512, avx2, pack):
        status = module.status.__wrapped__()  # not the one that is cached
        assert status.extension is None and status.reason
        monkeypatch.setattr(module, "status", lambda status=status: status)
    for weight in (rows(100, 192), quantize(rows(100, 192), "int8"), quantize(rows(100, 192), "int4")):
        assert not isinstance(packing.pack_weight(weight), BlockedLinear)
    ids, made = torch.tensor([5, 9]), forward_of(model("int4"))
    with torch.inference_mode():
        assert cpu.why_unsupported(made)
        assert made.hidden_states(ids, RaggedBatch.from_segments([(0, 0, 1), (1, 0, 1)])).isfinite().all()


@pytest.mark.skipif(sys.platform != "linux", reason="it is compiled on Linux alone")
def test_it_installs_without_a_compiler(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    environment = {"CC": str(tmp_path / "none"), "PATH": "/nowhere"}
    assert subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False).returncode == 0
    assert not list(tmp_path.rglob("*.so"))
