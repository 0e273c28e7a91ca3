"""The engine: continuous batching, seeds, and the state after errors."""

import gc
import itertools
import random
import statistics
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import Llama, SamplingParams, tuning
from llama.backends import cpu
from llama.backends.cuda_graphs import CudaGraphsBackend
from llama.engine import decode_state, prefill, scheduler
from llama.engine.forward import EngineForward, EngineLayer
from llama.engine.kv_cache import RaggedBatch
from llama.engine.requests import GenerationCall, Request

from .counting import count_forward_tokens
from .support import Fault, fail_on_call

GREEDY = SamplingParams(0)
PROMPTS = [[1, *range(7 * i + 5, 7 * i + 6 + i % 5)] for i in range(20)]  # each prompt has 2 to 6 tokens


@pytest.fixture
def set_max_batch_size(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that sets how many rows run at a time, up to 6."""
    return lambda n: monkeypatch.setattr(llama.model.params, "max_batch_size", n)


def generate_separately(llama: Llama, prompts: list[list[int]], **options: Any) -> tuple[list, list]:
    """Return the tokens and log probabilities of 14 new tokens for each prompt, from a separate call for each."""
    answers = [llama.generate([prompt], 14, logprobs=True, **options) for prompt in prompts]
    return [tokens[0] for tokens, _ in answers], [values[0] for _, values in answers if values]


def assert_equal_answers(got: tuple[list, list | None], want: tuple[list, list]) -> None:
    """Check that the tokens are equal and the log probabilities close."""
    assert got[0] == want[0]
    for values, expected in zip(got[1] or [], want[1], strict=True):
        assert values == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("limit", [1, 3, 6])
@pytest.mark.parametrize("async_copies", [False, True])
def test_answers_to_any_number_of_prompts_are_those_of_separate_calls(
    llama: Llama,
    set_max_batch_size: Callable,
    limit: int,
    async_copies: bool,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Some answers end with EOS, others after 14 tokens; one prompt fills the context and gets no new token.

    With asynchronous copies a finished row runs one decode step too many before the next prompt takes over the row.
    """
    prompts = [*PROMPTS, [1, *range(100, 163)], *PROMPTS[:3]]
    answers, _ = generate_separately(llama, prompts, temperature=0)
    monkeypatch.setattr(llama.tokenizer, "eos_id", statistics.mode(itertools.chain(*answers)))
    want = generate_separately(llama, prompts, temperature=0)
    assert len({len(tokens) for tokens in want[0]}) > 4
    if async_copies:
        request.getfixturevalue("as_on_cuda")
    set_max_batch_size(limit)
    assert_equal_answers(llama.generate(prompts, 14, temperature=0, logprobs=True), want)
    echoed, values = llama.generate(prompts, 14, temperature=0, logprobs=True, echo=True)
    assert echoed == [prompt + tokens for prompt, tokens in zip(prompts, want[0], strict=True)]
    assert_equal_answers((want[0], [v[len(p) :] for p, v in zip(prompts, values or [], strict=True)]), want)
    assert llama.generate(prompts, 14, temperature=0, echo=True)[0] == echoed


def test_a_waiting_prompt_takes_over_a_finished_row_at_once(llama: Llama) -> None:
    """Run 64 prompts with answers of 4 to 40 tokens in 6 rows; compare the forwards with a simulation in Python.

    Static batches of 6 would need more than 1.5 times as many forwards: a batch runs until its longest answer ends.
    """
    lengths = [round(4 * 10 ** (i / 63)) for i in range(64)]
    random.Random(0).shuffle(lengths)
    requests = [Request(PROMPTS[i % 20] + [200], n) for i, n in enumerate(lengths)]
    with count_forward_tokens() as forwards:
        order = [token.prompt_index for token in llama.engine.run(GenerationCall(requests, GREEDY, stop_token=-1))]
    assert [order.count(index) for index in range(64)] == lengths == [r.num_new_tokens for r in requests]
    assert {r.finish_reason for r in requests} == {"length"}

    remaining, waiting, expected = [0] * 6, list(range(64)), []
    while any(remaining) or waiting:
        free_rows = [row for row in range(6) if not remaining[row]][: len(waiting)]
        entering, waiting = waiting[: len(free_rows)], waiting[len(free_rows) :]
        for row, index in zip(free_rows, entering, strict=True):
            remaining[row] = lengths[index]
        expected += [sum(len(requests[index].prompt) for index in entering)] * bool(entering)
        remaining = [max(n - 1, 0) for n in remaining]
        expected += [6] * any(remaining)
    assert forwards == expected
    # A static batch needs as many forwards as its longest answer has tokens: the prefill gives the first token.
    static_forwards = sum(max(lengths[i : i + 6]) for i in range(0, 64, 6))
    assert static_forwards / len(forwards) > 1.5, (static_forwards, len(forwards))


def test_the_progress_bar_counts_prompt_tokens_or_finished_answers(
    llama: Llama, set_max_batch_size: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: dict[str, int] = {}

    def progress(items: list, weigh: Callable, label: str, unit: str) -> Iterator:
        for item in items:
            yield item
            bars[label] = bars.get(label, 0) + weigh(item)

    monkeypatch.setattr(scheduler, "progress", progress)
    monkeypatch.setattr(prefill, "progress", progress)
    llama.generate(PROMPTS[:6], 3, temperature=0)
    assert bars == {"reading prompts": sum(map(len, PROMPTS[:6]))}
    bars.clear()
    set_max_batch_size(3)
    llama.generate([*PROMPTS, [1] * 64], 3, temperature=0)
    assert bars == {"answering": 21}


# --- seeds -----------------------------------------------------------------------------------------------------------

HOT = dict(temperature=1.0, top_p=0.95)


@pytest.mark.parametrize("async_copies", [False, True])
def test_a_seed_alone_determines_the_answer(
    llama: Llama, set_max_batch_size: Callable, async_copies: bool, request: pytest.FixtureRequest
) -> None:
    """An answer with a seed does not depend on earlier calls, other prompts in the batch, or the number of rows."""
    seeds = [*range(-3, 17)]
    want = [llama.generate([p], 14, seed=s, **HOT)[0][0] for p, s in zip(PROMPTS, seeds, strict=True)]
    if async_copies:
        request.getfixturevalue("as_on_cuda")
    for limit, skip in ((6, 0), (4, 3), (1, 17)):
        set_max_batch_size(limit)
        torch.manual_seed(limit)
        state = torch.get_rng_state()
        assert llama.generate(PROMPTS[skip:], 14, seed=seeds[skip:], **HOT)[0] == want[skip:]
        assert torch.equal(torch.get_rng_state(), state)  # seeded sampling must not use torch's generator
        llama.generate(PROMPTS[:2], 3, **HOT)


def test_one_seed_is_used_for_all_prompts_and_several_seeds_give_several_answers(llama: Llama) -> None:
    one = llama.generate(PROMPTS[:1], 14, seed=5, **HOT)[0][0]
    assert llama.generate([PROMPTS[3], PROMPTS[0]], 14, seed=5, **HOT)[0][1] == one
    several = llama.generate(PROMPTS[:1] * 8, 14, seed=range(8), **HOT)[0]
    assert several[5] == one and len({tuple(tokens) for tokens in several}) == 8
    assert llama.generate(PROMPTS[:2], 14, temperature=0, seed=5) == llama.generate(PROMPTS[:2], 14, temperature=0)
    assert llama.generate(PROMPTS[:1], 5, seed=2**64 - 1, **HOT) == llama.generate(PROMPTS[:1], 5, seed=-1, **HOT)


def test_unseeded_sampling_depends_on_torchs_generator_with_more_prompts_than_rows(
    llama: Llama, set_max_batch_size: Callable
) -> None:
    set_max_batch_size(4)

    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return llama.generate(PROMPTS, 14, **HOT)[0]

    assert sample(3) == sample(3) != sample(4)


def test_the_repetition_penalty_applies_to_the_tokens_of_each_request_alone(llama: Llama, set_max_batch_size: Callable) -> None:
    """A penalty of 100 forbids every token of the prompt and the answer, but no token of earlier requests in the same row."""
    options = dict(temperature=0, repetition_penalty=100.0)
    want = generate_separately(llama, PROMPTS, **options)
    set_max_batch_size(3)
    assert_equal_answers(llama.generate(PROMPTS, 14, logprobs=True, **options), want)
    for prompt, tokens in zip(PROMPTS, want[0], strict=True):
        assert len({*prompt, *tokens}) == len(set(prompt)) + len(tokens)
    assert any(len(set(tokens)) < len(tokens) for tokens in generate_separately(llama, PROMPTS, temperature=0)[0])


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["a layer", "prefill", "step", "choice", "text", "consumer"])
@pytest.mark.parametrize("async_copies", [False, True])
def test_a_failed_call_does_not_change_the_answers_of_later_calls(
    llama: Llama,
    set_max_batch_size: Callable,
    where: str,
    async_copies: bool,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """After an error in a batch with more prompts than rows, or in a stream, later calls answer as before."""
    set_max_batch_size(2)
    texts = ["Once upon", "a time", "there was", "a bear"]

    def stream() -> str:
        return "".join(llama.text_completion_stream("Once upon a time", 0, max_gen_len=12))

    def batch() -> list:
        return llama.text_completion(texts, max_gen_len=8, seed=3, stop="qq", repetition_penalty=1.1)

    want = batch(), stream(), stream()
    if async_copies:
        request.getfixturevalue("as_on_cuda")
    for call, nth in ((batch, 3), (stream, 1), (stream, 2)):
        cache = llama.engine.forward().cache
        cache.prefixes.clear()
        cache.data.zero_()  # erases keys and values of earlier calls, which could hide a fault
        if where == "consumer":
            with pytest.raises(Fault):
                for _ in llama.text_completion_stream("Once upon a time", 0, max_gen_len=12):
                    raise Fault
        else:
            target, name = {
                "a layer": (EngineLayer, "swiglu"),
                "prefill": (prefill.Prefill, "run_chunk"),
                "step": (CudaGraphsBackend, "decode") if async_copies else (cpu, "decode_layerwise"),
                "choice": (decode_state, "sample"),
                "text": (llama.tokenizer.sp_model, "is_byte"),
            }[where]
            nth = {"prefill": 1, "a layer": 2 * nth - 1}.get(where, nth)  # the model has two layers
            with monkeypatch.context() as patch:
                patch.setattr(target, name, fail_on_call(getattr(target, name), nth))
                with pytest.raises(Fault):
                    call()
        assert (stream(), batch(), stream()) == (want[1], want[0], want[2])


def test_no_decode_step_runs_after_the_last_token(llama: Llama, as_on_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    decode = CudaGraphsBackend.decode
    monkeypatch.setattr(CudaGraphsBackend, "decode", lambda self, *args: (steps.append(1), decode(self, *args))[1])
    run = llama.engine.run(GenerationCall([Request([1, 5], 8)], GREEDY, stop_token=-1))
    assert len(list(run)) == 8 and len(steps) == 7


def test_the_first_token_of_the_prompt_is_penalized_too(llama: Llama) -> None:
    prompts = [[x, 5] for x in range(3, 300)]
    answers = llama.generate(prompts, 16, 0)[0]
    prompt = next(prompt for prompt, tokens in zip(prompts, answers, strict=True) if prompt[0] in tokens)
    assert prompt[0] not in llama.generate([prompt], 16, 0, repetition_penalty=100.0)[0][0]


def test_prefill_chunks_end_at_multiples_of_the_attention_chunk(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "PREFILL_CHUNK", 24)
    monkeypatch.setattr(tuning, "ATTENTION_CHUNK", 8)
    batches: list[RaggedBatch] = []
    hidden = EngineForward.hidden_states

    def record(self: EngineForward, tokens: torch.Tensor, batch: RaggedBatch, *args: Any, **options: Any) -> torch.Tensor:
        batches.append(batch)
        return hidden(self, tokens, batch, *args, **options)

    monkeypatch.setattr(EngineForward, "hidden_states", record)
    llama.generate([[1, *range(20, 40)], [1, *range(50, 61)]], 1, 0)
    segments = [segment for batch in batches for segment in batch.segments]
    assert len(batches) == 2 and all(segment.kv_len % 8 == 0 or segment.kv_len in (21, 12) for segment in segments)


def test_a_model_that_has_generated_is_freed_with_its_last_reference(small: SimpleNamespace) -> None:
    for backend in ("auto", "eager"):
        llama = Llama.build(small.folder, small.tokenizer_path, 32, 2, device="cpu", backend=backend)
        llama.generate([[1, 5, 9]], 2, temperature=0)
        model = weakref.ref(llama.model)
        del llama
        gc.collect()
        assert model() is None, backend
