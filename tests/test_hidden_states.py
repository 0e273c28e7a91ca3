"""Test hidden states and embeddings against hooks on the reference model, and that they leave everything else as it is."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llama import InputError, Llama, NonFiniteError, Transformer, tuning
from llama.engine.forward import EngineForward

from .support import assert_raises

N_LAYERS, DIM = 2, 64
ROWS = [[1, 5, 9, 30, 8], [1], [1, *range(20, 60)], [7, 7], [1, 5, 9, 30, 8]]


def states_by_hooks(model: Transformer, tokens: list[int]) -> torch.Tensor:
    """Return the states (layers + 1, tokens, dim) of a sequence: embeddings, each layer's output, the last after the norm."""
    outputs: list[torch.Tensor] = []
    modules = [model.tok_embeddings, *list(model.layers)[:-1], model.norm]
    handles = [module.register_forward_hook(lambda module, args, output: outputs.append(output)) for module in modules]
    model.forward(torch.tensor([tokens]), 0)
    for handle in handles:
        handle.remove()
    return torch.cat(outputs).float()


@pytest.fixture(params=["auto", "torch", "eager"])
def any_llama(request: pytest.FixtureRequest, small: SimpleNamespace) -> Llama:
    return Llama.build(small.folder, small.tokenizer_path, 64, 4, device="cpu", backend=request.param)


def test_states_are_what_hooks_on_the_reference_see(any_llama: Llama, reference: Transformer) -> None:
    for rows in (ROWS, ROWS[:1], [torch.tensor(ROWS[0]), np.array(ROWS[2])]):
        for row, states in zip(rows, any_llama.hidden_states(rows, layers=range(N_LAYERS + 1)), strict=True):
            want = states_by_hooks(reference, [int(token) for token in row])
            assert states.shape == want.shape == (N_LAYERS + 1, len(row), DIM)
            torch.testing.assert_close(states, want, atol=1e-5, rtol=1e-5)
            assert torch.equal(states[0], want[0])


@pytest.mark.parametrize("chunk", [1, 6, 2048])
def test_texts_are_divided_into_batches_without_effect_on_the_states(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    want = llama.hidden_states(ROWS)
    monkeypatch.setattr(tuning, "PREFILL_CHUNK", chunk)
    n_tokens = []
    run = EngineForward.hidden_states

    def count(forward: EngineForward, tokens: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        n_tokens.append(len(tokens))
        return run(forward, tokens, *args, **options)

    monkeypatch.setattr(EngineForward, "hidden_states", count)
    for got, expected in zip(llama.hidden_states(ROWS), want, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert n_tokens == {1: [5, 1, 41, 2, 5], 6: [6, 41, 2, 5], 2048: [54]}[chunk]


def test_layers_are_numbered_as_in_transformers(llama: Llama) -> None:
    (every,) = llama.hidden_states(ROWS[:1], layers=[0, 1, 2])
    for layers, want in (
        (None, every[2]), (2, every[2]), (-1, every[2]), (0, every[0]), (-3, every[0]), (np.int64(1), every[1]),
        ([-1, 0, 0], every[[2, 0, 0]]), ((1,), every[1:2]), (torch.tensor([1, -2]), every[[1, 1]]),
        ((i for i in (2, 1)), every[[2, 1]]),
    ):  # fmt: skip
        (got,) = llama.hidden_states(ROWS[:1], layers)
        assert torch.equal(got, want)


def test_a_text_is_encoded_with_bos_and_texts_and_tokens_may_be_mixed(llama: Llama) -> None:
    tokens = llama.tokenizer.encode("The fox", bos=True, eos=False)
    a, b, empty, bos = llama.hidden_states(["The fox", tokens, "", [llama.tokenizer.bos_id]])
    assert torch.equal(a, b) and len(a) == len(tokens)
    assert torch.equal(empty, bos) and empty.shape == (1, DIM)
    assert llama.hidden_states([]) == [] and llama.embed([]).shape == (0, DIM)


def test_embeddings_are_the_mean_or_the_last_of_the_states(any_llama: Llama) -> None:
    states = any_llama.hidden_states(ROWS)
    mean, last = any_llama.embed(ROWS), any_llama.embed(ROWS, pooling="last")
    assert mean.shape == last.shape == (len(ROWS), DIM) and mean.dtype == last.dtype == torch.float32
    torch.testing.assert_close(mean, torch.stack([each.mean(0) for each in states]))
    assert torch.equal(last, torch.stack([each[-1] for each in states]))


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantize": "int8"}, {"quantize": "int4"}], ids=str)
def test_states_come_in_float32_from_any_format_and_agree_with_its_own_reference(
    small: SimpleNamespace, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)
    packed, eager = (
        Llama.build(small.folder, small.tokenizer_path, 64, 4, device="cpu", backend=backend, **options)
        for backend in ("auto", "eager")
    )
    for got, want in zip(packed.hidden_states(ROWS, [0, 1, 2]), eager.hidden_states(ROWS, [0, 1, 2]), strict=True):
        assert got.dtype == want.dtype == torch.float32
        assert (got - want).norm() < 0.03 * want.norm()


def test_the_states_can_be_used_in_training(llama: Llama) -> None:
    """PyTorch refuses to train with tensors that were made in inference mode."""
    embeddings, probe = llama.embed(ROWS), nn.Linear(DIM, 1)
    assert not embeddings.is_inference() and not embeddings.requires_grad
    probe(embeddings).sum().backward()
    probe(llama.hidden_states(ROWS)[0]).sum().backward()
    assert probe.weight.grad is not None and torch.isfinite(probe.weight.grad).all()


def test_open_streams_and_the_cache_are_left_alone(llama: Llama) -> None:
    want = "".join(llama.text_completion_stream("Once upon", 0, max_gen_len=12))
    stream = llama.text_completion_stream("Once upon", 0, max_gen_len=12)
    first = next(stream)
    cache = llama.engine.forward().cache.data.clone()
    llama.embed(ROWS)
    assert torch.equal(cache, llama.engine.forward().cache.data)
    assert first + "".join(stream) == want


def test_modified_models_run_their_own_forward_with_their_hooks(
    small: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    llama = Llama.build(small.folder, small.tokenizer_path, 64, 4, device="cpu")
    plain = llama.hidden_states(ROWS, [0, 1, 2])
    handle = llama.model.layers[0].register_forward_hook(lambda module, args, output: 2 * output)
    doubled = llama.hidden_states(ROWS, [0, 1, 2])
    assert "layers.0 has a hook" in capsys.readouterr().err
    for before, after, tokens in zip(plain, doubled, ROWS, strict=True):
        assert torch.equal(after[0], before[0])
        torch.testing.assert_close(after[1], 2 * before[1], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(after[2], before[2], atol=1e-2)
        torch.testing.assert_close(after, states_by_hooks(llama.model, tokens))
    handle.remove()
    for before, after in zip(plain, llama.hidden_states(ROWS, [0, 1, 2]), strict=True):
        assert torch.equal(before, after)
    assert not any(module._forward_hooks for module in llama.model.modules())


def test_edited_weights_have_effect(small: SimpleNamespace) -> None:
    llama = Llama.build(small.folder, small.tokenizer_path, 64, 4, device="cpu")
    before = llama.embed(ROWS)
    llama.model.norm.weight.mul_(2)
    torch.testing.assert_close(llama.embed(ROWS), 2 * before)


class Passes(nn.Module):
    """Return what a layer of another kind may return."""

    def __init__(self, result: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: torch.Tensor, *args: Any) -> Any:
        return self.result(x)


def test_a_forward_that_runs_a_module_twice_or_never_is_refused(small: SimpleNamespace) -> None:
    llama = Llama.build(small.folder, small.tokenizer_path, 64, 4, device="cpu", backend="eager")
    layers = llama.model.layers
    layers[1] = layers[0]
    way_out = "take the hidden states with forward hooks of your own"
    assert_raises(lambda: llama.hidden_states(ROWS, 1), InputError, "ran layers.0 2 times", way_out)
    assert llama.hidden_states(ROWS[:1])[0].shape == (5, DIM)  # the final norm still runs once
    layers[1] = Passes(lambda x: x[:, :1])
    assert_raises(lambda: llama.embed(ROWS), InputError, "from norm, and one output (1, 5, 64) is needed", way_out)
    llama.model.forward = lambda tokens, start: tokens  # type: ignore[method-assign]
    assert_raises(lambda: llama.embed(ROWS), InputError, "ran norm 0 times", way_out)
    assert not any(module._forward_hooks for module in llama.model.modules())
    params = llama.model.params
    llama.model = nn.Identity()  # type: ignore[assignment]
    llama.model.params = params
    assert_raises(lambda: llama.embed(ROWS), InputError, "Identity without Transformer's modules", way_out)


@pytest.fixture
def idle(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> Llama:
    """Return a model that fails the test if it runs a forward."""
    monkeypatch.setattr(EngineForward, "hidden_states", lambda *_, **__: pytest.fail("the model ran"))
    return llama


@pytest.mark.parametrize(
    "texts, parts",
    [
        *[(bad, (f"texts is {bad!r:.10}", "a list of texts, as in [text]")) for bad in (None, 5, "once", {"a": 1})],
        *[([[1], bad], ("text 1 is", "it must be a string, or a list of tokens")) for bad in (None, 5, b"a")],
        ([1, 5, 9], ("text 0 is 1 (int)", "a string, or a list of tokens")),
        (["a", []], ("text 1 has no tokens", "begin it with BOS (1)")),
        ([[1, 384]], ("text 0: 384 (int) is no token", "from 0 to 383")),
        ([[1, -1]], ("text 0: -1 (int) is no token",)),
        ([[1, True]], ("text 0: True (bool) is no token",)),
        (["a", [1] * 65], ("text 1 has 65 tokens, more than max_seq_len=64", "shorten it")),
        (["ab\ud800"], ("text 0 holds a lone surrogate",)),
    ],
    ids=lambda value: f"{value!r:.30}" if not isinstance(value, tuple) else "",
)
def test_bad_texts_are_refused_before_any_computation(idle: Llama, texts: Any, parts: tuple) -> None:
    assert_raises(lambda: idle.hidden_states(texts), InputError, *parts)
    assert_raises(lambda: idle.embed(texts), InputError, *parts)


@pytest.mark.parametrize("layers", [3, -4, True, 1.0, "1", [0, 3], [None], [], {0}, [[1]]], ids=str)
def test_bad_layers_are_refused(idle: Llama, layers: Any) -> None:
    expected = "None for the last, a whole number from -3 to 2, or a list of them"
    assert_raises(lambda: idle.hidden_states(["a"], layers), InputError, "layers", expected)


@pytest.mark.parametrize("pooling", ["max", None, 1, ["mean"]], ids=str)
def test_bad_pooling_is_refused(idle: Llama, pooling: Any) -> None:
    assert_raises(lambda: idle.embed(["a"], pooling), InputError, "pooling is", "it must be 'mean' or 'last'")


def test_states_that_are_not_finite_raise_an_error_that_names_the_text(small: SimpleNamespace) -> None:
    llama = Llama.build(small.folder, small.tokenizer_path, 64, 4, device="cpu")
    llama.model.layers[0].feed_forward.w2.weight[0, 0] = float("nan")
    assert_raises(lambda: llama.hidden_states(ROWS, [0, 1]), NonFiniteError, "text 0: hidden states of layer 1 are not finite")
    assert llama.hidden_states(ROWS, 0)[0].isfinite().all()
