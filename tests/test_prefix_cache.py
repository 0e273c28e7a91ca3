"""The prefix cache: tokens that prompts share are computed once, and no answer depends on it."""

import copy
import itertools
import random
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import InputError, Llama, SamplingParams, tuning
from llama.engine import prefill, scoring
from llama.engine.forward import EngineForward
from llama.engine.prefix_cache import PrefixCache
from llama.engine.requests import GenerationCall, Request
from llama.engine.scoring import shares_long_prefixes

from .counting import count_forward_tokens
from .support import Fault, fail_on_call, random_weights, write_shards
from .test_batches import exact

GREEDY = {"temperature": 0, "logprobs": True}


@pytest.fixture
def fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Share prefixes in steps of 4 tokens, so that short prompts test it."""
    for name in ("ATTENTION_CHUNK", "MIN_SHARED_PREFIX", "MIN_CACHED_PREFIX", "MIN_AWAITED_PREFIX", "MIN_SAVED_PREFIX"):
        monkeypatch.setattr(tuning, name, 4)


@pytest.fixture
def own(small: SimpleNamespace, fine: None) -> Llama:
    """Build a model of the test's own, with an empty KV cache."""
    return Llama.build(small.folder, small.tokenizer_path, max_seq_len=64, max_batch_size=6, device="cpu")


def prompt(*parts: tuple[int, int]) -> list[int]:
    """Return BOS and random tokens. Each part is (seed, number of tokens); equal parts have equal tokens."""
    return [1, *itertools.chain(*(random.Random(seed).choices(range(5, 300), k=n) for seed, n in parts))]


def without_cache(llama: Llama, *args: Any, **options: Any) -> Any:
    """Return what `generate` returns if no row of the cache holds tokens and no prompt waits for another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "MIN_AWAITED_PREFIX", 10**9)
        llama.engine.forward().cache.prefixes.clear()
        return llama.generate(*args, **options)


def assert_close(got: Any, want: Any) -> None:
    assert got[0] == want[0]
    for values, expected in zip(got[1], want[1], strict=True):
        assert values == pytest.approx(expected, abs=1e-4)


# --- what is computed -------------------------------------------------------------------------------------------------------


def test_a_growing_prompt_is_computed_from_where_it_has_grown(own: Llama) -> None:
    first, grown = prompt((1, 20)), prompt((1, 20), (2, 9))
    want = without_cache(own, [grown], 6, **GREEDY)
    own.engine.forward().cache.prefixes.clear()
    own.generate([first], 6, temperature=0)
    with count_forward_tokens() as counts:
        got = own.generate([grown], 6, **GREEDY)
    assert counts[0] == len(grown) - 20
    assert_close(got, want)


def test_tokens_of_answers_are_computed_again(own: Llama) -> None:
    """Decode steps round differently. What an answer was computed with must not show in a later call."""
    first = prompt((1, 20))
    answer = own.generate([first], 30, temperature=0)[0][0]
    with count_forward_tokens() as counts:
        own.generate([[*first, *answer]], 2, temperature=0)
    assert counts[0] == len(first) + len(answer) - 20


def test_dialogs_with_one_system_text_compute_it_once(own: Llama) -> None:
    """Run 14 prompts in 6 rows. Their common beginning is computed by the first, and copied by the others."""
    prompts = [prompt((1, 24), (10 + i, 5 + i % 3)) for i in range(14)]
    want = without_cache(own, prompts, 4, **GREEDY)
    own.engine.forward().cache.prefixes.clear()
    with count_forward_tokens() as counts:
        got = own.generate(prompts, 4, **GREEDY)
    assert_close(got, want)
    assert counts[:2] == [len(prompts[0]), sum(len(each) - 24 for each in prompts[1:6])]
    assert sum(counts) < 25 + 13 * (7 + 2) + 14 * 4


def test_prompts_that_share_in_turn_wait_for_each_other(own: Llama) -> None:
    """A prompt takes most from the second, which takes most from the first: three prefills."""
    prompts = [prompt((1, 40)), prompt((1, 24), (2, 20)), prompt((1, 24), (2, 12), (3, 8)), prompt((4, 7))]
    want = without_cache(own, prompts, 4, **GREEDY)
    own.engine.forward().cache.prefixes.clear()
    with count_forward_tokens() as counts:
        got = own.generate(prompts, 4, **GREEDY)
    assert_close(got, want)
    assert counts[:3] == [len(prompts[0]) + len(prompts[3]), len(prompts[1]) - 24, len(prompts[2]) - 36]


def test_dialogs_that_take_turns_keep_their_prefixes_in_free_rows(own: Llama) -> None:
    """Three dialogs alternate in calls of one prompt, all of which run in row 0."""
    dialogs = [prompt((seed, 16)) for seed in (1, 2, 3)]
    for turn in range(3):
        for i, dialog in enumerate(dialogs):
            with count_forward_tokens() as counts:
                own.generate([dialog], 3, temperature=0)
            assert counts[0] == (len(dialog) if turn == 0 else len(dialog) - 16 - 8 * (turn - 1))
            dialogs[i] = [*dialog, *prompt((10 * turn + i, 7))]


def test_the_prefix_that_was_not_used_for_the_longest_time_is_given_up(own: Llama) -> None:
    prompts = [prompt((seed, 16)) for seed in range(8)]
    for each in (*prompts[:6], prompts[0], prompts[6]):  # 6 rows: the seventh takes the row of the second, not the first
        own.generate([each], 2, temperature=0)
    for each, is_held in ((prompts[0], True), (prompts[1], False)):
        with count_forward_tokens() as counts:
            own.generate([each], 2, temperature=0)
        assert (counts[0] < 17) == is_held


def test_scores_of_many_choices_compute_head_and_questions_once(own: Llama) -> None:
    head, texts = "Once upon a time there was a bear, ", ["who was big", "that ate honey"]
    prompts = [head + text for text in texts for _ in range(4)]
    choices = [" and slept", " and ran", " or swam", " all day"] * 2
    with pytest.MonkeyPatch.context() as patch, count_forward_tokens() as counts:
        patch.setattr(scoring, "shares_long_prefixes", lambda *_: False)
        want = own.score(prompts, choices)
        assert len(counts) == 1
    with count_forward_tokens() as counts:
        got = own.score(prompts, choices)
    assert len(counts) > 1  # in rows of the cache
    assert [score.tokens for score in got] == [score.tokens for score in want]
    for score, expected in zip(got, want, strict=True):
        assert score.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    n_tokens = [len(own.tokenizer.encode(p + c, True, False)) for p, c in zip(prompts, choices, strict=True)]
    assert sum(counts) < sum(n_tokens) / 2
    assert own.score(prompts[:1], choices[:1])[0].logprobs == pytest.approx(want[0].logprobs, abs=1e-4)


def test_sequences_without_a_long_common_beginning_are_scored_without_the_cache() -> None:
    long = [prompt((1, 300), (2, 3)), prompt((1, 300), (3, 3))]
    assert shares_long_prefixes(long, 256, 1) and shares_long_prefixes(long, 256, 128)
    assert not shares_long_prefixes(long, 1024, 1) and not shares_long_prefixes(long, 256, 512)
    assert not shares_long_prefixes([prompt((1, 300)), prompt((2, 300)), prompt((3, 300))], 256, 1)


def test_scored_prompts_take_only_tokens_that_are_not_scored(own: Llama) -> None:
    """With `echo` and `logprobs` all tokens of a prompt are scored, so that none is taken from the cache."""
    prompts = [prompt((1, 20)), prompt((1, 20), (2, 5))]
    want = without_cache(own, prompts, 4, echo=True, **GREEDY)
    for _ in range(2):
        assert_close(own.generate(prompts, 4, echo=True, **GREEDY), want)


def test_streams_tell_how_many_tokens_came_from_the_cache(own: Llama) -> None:
    text = "Once upon a time there was a bear that ate"
    first, second = (own.text_completion_stream(text, 0, max_gen_len=3) for _ in range(2))
    assert "".join(first) == "".join(second)
    assert (first.cached_tokens, second.cached_tokens > 0) == (0, True)


# --- exactness --------------------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("format", [None, "int8", "int4"])
@pytest.mark.parametrize("head_dim", [64, 32])
def test_answers_are_bitwise_the_same_with_and_without_shared_prefixes(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, format: str | None, head_dim: int
) -> None:
    """Compare prompts that share 1 to 300 tokens, in one call and in calls one after another."""
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)
    monkeypatch.setattr(tuning, "PREFILL_CHUNK", 512)
    params = dict(
        dim=256, n_layers=2, n_heads=256 // head_dim, n_kv_heads=2, multiple_of=32, norm_eps=1e-5, vocab_size=-1
    )  # fmt: skip
    folder = write_shards(tmp_path, params, random_weights(params, 384, 704))
    llama = Llama.build(folder, tokenizer_path, 512, 4, device="cpu", dtype="bfloat16", quantize=format)
    prompts = [prompt((1, n), (n, m)) for n, m in ((300, 3), (300, 40), (299, 1), (257, 1), (130, 170), (127, 2), (40, 1))]
    want = [without_cache(llama, [each], 6, **GREEDY) for each in prompts]
    llama.engine.forward().cache.prefixes.clear()
    with count_forward_tokens() as counts:
        got = [llama.generate([each], 6, **GREEDY) for each in (*prompts, *prompts)]
    assert got == [*want, *want]
    assert sum(counts) < sum(map(len, prompts))
    llama.engine.forward().cache.prefixes.clear()
    together = llama.generate(prompts, 6, **GREEDY)
    assert together == ([tokens[0] for tokens, _ in want], [values[0] for _, values in want])


@pytest.mark.usefixtures("fine", "either_backend")
def test_threads_that_leave_and_come_back_get_the_answers_of_each_prompt_alone(llama: Llama) -> None:
    prompts = [prompt((i % 3, 12), (i % 7, 8), (i, 3 + i % 5)) for i in range(30)]
    want = [without_cache(llama, [each], 6, **GREEDY) for each in prompts]
    wrong: list[int] = []

    def ask(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(8):
            i = rng.randrange(30)
            if rng.random() < 0.3:  # leave in the middle
                stream = llama.generate_stream([prompts[i]], 6, temperature=0)
                next(stream)
                stream.close()
            elif llama.generate([prompts[i]], 6, temperature=0)[0] != want[i][0]:
                wrong.append(i)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- when nothing is shared -------------------------------------------------------------------------------------------------


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
