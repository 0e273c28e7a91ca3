"""The compiled decode step of float32 models gives the results of `Transformer.forward` and of the engine, up to rounding."""

import copy
from collections.abc import Callable

import pytest
import torch

from llama import ModelArgs, Transformer, tuning
from llama.backends import cpu
from llama.backends.cpu import CpuBackend, FusedDecodeStep
from llama.engine.forward import EngineForward
from llama.engine.kv_cache import KVCache, RaggedBatch
from llama.kernels import avx512

from .support import packed_model

pytestmark = pytest.mark.skipif(
    avx512.extension() is None, reason="_avx512 is not compiled, or this CPU lacks its instructions"
)
ROWS = 18  # more than the 4 rows that the C code multiplies at once, and no multiple of 4
CONTEXT = 80
TOLERANCE = 1e-4


def model(head_dim: int = 64, kv_heads: int = 2, layers: int = 2) -> Transformer:
    """Return a model of 4 heads with random weights; each of its weights has memory of its own."""
    torch.manual_seed(head_dim)
    args = ModelArgs(
        dim=4 * head_dim,
        n_layers=layers,
        n_heads=4,
        n_kv_heads=kv_heads,
        vocab_size=96,
        multiple_of=64,
        max_seq_len=CONTEXT,
        max_batch_size=ROWS,
    )
    made = Transformer(args)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape) * (0.1 if parameter.ndim == 2 else 1)
    return made


def merge(made: Transformer) -> Transformer:
    """Store weights that multiply the same input side by side in memory, as loading does; return the model."""
    for layer in made.layers:
        for modules in (
            (layer.attention.wq, layer.attention.wk, layer.attention.wv),
            (layer.feed_forward.w1, layer.feed_forward.w3),
        ):
            whole = torch.cat([module.weight.data for module in modules])
            for module, part in zip(modules, whole.split([len(module.weight) for module in modules]), strict=True):
                module.weight.data = part
    return made


def forward_of(made: Transformer) -> EngineForward:
    return EngineForward(made, KVCache.adopt(made))


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(sum(shape)))


def at(positions: list[int], first: int = 0) -> RaggedBatch:
    return RaggedBatch.from_segments([(first + row, position, 1) for row, position in enumerate(positions)])


def assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=TOLERANCE * want.abs().max().item(), rtol=TOLERANCE)


@pytest.mark.parametrize("apart", [True, False], ids=["each weight apart", "weights side by side"])
@pytest.mark.parametrize(("head_dim", "kv_heads"), [(64, 2), (32, 4), (96, 1), (128, 2)])
@pytest.mark.parametrize("rows", [1, 3, 4, ROWS])
def test_it_gives_the_logits_of_the_model(rows: int, head_dim: int, kv_heads: int, apart: bool) -> None:
    """Prefill prompts of several lengths with the engine, then run ragged decode steps to the end of the context."""
    made = model(head_dim, kv_heads)
    ids, lengths = tokens(rows, CONTEXT), [(1, 30, CONTEXT - 4)[row % 3] for row in range(rows)]
    with torch.inference_mode():
        want = copy.deepcopy(made).forward(ids, 0)
        forward = forward_of(made if apart else merge(made))
        assert cpu.why_unsupported(forward) is None and len(forward.layers[0].wqkv.parts) == (3 if apart else 0)
        prompts = torch.cat([row[:n] for row, n in zip(ids, lengths, strict=True)])
        forward.hidden_states(prompts, RaggedBatch.from_segments((row, 0, n) for row, n in enumerate(lengths)))
        step = CpuBackend().begin(forward, rows)
        for more in range(4):
            positions = [n + more for n in lengths]
            assert_near(step(ids[range(rows), positions], torch.tensor(positions), positions), want[range(rows), positions])


@pytest.mark.parametrize("threads", [1, 3])
def test_it_leaves_the_keys_and_values_that_the_engine_leaves(threads: int) -> None:
    made, before = forward_of(model()), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            for rows, start in ((1, 0), (3, 1), (ROWS, 60)):
                positions = [start + row % 3 for row in range(rows)]
                cache = made.cache.data.normal_().clone()
                got, kept = FusedDecodeStep(made, rows)(tokens(rows), at(positions)), made.cache.data.clone()
                made.cache.data.copy_(cache)
                assert_near(got, made.hidden_states(tokens(rows), at(positions)))
                assert_near(kept, made.cache.data)
    finally:
        torch.set_num_threads(before)


def test_a_row_is_the_same_alone_and_in_any_batch() -> None:
    made, ids = forward_of(model()), tokens(ROWS)
    positions = [20 + row for row in range(ROWS)]
    with torch.inference_mode():
        cache = made.cache.data.normal_().clone()
        want = FusedDecodeStep(made, ROWS)(ids, at(positions)).clone()
        for n in (1, 2, 3, 4, 5, 7):
            for first in (0, ROWS - n):
                made.cache.data.copy_(cache)
                rows = slice(first, first + n)
                assert torch.equal(FusedDecodeStep(made, n)(ids[rows], at(positions[rows], first)), want[rows])


@pytest.mark.parametrize("where", ["a token's embedding", "keys", "values"])
def test_what_is_not_finite_stays_in_its_row(where: str) -> None:
    made, ids = forward_of(model()), torch.arange(5)
    with torch.inference_mode():
        made.cache.data.normal_()
        step, positions = FusedDecodeStep(made, 5), [7, 8, 8, 9, 30]
        want = step(ids, at(positions)).clone()
        if where == "a token's embedding":
            made.model.tok_embeddings.weight[2, 5] = float("nan")
        else:
            made.cache.data[0, int(where == "values"), 2, :, 3] = float("nan")
        made.cache.data[:, :, :, :, 31:] = float("nan")  # positions after those that the rows may read
        got = step(ids, at(positions))
        assert got[2].isnan().all() and torch.equal(got[[0, 1, 3, 4]], want[[0, 1, 3, 4]])


def test_a_step_holds_what_it_was_made_of() -> None:
    """Give the model new weights: the step must still use the weights with which it was made."""
    made = forward_of(model())
    with torch.inference_mode():
        step = FusedDecodeStep(made, 2)
        before = step(tokens(2), at([7, 7])).clone()
        for parameter in (*made.model.layers[0].parameters(), *made.model.layers[1].parameters()):
            parameter.data = torch.full_like(parameter, float("nan"))
        made.cache.data.zero_()
        assert torch.equal(step(tokens(2), at([7, 7])), before)


def strided(weight: torch.Tensor) -> torch.Tensor:
    return weight.repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize(
    "change",
    [
        lambda made: made.layers[0].attention_norm.bfloat16(),
        lambda made: made.layers[1].feed_forward.w2.bfloat16(),
        lambda made: setattr(made.layers[1].ffn_norm.weight, "data", strided(made.layers[1].ffn_norm.weight)),
        lambda made: setattr(made.layers[1].attention.wk.weight, "data", strided(made.layers[1].attention.wk.weight)),
        lambda made: setattr(made.layers[1].attention.wv.weight, "data", made.layers[1].attention.wv.weight[:-16].clone()),
        lambda made: packed_model(made, "int8"),
    ],
)
def test_models_that_it_would_read_wrongly_go_layer_by_layer(
    change: Callable[[Transformer], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)
    made = model()
    assert cpu.why_unsupported(forward_of(made)) is None
    change(made)
    why = cpu.why_unsupported(forward_of(made))
    assert why and ("not a plain row in float32" in why or "not plain float32: quantized, or replaced" in why)


def test_an_odd_width_goes_layer_by_layer() -> None:
    assert "a head_dim that is a multiple of 32, and this one is 48" in (cpu.why_unsupported(forward_of(model(48))) or "")
