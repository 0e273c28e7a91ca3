"""The prefix cache shares nothing after an edit, an error or an interruption that makes its tokens wrong."""

import copy
import threading
from collections.abc import Callable

import pytest
import torch

from llama import InputError, Llama, SamplingParams, tuning
from llama.engine import prefill
from llama.engine.forward import EngineForward
from llama.engine.prefix_cache import PrefixCache
from llama.engine.requests import GenerationCall, Request

from . import prefixes
from .counting import count_forward_tokens
from .prefixes import GREEDY, assert_close, prompt, without_cache
from .support import Fault, fail_on_call

fine, own = prefixes.fine, prefixes.own  # fixtures


def edit_in_place(llama: Llama) -> None:
    with torch.no_grad():
        llama.model.layers[0].attention.wk.weight.mul_(1.5)


def edit_norm_through_data(llama: Llama) -> None:
    llama.model.norm.weight.data.mul_(1.5)


def edit_eps(llama: Llama) -> None:
    llama.model.layers[1].ffn_norm.eps = 0.3


def edit_rotations(llama: Llama) -> None:
    llama.model.freqs_cis.data[3:] = llama.model.freqs_cis.data[1:-2].clone()


def edit_cache(llama: Llama) -> None:
    llama.model.layers[1].attention.cache_v[0, 2] = 7


def edit_cache_through_data(llama: Llama) -> None:
    llama.model.layers[1].attention.cache_v.data[0, 2] = 7


def edit_cache_through_numpy(llama: Llama) -> None:
    llama.model.layers[1].attention.cache_k.numpy()[:] = 7


def replace_cache(llama: Llama) -> None:
    attention = llama.model.layers[1].attention
    attention.cache_k = attention.cache_k.clone()


def run_forward(llama: Llama) -> None:
    llama.model.forward(torch.tensor([[1, 9]]), 0)


def run_modified(llama: Llama) -> None:
    hook = llama.model.register_forward_hook(lambda *_: None)
    llama.generate([[1, 9]], 2, temperature=0)
    hook.remove()


def load_weights(llama: Llama) -> None:
    llama.model.load_state_dict({name: weight * 1.25 for name, weight in llama.model.state_dict().items()}, strict=False)


EVENTS = [
    edit_in_place, edit_norm_through_data, edit_eps, edit_rotations, edit_cache, edit_cache_through_data,
    edit_cache_through_numpy, replace_cache, run_forward, run_modified, load_weights,
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS, ids=[event.__name__ for event in EVENTS])
def test_nothing_is_shared_after_an_edit_of_weights_or_cache(own: Llama, event: Callable[[Llama], None]) -> None:
    each = prompt((1, 20), (2, 5))
    own.generate([each], 4, temperature=0)
    event(own)
    with count_forward_tokens() as counts:
        got = own.generate([each], 4, **GREEDY)
    assert counts[0] == len(each)
    assert_close(got, without_cache(own, [each], 4, **GREEDY))


def test_an_edit_through_data_that_a_caller_has_kept_is_obeyed(own: Llama) -> None:
    """Edits through a tensor that `.data` has returned leave no trace, so nothing is shared from then on."""
    kept, each = own.model.layers[0].attention_norm.weight.data, prompt((1, 20), (2, 5))
    before = own.generate([each], 4, **GREEDY)
    kept.mul_(torch.linspace(0.1, 4, len(kept)))
    after = own.generate([each], 4, **GREEDY)
    assert after != before
    assert_close(after, without_cache(own, [each], 4, **GREEDY))


@pytest.mark.parametrize("where", ["prefill", "layer"])
def test_a_failed_prefill_leaves_nothing_to_share(own: Llama, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    prompts = [prompt((1, 24), (i, 5)) for i in range(4)]
    want = without_cache(own, prompts, 4, **GREEDY)
    own.engine.forward().cache.data.zero_()
    target, name = {"prefill": (prefill.Prefill, "run_chunk"), "layer": (EngineForward, "hidden_states")}[where]
    for nth in (1, 2):
        own.engine.forward().cache.prefixes.clear()
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fail_on_call(getattr(target, name), nth))
            with pytest.raises(Fault):
                own.generate(prompts, 4, temperature=0)
        assert_close(own.generate(prompts, 4, **GREEDY), want)


def test_a_prompt_computes_what_it_has_waited_for_if_the_other_leaves(own: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Close a stream whose prefill is under way beside a decoding stream, while a second prompt waits for its tokens."""
    monkeypatch.setattr(tuning, "PREFILL_CHUNK_BESIDE_DECODING", 8)
    decoding = own.generate_stream([prompt((9, 5))], 40, temperature=0)
    next(decoding)
    prompts = [prompt((1, 30), (i, 5)) for i in range(2)]
    leaver, stayer = (iter(own.generate_stream([each], 6, temperature=0)) for each in prompts)
    results: list[list[int]] = []
    thread = threading.Thread(target=lambda: results.append([token.token for token in stayer]))
    waiter = threading.Thread(target=lambda: next(leaver, None))
    waiter.start()
    thread.start()
    waiter.join()
    leaver.close()
    thread.join()
    list(decoding)
    want = without_cache(own, prompts[1:], 6, temperature=0)[0]
    assert results == want


def test_a_prompt_without_new_tokens_leaves_a_row_that_others_may_share(fine: None, request: pytest.FixtureRequest) -> None:
    """On CUDA, steps go on computing the row at a position that must not be one of the prompt's."""
    request.getfixturevalue("as_on_cuda")
    llama: Llama = request.getfixturevalue("llama")
    shared = prompt((1, 24))[:24]
    want = without_cache(llama, [[*shared, 7, 9]], 4, **GREEDY)
    llama.clear_prefix_cache()
    stream = llama.generate_stream([prompt((9, 5))], 30, temperature=0)
    next(stream)
    llama.generate([shared], 0, logprobs=True, echo=True)
    for _ in range(3):
        next(stream)
    assert_close(llama.generate([[*shared, 7, 9]], 4, **GREEDY), want)
    list(stream)


def test_a_row_that_waits_in_vain_keeps_the_tokens_that_others_share(own: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """B's row holds 12 shared tokens, and B waits for more from A, whose caller leaves. D then shares the 12 tokens."""
    monkeypatch.setattr(tuning, "PREFILL_CHUNK_BESIDE_DECODING", 4)
    short = prompt((1, 11))
    a, d = [*short, *prompt((2, 28))[1:]], [*short, *prompt((4, 10))[1:]]
    want = without_cache(own, [d], 4, **GREEDY)
    own.clear_prefix_cache()
    own.generate([[*short, 7, 8]], 2, temperature=0)
    decoding = own.generate_stream([prompt((50, 10))], 50, temperature=0)
    next(decoding)
    next(decoding)
    running = []
    for each in (a, prompt((9, 40)), [*a[:36], *prompt((3, 8))[1:]]):
        running.append(own.engine.submit(GenerationCall([Request(each, 5)], SamplingParams(0)))[1])
        next(decoding)
    running[0].cancelled = True
    for _ in range(2):
        next(decoding)
    scheduler = own.engine.shared.scheduler()
    row = next(row for row, each in scheduler.running.items() if each.running_call is running[2])
    held = len(scheduler.prefixes.tokens[row])
    data = scheduler.cache.data[:, :, row, :, :held].clone()
    list(decoding)
    assert held == 12
    assert_close(own.generate([d], 4, **GREEDY), want)
    own.clear_prefix_cache()
    own.generate([short], 1, temperature=0)
    assert torch.allclose(data, own.engine.forward().cache.data[:, :, 0, :, :held], atol=1e-4)


@pytest.mark.parametrize("interrupted", ["copy", "zero_row"])
def test_an_interrupted_write_leaves_no_tokens_that_the_row_does_not_hold(
    own: Llama, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    """Ctrl-C comes directly after a copy from row to row, or after a row has been zeroed."""
    prompts = [prompt((1, 24), (i, 5)) for i in range(3)]
    want = without_cache(own, prompts, 4, **GREEDY)
    own.clear_prefix_cache()
    own.generate(prompts[:1], 2, temperature=0)
    cache = own.engine.forward().cache
    if interrupted == "copy":
        own.generate(prompts[1:2], 2, temperature=0)
        with monkeypatch.context() as patch:
            patch.setattr(PrefixCache, "copy", fail_on_call(PrefixCache.copy, 1))
            with pytest.raises(Fault):
                own.generate([prompt((8, 20))], 2, temperature=0)
    else:
        scheduler = own.engine.submit(GenerationCall([Request([1, 5], 1)], SamplingParams(0)))[0]
        scheduler.zero_row(0)
        assert cache.prefixes.tokens[0] == []
    for each, expected in zip(prompts, range(3), strict=True):
        assert own.generate([each], 4, temperature=0)[0][0] == want[0][expected]


def test_edits_while_a_stream_is_open_are_noticed(own: Llama) -> None:
    stream = own.generate_stream([prompt((9, 5))], 40, temperature=0)
    next(stream)
    each = prompt((1, 20), (2, 5))
    own.generate([each], 4, temperature=0)
    own.model.layers[0].attention_norm.weight.data.mul_(torch.linspace(0.1, 4, 64))
    got = own.generate([each], 4, **GREEDY)
    stream.close()
    assert_close(got, without_cache(own, [each], 4, **GREEDY))


def test_a_sampler_that_runs_the_model_ends_the_calls(own: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    def sampler(probs: torch.Tensor, top_p: float) -> torch.Tensor:
        own.model.forward(torch.tensor([[1, 9, 8, 7]]), 0)
        return probs.argmax(-1, keepdim=True)

    each = prompt((1, 20))
    want = without_cache(own, [each], 4, **GREEDY)
    monkeypatch.setattr("llama.generation.sample_top_p", sampler)
    with pytest.raises(InputError, match="has run the model's forward, which has overwritten the KV cache"):
        own.generate([each], 4, temperature=1.0)
    monkeypatch.undo()
    assert_close(own.generate([each], 4, **GREEDY), want)


def test_observed_weights_and_caches_can_be_used_as_parameters_and_copied(own: Llama) -> None:
    weight, cache = own.model.norm.weight, own.model.layers[0].attention.cache_k
    for each in (torch.nn.Parameter(weight), torch.nn.Parameter(cache), weight.detach()):
        assert torch.equal(each, weight if each.ndim == 1 else cache)
    assert torch.nn.Embedding.from_pretrained(own.model.tok_embeddings.weight).weight.shape == (384, 64)
    copied = copy.deepcopy(own)
    copied.generate([prompt((1, 20))], 2, temperature=0)
    with count_forward_tokens() as counts:
        copied.generate([prompt((1, 20))], 2, temperature=0)
    assert counts[0] < 21
    weight.detach().numpy()
    assert not own.engine.forward().notices_edits()
