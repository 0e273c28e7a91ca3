"""Test packed weights, 16-bit products on CPUs without 16-bit instructions, and attention."""

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
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # the largest relative error of rounding float32 to each dtype


def float32_model(params: dict[str, Any], weights: dict[str, torch.Tensor]) -> Transformer:
    """Return a model that contains `weights` as plain float32 tensors."""
    args = {**params, "vocab_size": len(weights["output.weight"])}
    model = Transformer(ModelArgs(**args, max_batch_size=12, max_seq_len=64))
    model.load_state_dict(weights)
    return model


def engine_logits(forward: EngineForward, tokens: torch.Tensor, start: int) -> torch.Tensor:
    """Return the logits (B, S, vocab) that the engine computes for tokens (B, S), the first of which is at position `start`."""
    batch = RaggedBatch.from_segments([(row, start, tokens.shape[1]) for row in range(len(tokens))])
    return forward.logits(forward.hidden_states(tokens.flatten(), batch)).unflatten(0, tokens.shape)


@pytest.fixture
def no_16_bit_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the CPU has no 16-bit instructions, and that no extension is compiled."""
    monkeypatch.setattr(avx2, "status", no_extension)
    monkeypatch.setattr(avx512, "status", no_extension)
    monkeypatch.setattr(half_precision, "slow_dtypes", lambda: frozenset(ROUNDING))
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)


@packs
@pytest.mark.parametrize("n", [1, 2, 5, 64, 300])
def test_onednn_multiplies_by_the_weight_and_gives_it_back_unchanged(n: int) -> None:
    weight, x = torch.randn(1100, 320).bfloat16(), torch.randn(n, 320).bfloat16()
    kernel = onednn.OneDnnLinear(weight)
    exact = x.double() @ weight.double().T
    # The tolerances allow for the rounding of results to bfloat16 and for rounding in the sums.
    torch.testing.assert_close(kernel(x).double(), exact, atol=0.02, rtol=2**-8)
    assert torch.equal(kernel.dequantize(), weight)


@packs
@pytest.mark.parametrize("compiled", [False, True])
def test_a_pickled_packed_weight_is_unpacked_on_a_machine_without_its_kernel(
    monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    if not compiled:
        monkeypatch.setattr(avx512, "status", no_extension)
    layer, weight = RowParallelLinear(512, 1024), torch.randn(1024, 512).bfloat16()
    (layer.weight,) = packed_weight.make_parameters(weight, [1024], 512, weight.dtype, weight.device)
    pickled = pickle.dumps(layer)
    unpickled = pickle.loads(pickled).weight
    assert isinstance(layer.weight, PackedWeight) and isinstance(unpickled, PackedWeight)
    assert torch.equal(unpickled.dequantize(), weight)
    monkeypatch.setattr(avx512, "status", no_extension)
    monkeypatch.setattr(half_precision, "slow_dtypes", lambda: frozenset({torch.bfloat16}))
    unpacked = pickle.loads(pickled).weight
    assert type(unpacked) is torch.nn.Parameter and torch.equal(unpacked, weight)


@packs
def test_gradients_flow_through_a_packed_weight_to_its_input() -> None:
    """Compute the gradient of the input of a product with a packed weight. Training soft prompts and adapters needs this
    gradient."""
    weight, x = torch.randn(1100, 320).bfloat16(), torch.randn(2, 320).bfloat16().requires_grad_()
    kernel = packing.pack_weight(weight)
    first, second = packed_weight.make_parameters(weight, [640, 460], 320, weight.dtype, weight.device)
    assert kernel and isinstance(first, PackedWeight) and isinstance(second, PackedWeight)
    for y in (kernel(x), torch.cat((F.linear(x, first), F.linear(x, second)), 1)):
        (gradient,) = torch.autograd.grad(y.float().sum(), x)
        torch.testing.assert_close(gradient.float(), weight.float().sum(0).expand(2, -1), atol=0.5, rtol=0.02)


def test_weights_of_float32_or_float16_and_small_weights_are_not_packed() -> None:
    """Packing as bfloat16 would lose precision of float32 and float16 weights. Products with small weights are faster
    unpacked."""
    assert packing.pack_weight(torch.randn(1100, 320)) is None
    assert packing.pack_weight(torch.randn(1100, 320).half()) is None
    assert packing.pack_weight(torch.randn(64, 320).bfloat16()) is None


@pytest.fixture
def rows_in_pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which each product that multiplies by its weight in pieces appends its number of rows."""
    n_rows: list[int] = []
    linear_in_pieces = half_precision.linear_in_pieces
    monkeypatch.setattr(
        half_precision, "linear_in_pieces", lambda x, *rest: (n_rows.append(len(x)), linear_in_pieces(x, *rest))[1]
    )
    return n_rows


@pytest.mark.usefixtures("no_16_bit_instructions")
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("n", [0, 1, tuning.MAX_SINGLE_ROWS, tuning.MAX_SINGLE_ROWS + 1, 300])
def test_16_bit_products_on_a_cpu_without_16_bit_instructions_are_exact_up_to_rounding(
    dtype: torch.dtype, n: int, rows_in_pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test products computed row by row, and products computed in several pieces of the weight, where the last piece is
    smaller. Also test torch.compile and gradients, and check that inputs of a wrong dtype or width raise."""
    monkeypatch.setattr(tuning, "PIECE_BYTES", 64 * 320 * 4)
    weight, x = torch.randn(1100, 320).to(dtype), torch.randn(n, 320).to(dtype)
    assert packing.pack_weight(weight) is None
    before, exact = torch.get_num_threads(), x.double() @ weight.double().T
    # The bfloat16 instructions of Arm CPUs round sums, so products are less exact.
    rounds_sums = dtype == torch.bfloat16 and platform.machine() in ("aarch64", "arm64")
    atol = 0.5 if rounds_sums else 1e-4
    try:
        for threads in (1, 2, 3):  # each piece of the weight is divided among the threads
            torch.set_num_threads(threads)
            got = half_precision.linear(x, weight)
            assert got.dtype == dtype and got.shape == (n, 1100)
            torch.testing.assert_close(got.double(), exact, atol=atol, rtol=ROUNDING[dtype] * 1.01)
    finally:
        torch.set_num_threads(before)
    assert rows_in_pieces == ([n] * 3 if n > tuning.MAX_SINGLE_ROWS else [])
    batched = half_precision.linear(x.view(n, 1, 320), weight).view(n, 1100)
    assert torch.equal(batched, got) if n <= tuning.MAX_SINGLE_ROWS else torch.allclose(batched, got, atol=atol, rtol=0.02)
    if n == tuning.MAX_SINGLE_ROWS:
        assert torch.equal(got[1], half_precision.linear(x[1], weight))
    torch.compiler.reset()
    compiled = torch.compile(half_precision.linear, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(compiled(x, weight).double(), exact, atol=atol, rtol=0.02)
    (gradient,) = torch.autograd.grad(half_precision.linear(x, weight.requires_grad_()).float().sum(), weight)
    torch.testing.assert_close(gradient.float(), x.sum(0).float().expand(1100, -1), atol=0.5, rtol=0.02)
    x, weight = x.requires_grad_(), weight.detach()
    (gradient,) = torch.autograd.grad(half_precision.linear(x, weight).float().sum(), x)
    torch.testing.assert_close(gradient.float(), weight.float().sum(0).expand(n, -1), atol=0.5, rtol=0.02)
    for wrong in (x.detach().float(), x.detach()[:, 1:]):
        with pytest.raises(RuntimeError):
            half_precision.linear(wrong, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("copies", [0, 2, 100])
def test_copies_of_x_for_several_threads_stay_within_their_memory_limit(
    dtype: torch.dtype, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Count the parts into which a piece of the weight is divided, one for each thread. In 16 bits oneDNN copies x for each
    part, so the memory limit bounds the number of parts. In float32 oneDNN copies nothing."""
    x, weight, n_parts = torch.randn(40, 64).to(dtype), torch.randn(64 * 7, 64).to(dtype), []
    monkeypatch.setattr(tuning, "MAX_COPY_BYTES", copies * x.nbytes)
    monkeypatch.setattr(tuning, "PIECE_BYTES", 64 * 64 * dtype.itemsize)
    monkeypatch.setattr(half_precision, "slow_dtypes", lambda: frozenset())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)

    def fill_piece(out: slice, buffer: torch.Tensor) -> torch.Tensor:
        n_parts.append(len(buffer))
        return buffer.copy_(weight[out].view_as(buffer)).transpose(1, 2)

    got = half_precision.linear_in_pieces(x, len(weight), fill_piece)
    torch.testing.assert_close(got, x @ weight.T, atol=0.1, rtol=0.02)
    assert max(n_parts) == (3 if dtype == torch.float32 else max(1, min(3, copies)))


@pytest.mark.usefixtures("no_16_bit_instructions")
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_a_16_bit_model_on_a_cpu_without_16_bit_instructions_gives_the_float32_models_logits(
    tmp_path: Path, small: SimpleNamespace, dtype: torch.dtype, rows_in_pieces: list[int]
) -> None:
    """Compare the logits of prefill and of decode steps, for several rows and for one row. Logits range from about -4 to 4."""
    weights = {name: w.to(dtype) for name, w in small.weights.items()}
    llama = Llama.build(write_shards(tmp_path, small.params, weights), small.tokenizer_path, 64, 12, device="cpu")
    tokens = torch.randint(3, 384, (12, 20), generator=torch.Generator().manual_seed(3))
    float32 = float32_model(small.params, weights)
    want, forward = float32.forward(tokens, 0), llama.engine.forward()
    for rows, start in ((12, 15), (1, 15)):
        got = [engine_logits(forward, tokens[:rows, :start], 0)]
        got += [engine_logits(forward, tokens[:rows, i : i + 1], i) for i in range(start, 20)]
        torch.testing.assert_close(torch.cat(got, 1), want[:rows], atol=25 * ROUNDING[dtype], rtol=0)
    assert set(rows_in_pieces) == {12 * 15, 12, 15}
    rows_in_pieces.clear()
    prompts = [row[:15].tolist() for row in tokens]
    for prompt, answer in zip(prompts, llama.generate(prompts, 5, temperature=0)[0], strict=True):
        logits = float32.forward(torch.tensor([prompt + answer]), 0)[0, 14:-1]
        chosen = logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        assert (logits.amax(1) - chosen).max() < 50 * ROUNDING[dtype]
    assert set(rows_in_pieces) == {12 * 15, 12}  # the prefill has 12 * 15 tokens, and each decode step has 12


@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="not an x86")
def test_a_cpu_with_avx2_and_nothing_newer_multiplies_int8_and_int4_correctly() -> None:
    """Multiply int8 and int4 weights in another process that restricts PyTorch and oneDNN to AVX2."""
    done = run("-c", AVX2_ALONE, ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2")
    assert done.returncode == 0, done.stderr


AVX2_ALONE = """
import torch
from llama import tuning
from llama.kernels import half_precision, int4, packing
from llama.quantization.quantize import quantize
assert torch.backends.cpu.get_cpu_capability() == "AVX2"
is_native = half_precision.is_native
assert not is_native(torch.bfloat16) and not is_native(torch.float16) and is_native(torch.float32)
assert packing.pack_weight(torch.randn(1100, 320).bfloat16()) is None
int8_kernel = packing.pack_weight(quantize(torch.full((64, 64), 1.0), "int8"))  # oneDNN alone would overflow 16-bit sums here
torch.testing.assert_close(int8_kernel(torch.ones(4, 64)), torch.full((4, 64), 64.0), atol=1, rtol=0)
kernel = int4.Int4CpuLinear(quantize(torch.randn(200, 192).bfloat16(), "int4"))
x, linear_in_pieces, n_unpacked = torch.randn(tuning.INT4_CPU_MAX_ROWS + 1, 192).bfloat16(), half_precision.linear_in_pieces, []
half_precision.linear_in_pieces = lambda x, *rest: (n_unpacked.append(len(x)), linear_in_pieces(x, *rest))[1]
torch.testing.assert_close(kernel(x), torch.cat([kernel(x[:50]), kernel(x[50:])]), atol=0.05, rtol=0.02)
assert n_unpacked == [len(x)]  # PyTorch's packed int4 format for AVX2 is known
"""


def linear_weights(model: Transformer) -> list[torch.Tensor]:
    """Return the weights of all linear layers of a model."""
    return [m.weight for m in model.modules() if isinstance(m, ColumnParallelLinear | RowParallelLinear)]


@packs
def test_a_packed_model_gives_the_float32_models_logits_and_keeps_its_weights(
    tmp_path: Path, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare the logits of the engine and of the model's own forward, in prefill and in decode steps, for several rows and for
    one row. Logits range from about -4 to 4, and bfloat16 changes them by at most 0.1. Copies, pickles, `state_dict` and
    `load_state_dict` keep weights packed and exact; `float()` unpacks them."""
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)
    weights = {name: w.bfloat16() for name, w in small.weights.items()}
    llama = Llama.build(write_shards(tmp_path, small.params, weights, 2), small.tokenizer_path, 64, 3, device="cpu")
    model = llama.model
    assert all(isinstance(weight, PackedWeight) for weight in linear_weights(model)) and len(linear_weights(model)) == 2 * 7 + 1
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())

    tokens = torch.randint(3, 384, (3, 20), generator=torch.Generator().manual_seed(3))
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(duplicate.forward(tokens, 0), model.forward(tokens, 0))
    doubled = {name: 2 * w for name, w in model.state_dict().items()}
    duplicate.load_state_dict(doubled)
    assert all(isinstance(weight, PackedWeight) for weight in linear_weights(duplicate))
    assert all(torch.equal(w, doubled[name]) for name, w in duplicate.state_dict().items())
    assert duplicate.float().forward(tokens, 0).isfinite().all()
    assert all(type(p) is torch.nn.Parameter and p.dtype == torch.float32 for p in duplicate.parameters())
    assert len(list(duplicate.parameters())) == len(weights)

    want = float32_model(small.params, weights).forward(tokens, 0)
    for logits in (functools.partial(engine_logits, llama.engine.forward()), model.forward):
        for rows, start in ((3, 12), (1, 1)):
            got = [logits(tokens[:rows, :start], 0)]
            got += [logits(tokens[:rows, i : i + 1], i) for i in range(start, 20)]
            torch.testing.assert_close(torch.cat(got, 1), want[:rows], atol=0.1, rtol=0)


@pytest.mark.parametrize("kv, groups", [(4, 1), (2, 3)])
@pytest.mark.parametrize("S, L", [(2, 2), (128, 128), (129, 129), (300, 300), (5, 9), (200, 400)])
def test_attention_in_chunks_of_queries_equals_the_reference_attention(kv: int, groups: int, S: int, L: int) -> None:
    """Test numbers of queries below, at and above the size of a chunk, with and without earlier positions in the KV cache."""
    q, k, v = torch.randn(2, S, kv, groups, 16), torch.randn(2, kv, L, 16), torch.randn(2, kv, L, 16)
    mask = torch.full((S, L), float("-inf")).triu(1 + L - S)[None, None]
    torch.testing.assert_close(attention_chunked(q, k, v), attention_reference(q, k, v, mask), atol=1e-5, rtol=0)
    half = [t.bfloat16() for t in (q, k, v)]
    torch.testing.assert_close(attention_chunked(*half), attention_reference(*half, mask), atol=0.03, rtol=0)


@pytest.mark.usefixtures("no_16_bit_instructions")
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("S", [1, 200])
def test_16_bit_attention_on_a_cpu_without_16_bit_instructions_equals_float32_attention(dtype: torch.dtype, S: int) -> None:
    q, k, v = (torch.randn(shape).to(dtype) for shape in ((2, S, 2, 3, 16), (2, 2, 200, 16), (2, 2, 200, 16)))
    decode_mask = torch.zeros(2, 1, 1, 200).masked_fill(torch.arange(200) > 120, float("-inf")).to(dtype)
    for mask in (None,) if S > 1 else (None, decode_mask):
        got = attention(q, k, v, mask)
        assert got.dtype == dtype
        want = attention_reference(q.float(), k.float(), v.float(), mask)
        torch.testing.assert_close(got.float(), want, atol=0.01, rtol=ROUNDING[dtype])


def test_state_dict_has_metas_names_and_loads_into_another_model() -> None:
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
@pytest.mark.parametrize("format", [None, "int8", "int4"])
def test_weights_that_multiply_the_same_input_share_one_kernel(
    small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str | None
) -> None:
    """Compare the output of a kernel that several weights share with the concatenated outputs of the separate weights. After
    one of the weights is replaced, they share no kernel."""
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)
    weights = {name: w.bfloat16() for name, w in small.weights.items()}
    folder = write_shards(tmp_path, small.params, weights)
    model = Llama.build(folder, small.tokenizer_path, 16, 1, device="cpu", quantize=format).model
    x, layer = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16(), model.layers[0]
    for names, module in ((("wq", "wk", "wv"), layer.attention), (("w1", "w3"), layer.feed_forward)):
        joined = [getattr(module, name).weight for name in names]
        kernel = packed_weight.merge_weights(joined)
        assert isinstance(kernel, LinearKernel)
        assert torch.equal(kernel.dequantize(), torch.cat([weight.dequantize() for weight in joined]))
        assert torch.equal(kernel(x), torch.cat([getattr(module, name)(x) for name in names], 1))
        assert packed_weight.merge_weights(joined[::-1]) is None
        getattr(module, names[1]).weight = torch.nn.Parameter(joined[1].dequantize(), requires_grad=False)
        assert packed_weight.merge_weights([getattr(module, name).weight for name in names]) is None


def test_an_attention_module_by_itself_has_metas_names() -> None:
    args = ModelArgs(dim=64, n_layers=1, n_heads=4, vocab_size=32, multiple_of=32)
    attention = Attention(args)
    assert set(attention.state_dict()) == {f"w{x}.weight" for x in "qkvo"}
    attention.load_state_dict(Attention(args).state_dict())
    assert attention.state_dict(keep_vars=True)["wo.weight"] is attention.wo.weight
