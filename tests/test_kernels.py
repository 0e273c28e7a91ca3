"""How weights are held: the packed form multiplies as the plain one does, and gives the weight back."""

import copy
import functools
import pickle
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llama import Llama, ModelArgs, Transformer, tuning
from llama.engine.forward import EngineForward
from llama.engine.kv_cache import RaggedBatch
from llama.kernels import avx2, avx512, half_precision, onednn, packed_weight, packing
from llama.kernels.attention import attention, attention_chunked, attention_reference
from llama.kernels.base import LinearKernel
from llama.kernels.packed_weight import PackedWeight
from llama.layers.linear import ColumnParallelLinear, RowParallelLinear
from llama.model import Attention

from .support import no_extension, run, write_shards

packs = pytest.mark.skipif(not half_precision.is_native(torch.bfloat16), reason="this CPU does not multiply bfloat16")
EXACT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half a step of what is rounded last


def float32_twin(params: dict[str, Any], weights: dict[str, torch.Tensor]) -> Transformer:
    """The reference model with these weights as plain tensors of float32."""
    args = {**params, "vocab_size": len(weights["output.weight"])}
    model = Transformer(ModelArgs(**args, max_batch_size=12, max_seq_len=64))
    model.load_state_dict(weights)
    return model


def engine_logits(forward: EngineForward, ids: torch.Tensor, start: int) -> torch.Tensor:
    """What the engine gives where `Transformer.forward(ids, start)` gives the same: (B, S, vocab)."""
    batch = RaggedBatch.from_segments([(row, start, ids.shape[1]) for row in range(len(ids))])
    return forward.logits(forward.hidden_states(ids.flatten(), batch)).unflatten(0, ids.shape)


@pytest.fixture
def nothing_of_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on most CPUs, where nothing is compiled."""
    monkeypatch.setattr(avx2, "status", no_extension)
    monkeypatch.setattr(avx512, "status", no_extension)
    monkeypatch.setattr(half_precision, "slow_dtypes", lambda: frozenset(EXACT))
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)


@packs
@pytest.mark.parametrize("n", [1, 2, 5, 64, 300])
def test_packed_products_are_those_of_the_weight(n: int) -> None:
    weight, x = torch.randn(1100, 320).bfloat16(), torch.randn(n, 320).bfloat16()
    kernel = onednn.OneDnnLinear(weight)
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(kernel(x).double(), exact, atol=0.02, rtol=2**-8)  # half a bfloat16 step, and the sum's own
    assert torch.equal(kernel.dequantize(), weight)


@packs
@pytest.mark.parametrize("compiled", [False, True])
def test_what_one_machine_packed_another_unpacks(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    if not compiled:
        monkeypatch.setattr(avx512, "status", no_extension)
    layer, weight = RowParallelLinear(512, 1024), torch.randn(1024, 512).bfloat16()
    (layer.weight,) = packed_weight.make_parameters(weight, [1024], 512, weight.dtype, weight.device)
    sent = pickle.dumps(layer)
    again = pickle.loads(sent).weight
    assert (
        isinstance(layer.weight, PackedWeight) and isinstance(again, PackedWeight) and torch.equal(again.dequantize(), weight)
    )
    monkeypatch.setattr(avx512, "status", no_extension)
    monkeypatch.setattr(half_precision, "slow_dtypes", lambda: frozenset({torch.bfloat16}))
    there = pickle.loads(sent).weight
    assert type(there) is torch.nn.Parameter and torch.equal(there, weight)


@packs
def test_gradients_pass_through_a_packed_weight() -> None:
    """To what was put in: soft prompts and adapters are trained so."""
    weight, x = torch.randn(1100, 320).bfloat16(), torch.randn(2, 320).bfloat16().requires_grad_()
    kernel = packing.pack_weight(weight)
    first, second = packed_weight.make_parameters(weight, [640, 460], 320, weight.dtype, weight.device)
    assert kernel and isinstance(first, PackedWeight) and isinstance(second, PackedWeight)
    for y in (kernel(x), torch.cat((F.linear(x, first), F.linear(x, second)), 1)):
        (gradient,) = torch.autograd.grad(y.float().sum(), x)
        torch.testing.assert_close(gradient.float(), weight.float().sum(0).expand(2, -1), atol=0.5, rtol=0.02)


def test_what_is_not_packed() -> None:
    """Other dtypes keep their digits, and a small weight is faster as it is."""
    assert packing.pack_weight(torch.randn(1100, 320)) is None
    assert packing.pack_weight(torch.randn(1100, 320).half()) is None
    assert packing.pack_weight(torch.randn(64, 320).bfloat16()) is None


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each product that was made piece by piece."""
    seen: list[int] = []
    by_pieces = half_precision.linear_in_pieces
    monkeypatch.setattr(half_precision, "linear_in_pieces", lambda x, *rest: (seen.append(len(x)), by_pieces(x, *rest))[1])
    return seen


@pytest.mark.usefixtures("nothing_of_16_bits")
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("n", [0, 1, tuning.MAX_SINGLE_ROWS, tuning.MAX_SINGLE_ROWS + 1, 300])
def test_products_of_16_bits_where_the_cpu_has_none(
    dtype: torch.dtype, n: int, in_pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows, and many in several pieces, of which the last is smaller; a row alone is a row of few."""
    monkeypatch.setattr(tuning, "PIECE_BYTES", 64 * 320 * 4)
    weight, x = torch.randn(1100, 320).to(dtype), torch.randn(n, 320).to(dtype)
    assert packing.pack_weight(weight) is None
    before, exact = torch.get_num_threads(), x.double() @ weight.double().T
    arm = dtype == torch.bfloat16 and platform.machine() in ("aarch64", "arm64")  # whose own instructions round on the way
    atol = 0.5 if arm else 1e-4
    try:
        for threads in (1, 2, 3):  # each has a part of a piece, where these are equal
            torch.set_num_threads(threads)
            got = half_precision.linear(x, weight)
            assert got.dtype == dtype and got.shape == (n, 1100)
            torch.testing.assert_close(got.double(), exact, atol=atol, rtol=EXACT[dtype] * 1.01)
    finally:
        torch.set_num_threads(before)
    assert in_pieces == ([n] * 3 if n > tuning.MAX_SINGLE_ROWS else [])
    again = half_precision.linear(x.view(n, 1, 320), weight).view(n, 1100)
    assert torch.equal(again, got) if n <= tuning.MAX_SINGLE_ROWS else torch.allclose(again, got, atol=atol, rtol=0.02)
    if n == tuning.MAX_SINGLE_ROWS:
        assert torch.equal(got[1], half_precision.linear(x[1], weight))
    torch._dynamo.reset()
    compiled = torch.compile(half_precision.linear, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(compiled(x, weight).double(), exact, atol=atol, rtol=0.02)
    (gradient,) = torch.autograd.grad(half_precision.linear(x, weight.requires_grad_()).float().sum(), weight)
    torch.testing.assert_close(gradient.float(), x.sum(0).float().expand(1100, -1), atol=0.5, rtol=0.02)
    x, weight = x.requires_grad_(), weight.detach()
    (gradient,) = torch.autograd.grad(half_precision.linear(x, weight).float().sum(), x)
    torch.testing.assert_close(gradient.float(), weight.float().sum(0).expand(n, -1), atol=0.5, rtol=0.02)
    for other in (x.detach().float(), x.detach()[:, 1:]):
        with pytest.raises(RuntimeError):
            half_precision.linear(other, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("copies", [0, 2, 100])
def test_pieces_take_few_copies_of_x(dtype: torch.dtype, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which oneDNN makes of 16 bit numbers that it multiplies as they are: no more than there is room for."""
    x, weight, parts = torch.randn(40, 64).to(dtype), torch.randn(64 * 7, 64).to(dtype), []
    monkeypatch.setattr(tuning, "MAX_COPY_BYTES", copies * x.nbytes)
    monkeypatch.setattr(tuning, "PIECE_BYTES", 64 * 64 * dtype.itemsize)
    monkeypatch.setattr(half_precision, "slow_dtypes", lambda: frozenset())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)

    def piece(out: slice, buffer: torch.Tensor) -> torch.Tensor:
        parts.append(len(buffer))
        return buffer.copy_(weight[out].view_as(buffer)).transpose(1, 2)

    got = half_precision.linear_in_pieces(x, len(weight), piece)
    torch.testing.assert_close(got, x @ weight.T, atol=0.1, rtol=0.02)
    assert max(parts) == (3 if dtype == torch.float32 else max(1, min(3, copies)))


@pytest.mark.usefixtures("nothing_of_16_bits")
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_a_model_of_16_bits_where_the_cpu_has_none(
    tmp_path: Path, small: SimpleNamespace, dtype: torch.dtype, in_pieces: list[int]
) -> None:
    """Prefill, several rows, one row, as where it has some; logits span +-4."""
    weights = {name: w.to(dtype) for name, w in small.weights.items()}
    llama = Llama.build(write_shards(tmp_path, small.params, weights), small.tokenizer_path, 64, 12, device="cpu")
    ids = torch.randint(3, 384, (12, 20), generator=torch.Generator().manual_seed(3))
    twin = float32_twin(small.params, weights)
    want, forward = twin.forward(ids, 0), llama.engine.forward()
    for rows, start in ((12, 15), (1, 15)):
        got = [engine_logits(forward, ids[:rows, :start], 0)]
        got += [engine_logits(forward, ids[:rows, i : i + 1], i) for i in range(start, 20)]
        torch.testing.assert_close(torch.cat(got, 1), want[:rows], atol=25 * EXACT[dtype], rtol=0)
    assert set(in_pieces) == {12 * 15, 12, 15}
    in_pieces.clear()
    prompts = [row[:15].tolist() for row in ids]
    for prompt, answer in zip(prompts, llama.generate(prompts, 5, temperature=0)[0], strict=True):
        after = twin.forward(torch.tensor([prompt + answer]), 0)[0, 14:-1]
        chosen = after.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        assert (after.amax(1) - chosen).max() < 50 * EXACT[dtype]
    assert set(in_pieces) == {12 * 15, 12}  # the prompts; the steps


@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="not an x86")
def test_a_cpu_that_has_avx2_alone() -> None:
    """What PyTorch then says of the CPU, and how it packs 4 bits."""
    done = run("-c", AVX2_ALONE, ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2")
    assert done.returncode == 0, done.stderr


AVX2_ALONE = """
import torch
from llama import tuning
from llama.kernels import half_precision, int4, packing
from llama.quantization.quantize import quantize
assert torch.backends.cpu.get_cpu_capability() == "AVX2"
native = half_precision.is_native
assert not native(torch.bfloat16) and not native(torch.float16) and native(torch.float32)
assert packing.pack_weight(torch.randn(1100, 320).bfloat16()) is None and int4._half_block_outputs() == 16
eight = packing.pack_weight(quantize(torch.full((64, 64), 1.0), "int8"))  # which oneDNN alone would add in 16 bits, and overflow
torch.testing.assert_close(eight(torch.ones(4, 64)), torch.full((4, 64), 64.0), atol=1, rtol=0)
kernel = int4.Int4CpuLinear(quantize(torch.randn(200, 192).bfloat16(), "int4"))
x = torch.randn(tuning.INT4_CPU_MAX_ROWS + 1, 192).bfloat16()
torch.testing.assert_close(kernel(x), torch.cat([kernel(x[:50]), kernel(x[50:])]), atol=0.05, rtol=0.02)
"""


def linear_weights(model: Transformer) -> list[torch.Tensor]:
    return [m.weight for m in model.modules() if isinstance(m, ColumnParallelLinear | RowParallelLinear)]


@packs
def test_a_packed_model_gives_the_plain_twins_logits(
    tmp_path: Path, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's and its own; prefill, several rows, one row: bfloat16 logits stay within 0.1 of float32's over the same
    weights; they span +-4."""
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)
    weights = {name: w.bfloat16() for name, w in small.weights.items()}
    llama = Llama.build(write_shards(tmp_path, small.params, weights, 2), small.tokenizer_path, 64, 3, device="cpu")
    model = llama.model
    assert all(isinstance(weight, PackedWeight) for weight in linear_weights(model)) and len(linear_weights(model)) == 2 * 7 + 1
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())

    ids = torch.randint(3, 384, (3, 20), generator=torch.Generator().manual_seed(3))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again.forward(ids, 0), model.forward(ids, 0))
    doubled = {name: 2 * w for name, w in model.state_dict().items()}
    again.load_state_dict(doubled)
    assert all(isinstance(weight, PackedWeight) for weight in linear_weights(again))
    assert all(torch.equal(w, doubled[name]) for name, w in again.state_dict().items())
    assert again.float().forward(ids, 0).isfinite().all()
    assert all(type(p) is torch.nn.Parameter and p.dtype == torch.float32 for p in again.parameters())  # all are plain again
    assert len(list(again.parameters())) == len(weights)

    want = float32_twin(small.params, weights).forward(ids, 0)
    for logits in (functools.partial(engine_logits, llama.engine.forward()), model.forward):
        for rows, start in ((3, 12), (1, 1)):
            got = [logits(ids[:rows, :start], 0)]
            got += [logits(ids[:rows, i : i + 1], i) for i in range(start, 20)]
            torch.testing.assert_close(torch.cat(got, 1), want[:rows], atol=0.1, rtol=0)


@pytest.mark.parametrize("kv, groups", [(4, 1), (2, 3)])
@pytest.mark.parametrize("S, L", [(2, 2), (128, 128), (129, 129), (300, 300), (5, 9), (200, 400)])
def test_attention_in_blocks_equals_its_twin(kv: int, groups: int, S: int, L: int) -> None:
    """Whole rows and chunks; borders of the blocks."""
    q, k, v = torch.randn(2, S, kv, groups, 16), torch.randn(2, kv, L, 16), torch.randn(2, kv, L, 16)
    mask = torch.full((S, L), float("-inf")).triu(1 + L - S)[None, None]
    torch.testing.assert_close(attention_chunked(q, k, v), attention_reference(q, k, v, mask), atol=1e-5, rtol=0)
    half = [t.bfloat16() for t in (q, k, v)]
    torch.testing.assert_close(attention_chunked(*half), attention_reference(*half, mask), atol=0.03, rtol=0)


@pytest.mark.usefixtures("nothing_of_16_bits")
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("S", [1, 200])
def test_attention_of_16_bits_where_the_cpu_has_none(dtype: torch.dtype, S: int) -> None:
    q, k, v = (torch.randn(shape).to(dtype) for shape in ((2, S, 2, 3, 16), (2, 2, 200, 16), (2, 2, 200, 16)))
    some = torch.zeros(2, 1, 1, 200).masked_fill(torch.arange(200) > 120, float("-inf")).to(dtype)  # of a ragged step
    for mask in (None,) if S > 1 else (None, some):
        got = attention(q, k, v, mask)
        assert got.dtype == dtype
        want = attention_reference(q.float(), k.float(), v.float(), mask)
        torch.testing.assert_close(got.float(), want, atol=0.01, rtol=EXACT[dtype])


def test_weights_stand_in_state_dict_by_metas_names() -> None:
    args = ModelArgs(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=40, multiple_of=8)
    first, second = Transformer(args), Transformer(args)
    weights = first.state_dict()
    attention = {f"layers.0.attention.{name}.weight" for name in ("wq", "wk", "wv", "wo")}
    feed_forward = {f"layers.0.feed_forward.{name}.weight" for name in ("w1", "w2", "w3")}
    norms = {"layers.0.attention_norm.weight", "layers.0.ffn_norm.weight", "norm.weight"}
    assert weights.keys() == attention | feed_forward | norms | {"tok_embeddings.weight", "output.weight"}
    assert weights["layers.0.attention.wk.weight"].shape == (16, 32)
    second.load_state_dict(weights)
    assert all(torch.equal(w, weights[name]) for name, w in second.state_dict().items())
    with pytest.raises(RuntimeError, match=r"Missing.*layers\.0\.attention\.wk\.weight"):
        second.load_state_dict({name: w for name, w in weights.items() if "wk" not in name})


@packs
@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_weights_of_one_input_are_one_kernels(
    small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str | None
) -> None:
    """Which the engine multiplies by once, as long as they are; each alone gives its own part of that."""
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)
    weights = {name: w.bfloat16() for name, w in small.weights.items()}
    folder = write_shards(tmp_path, small.params, weights)
    model = Llama.build(folder, small.tokenizer_path, 16, 1, device="cpu", quantize=kind).model
    x, layer = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16(), model.layers[0]
    for names, module in ((("wq", "wk", "wv"), layer.attention), (("w1", "w3"), layer.feed_forward)):
        own = [getattr(module, name).weight for name in names]
        kernel = packed_weight.merge_weights(own)
        assert isinstance(kernel, LinearKernel) and torch.equal(kernel.dequantize(), torch.cat([w.dequantize() for w in own]))
        assert torch.equal(kernel(x), torch.cat([getattr(module, name)(x) for name in names], 1))
        assert packed_weight.merge_weights(own[::-1]) is None
        getattr(module, names[1]).weight = torch.nn.Parameter(own[1].dequantize(), requires_grad=False)
        assert packed_weight.merge_weights([getattr(module, name).weight for name in names]) is None


def test_a_part_of_a_model_has_metas_names() -> None:
    args = ModelArgs(dim=64, n_layers=1, n_heads=4, vocab_size=32, multiple_of=32)
    attention = Attention(args)
    assert set(attention.state_dict()) == {f"w{x}.weight" for x in "qkvo"}
    attention.load_state_dict(Attention(args).state_dict())
    assert attention.state_dict(keep_vars=True)["wo.weight"] is attention.wo.weight
