"""The AVX-512 extension computes SwiGLU, norms, attention and fused decode steps as PyTorch does, up to rounding.

test_blocked_linear.py tests the extension's matrix products.
"""

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

compiled = pytest.mark.skipif(avx512.extension() is None, reason="not compiled, or this CPU has no AVX-512 for bfloat16")
MAX_ROWS = 18  # the kernels compute rows in tiles: 18 rows fill several tiles and a part of the last
ARGS = ModelArgs(
    dim=128, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=96, multiple_of=64, max_seq_len=80, max_batch_size=MAX_ROWS
)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def rows(n: int, width: int, scale: float = 1) -> torch.Tensor:
    return random(n, width).mul_(scale).bfloat16()


def blocked(weight: torch.Tensor) -> BlockedLinear:
    kernel = packing.pack_weight(weight)
    assert isinstance(kernel, BlockedLinear)
    return kernel


@pytest.fixture(autouse=True)
def pack_small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)


def multiply(kernel: BlockedLinear, x: torch.Tensor, y: torch.Tensor, **fields: object) -> torch.Tensor:
    """Write the product of x and the kernel's weight to y; return y. `fields` can add a norm or residual to the same C call."""
    avx512.call("linear", ctypes.byref(kernel.args(n=len(x), x=x, y=y, **fields)))
    return y


@compiled
def test_swiglu_of_every_bfloat16_value_equals_pytorchs() -> None:
    """Test all bfloat16 values but denormal ones, which the bfloat16 instructions treat as 0."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = values.where(values.isfinite() & (values.abs() > 1e-37), 0)
    weight = torch.zeros(2 << 16, 64, dtype=torch.bfloat16)
    weight[: 1 << 16, 0], weight[1 << 16 :, 0] = values, 1
    kernel = blocked(weight)
    x = torch.eye(1, 64, dtype=torch.bfloat16)
    y, want = multiply(kernel, x, rows(1, 1 << 16), gated=1, out=1 << 16), F.silu(values)
    normal = want.abs() > 1e-37
    assert torch.equal(y[0][normal], want[normal]) and not y[0][~normal].abs().max() > 1e-37
    up = rows(1, 1 << 16)
    y, want = avx512.swiglu(torch.cat((values.unsqueeze(0), up), 1)), F.silu(values) * up
    normal = want.abs() > 1e-37
    assert torch.equal(y[normal], want[normal]) and not y[~normal].abs().max() > 1e-37


@compiled
@pytest.mark.parametrize("width", [96, 2048, 5120])
def test_a_norm_or_residual_within_a_product_equals_the_separate_operations(width: int) -> None:
    kernel = blocked(rows(100, width))
    norm, normed = rows(1, width), rows(40, width)
    for scale in (1e-30, 1e-3, 1, 1e18, 1e22):  # squares underflow to 0 at the smallest scale and overflow at the largest
        x = rows(40, width, scale)
        for part in (x[:16], x[:1]):
            want = avx512.rms_norm(part, norm[0], 1e-5)
            y = multiply(kernel, part, rows(len(part), 100), norm=norm, eps=1e-5, normed=normed)
            assert torch.equal(normed[: len(part)], want) and torch.equal(y, kernel(want))
        reference_norm = RMSNorm(width, 1e-5).bfloat16()
        reference_norm.weight.copy_(norm[0])
        if 1e-10 < scale < 1e10:  # at other scales, PyTorch's sums overflow or underflow at other values than the kernel's
            assert (avx512.rms_norm(x, norm[0], 1e-5) != reference_norm(x)).float().mean() < 1e-3
    h = rows(5, 100)
    want = h + kernel(x[:5])
    assert torch.equal(multiply(kernel, x[:5], h, residual=h), want)


@compiled
@pytest.mark.parametrize(
    ("K", "G", "hd", "end"), [(2, 4, 64, 1), (2, 4, 64, 7), (1, 8, 128, 64), (3, 1, 32, 45), (2, 2, 96, 530)]
)
def test_decode_attention_reads_only_the_positions_of_each_row(K: int, G: int, hd: int, end: int) -> None:
    """Fill all other rows and positions of the KV cache with NaN. The expected scores are rounded to bfloat16."""
    cache = torch.full((2, 4, K, 600, hd), float("nan"), dtype=torch.bfloat16)
    cache[:, 1:3, :, :end] = random(2, 2, K, end, hd).bfloat16()
    k, v = cache[:, 1:3, :, :end]
    q = random(2, K, G, hd).mul_(5).bfloat16()
    assert avx512.supports_decode_attention(q, k, v)
    scores = ((q.float() @ k.float().transpose(2, 3)).bfloat16() / hd**0.5).float()
    want = scores.softmax(-1).bfloat16().float() @ v.float()
    got = avx512.decode_attention(q, k, v)
    torch.testing.assert_close(got.float(), want, atol=2e-3, rtol=2**-7)
    assert torch.equal(avx512.decode_attention(q[1:], k[1:], v[1:]), got[1:])


def model(format: str) -> Transformer:
    return packed_model(Transformer(ARGS).bfloat16(), None if format == "bf16" else format)


def forward_of(model: Transformer) -> EngineForward:
    return EngineForward(model, KVCache.adopt(model))


@compiled
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_a_fused_decode_step_equals_the_layer_by_layer_step_to_the_last_bit(format: str, threads: int) -> None:
    """Compare the hidden states and the KV cache, with rows at different positions."""
    forward = forward_of(model(format))
    data, n_threads = forward.cache.data, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            for n in (1, 3, MAX_ROWS):
                assert cpu.why_unsupported(forward) is None
                step = FusedDecodeStep(forward, n)
                for start in (0, 1, 60):
                    data.copy_(random(*data.shape))
                    cache_before = data.clone()
                    tokens = torch.randint(0, 96, (n,), generator=torch.Generator().manual_seed(start))
                    batch = RaggedBatch.from_segments([(row, start + row % 3, 1) for row in range(n)])
                    got, cache_after = step(tokens, batch).clone(), data.clone()
                    data.copy_(cache_before)
                    assert torch.equal(forward.hidden_states(tokens, batch), got) and torch.equal(data, cache_after)
    finally:
        torch.set_num_threads(n_threads)


@compiled
def test_a_fused_decode_step_keeps_its_weights_alive() -> None:
    """Replace the model's weights: the step must still give the old result, because its C code reads the old addresses."""
    forward, tokens = forward_of(model("bf16")), torch.tensor([5, 9])
    batch = RaggedBatch.from_segments([(0, 7, 1), (1, 7, 1)])
    with torch.inference_mode():
        step = FusedDecodeStep(forward, 2)
        before = step(tokens, batch).clone()
        for norm in (forward.model.layers[0].attention_norm, forward.model.layers[1].ffn_norm):
            norm.weight.data = torch.full((128,), float("nan"), dtype=torch.bfloat16)
        forward.cache.data.zero_()
        assert torch.equal(step(tokens, batch), before)


def set_weight(module: torch.nn.Module, weight: torch.Tensor) -> None:
    module.weight = torch.nn.Parameter(weight, requires_grad=False)


@compiled
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.layers[0].attention_norm.float(),
        lambda m: set_weight(m.layers[1].ffn_norm, rows(1, 256)[0, ::2]),
        lambda m: setattr(m.layers[1].feed_forward.w2.weight.shared.kernel, "extension", avx2.extension()),
        lambda m: set_weight(m.layers[1].feed_forward.w2, m.layers[1].feed_forward.w2.weight.clone()),
        lambda m: m.layers[1].feed_forward.w2.float(),
        lambda m: set_weight(m.layers[1].attention.wk, m.layers[1].attention.wk.weight.clone()),
    ],
)
def test_the_fused_step_refuses_models_with_weights_that_it_cannot_read(change: Callable[[Transformer], object]) -> None:
    """If the step accepted weights of another dtype or layout, its C code would access memory outside of them."""
    changed = model("int8")
    assert cpu.why_unsupported(forward_of(changed)) is None
    change(changed)
    assert cpu.why_unsupported(forward_of(changed))


@compiled
@pytest.mark.parametrize(
    "shape", [(1, 5, 5, 2, 3, 64), (2, 64, 200, 2, 4, 64), (3, 17, 17, 4, 8, 128), (1, 130, 131, 1, 1, 64)]
)
def test_prompt_attention_equals_float32_attention_and_does_not_depend_on_other_rows_or_chunks(shape: tuple[int, ...]) -> None:
    """Check that the result is the same for a part of the queries, for one row alone, and with the strides of a longer cache.
    A NaN in a key affects only its own position and later ones."""
    B, S, L, K, G, hd = shape
    q, kv = random(B, S, K, G, hd).bfloat16(), random(B, L, 2, K, hd).bfloat16()
    k, v = kv.permute(2, 0, 3, 1, 4).unbind()
    assert avx512.supports_prompt_attention(q, k, v)
    y = avx512.prompt_attention(q, k, v)
    mask = torch.full((S, L), float("-inf")).triu(L - S + 1)
    want = attention_reference(q.float(), k.float(), v.float(), mask.expand(1, 1, S, L))
    torch.testing.assert_close(y.float(), want, atol=0.03, rtol=0.01)
    cached = [torch.cat((part, part.new_zeros(B, K, 9, hd)), 2)[:, :, :L] for part in (k, v)]
    assert torch.equal(avx512.prompt_attention(q, *cached), y)
    for n in {1, 3, S // 2 + 1}:
        assert torch.equal(avx512.prompt_attention(q[:, :n], k[:, :, : L - S + n], v[:, :, : L - S + n]), y[:, :n])
        assert torch.equal(avx512.prompt_attention(q[-1:, -n:], k[-1:], v[-1:]), y[-1:, -n:])
    k[0, 0, L - S + 2] = float("nan")
    y = avx512.prompt_attention(q, k, v)[0, :, 0]
    assert y[:2].isfinite().all() and y[2:].isnan().all()


@compiled
@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_swiglu_within_the_product_equals_swiglu_after_it(format: str) -> None:
    kernel = forward_of(model(format)).layers[0].w13.kernel
    assert kernel is not None
    for n in (1, 5, 130):
        x = rows(n, 128)
        with torch.inference_mode():
            for decoding, multiply in ((True, kernel.decode), (False, kernel.prefill)):
                y = kernel.swiglu(x, decoding)
                assert y is not None and torch.equal(y, avx512.swiglu(multiply(x)))


@compiled
def test_traced_tensors_gradients_and_wrong_shapes_go_through_pytorch() -> None:
    """The extension checks no shapes, computes no gradients and cannot be traced, so PyTorch must compute in these cases."""
    x, norm = rows(2, 64), EngineNorm(RMSNorm(64).bfloat16())
    with torch.no_grad():
        want = norm.forward(x)
        assert torch.equal(make_fx(lambda x: norm.forward(x))(x)(x), want)
        for wrong in (RMSNorm(32), RMSNorm(64).to("meta"), RMSNorm(128)):
            with pytest.raises(RuntimeError):
                EngineNorm(wrong.bfloat16()).forward(x)
    q, k = rows(2, 64).view(1, 2, 1, 64), rows(2, 64).view(1, 2, 1, 64)
    assert avx512.supports_decode_attention(q, k, k) and not avx512.supports_decode_attention(q, k.clone().requires_grad_(), k)
    assert not avx512.supports_decode_attention(q, k[:, :1], k[:, :1]) and not avx512.supports_decode_attention(
        q, k, k[..., :32]
    )


@compiled
def test_the_cpu_backend_fuses_decode_steps_of_bfloat16_and_float32_models_only(monkeypatch: pytest.MonkeyPatch) -> None:
    made, fused_rows = model("bf16"), []
    run: Callable[..., torch.Tensor] = FusedDecodeStep.__call__

    def record(self: FusedDecodeStep, tokens: torch.Tensor, batch: RaggedBatch) -> torch.Tensor:
        fused_rows.append(len(tokens))
        return run(self, tokens, batch)

    monkeypatch.setattr(FusedDecodeStep, "__call__", record)

    def step(n: int) -> None:
        tokens = torch.zeros(n, dtype=torch.int64)
        CpuBackend().begin(forward_of(made), n)(tokens, tokens, [0] * n)

    with torch.inference_mode():
        step(2)
        step(MAX_ROWS)
        assert fused_rows == [2, MAX_ROWS]
        made.float()
        step(2)
        assert fused_rows == [2, MAX_ROWS, 2]
        made.half()
        step(2)
        assert fused_rows == [2, MAX_ROWS, 2]


@pytest.mark.parametrize("content", [b"", b"no library"])
def test_the_engine_works_without_extensions_and_with_broken_extension_files(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "_any.so").write_bytes(content)
    spec = SimpleNamespace(origin=str(tmp_path / "_any.so")) if content else None
    monkeypatch.setattr(c_extension, "PathFinder", SimpleNamespace(find_spec=lambda *args: spec))
    for module in (avx512, avx2, pack):
        status = module.status.__wrapped__()  # calls the function without its functools cache
        assert status.extension is None and status.reason
        monkeypatch.setattr(module, "status", lambda status=status: status)
    for weight in (rows(100, 192), quantize(rows(100, 192), "int8"), quantize(rows(100, 192), "int4")):
        assert not isinstance(packing.pack_weight(weight), BlockedLinear)
    tokens, forward = torch.tensor([5, 9]), forward_of(model("int4"))
    with torch.inference_mode():
        assert cpu.why_unsupported(forward)
        assert forward.hidden_states(tokens, RaggedBatch.from_segments([(0, 0, 1), (1, 0, 1)])).isfinite().all()


@pytest.mark.skipif(sys.platform != "linux", reason="extensions are compiled on Linux only")
def test_the_library_installs_without_a_compiler(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    environment = {"CC": str(tmp_path / "none"), "PATH": "/nowhere"}
    assert subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False).returncode == 0
    assert not list(tmp_path.rglob("*.so"))
