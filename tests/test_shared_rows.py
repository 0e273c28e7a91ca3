"""Test how requests share the rows of a batch: when they enter, which rows a step computes, and who may read a stream."""

from typing import Any

import pytest
import torch

from llama import InputError, Llama, SamplingParams, tuning
from llama.engine.incremental_text import IncrementalText
from llama.engine.requests import GenerationCall, Request

from .counting import count_forward_tokens

SINGLE = [[1, *range(5 + i, 8 + 2 * i)] for i in range(24)]


def test_a_request_that_comes_while_others_run_joins_their_batch(llama: Llama) -> None:
    stream = llama.generate_stream(SINGLE[:2], 12, temperature=0)
    with count_forward_tokens() as forwards:
        next(stream)
        tokens = llama.generate(SINGLE[2:3], 4, temperature=0)[0][0]
    assert forwards == [len(SINGLE[0] + SINGLE[1]), 2, len(SINGLE[2]), *[3] * (len(tokens) - 1)]
    want = llama.generate(SINGLE[:2], 12, temperature=0)[0]
    assert len(list(stream)) == sum(map(len, want)) - 1


def test_more_streams_than_rows_wait_in_order_even_if_the_first_are_not_read(llama: Llama) -> None:
    streams = [llama.generate_stream([prompt], 5, temperature=0) for prompt in SINGLE[:14]]
    first = [next(stream).token for stream in streams[:6]]  # these take all 6 rows
    last = [[token.token for token in stream] for stream in streams[6:]]
    want = llama.generate(SINGLE[:14], 5, temperature=0)[0]
    assert first == [tokens[0] for tokens in want[:6]] and last == want[6:]


def test_prompts_that_enter_while_no_row_decodes_are_prefilled_in_large_chunks(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "PREFILL_CHUNK_BESIDE_DECODING", 8)
    monkeypatch.setattr(tuning, "ATTENTION_CHUNK", 8)
    stream = llama.generate_stream([[1, *range(80, 120)]], 1, temperature=0)
    calls = [
        llama.engine.submit(GenerationCall([Request([1, *range(30 + i, 70 + i)], 1)], SamplingParams(0))) for i in range(2)
    ]
    with count_forward_tokens() as forwards:
        next(stream)
    assert calls and forwards == [3 * 41]


@pytest.mark.parametrize("scored", [False, True])
def test_a_long_prompt_enters_in_chunks_between_the_steps_of_a_running_stream(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, either_backend: bool, scored: bool
) -> None:
    long, option = [1, *range(30, 80)], {"temperature": 0, "logprobs": scored, "echo": scored}
    want, expected = llama.generate([long], 6, **option)
    stream_alone = llama.generate(SINGLE[:1], 20, temperature=0)[0][0]
    monkeypatch.setattr(tuning, "PREFILL_CHUNK_BESIDE_DECODING", 16)
    monkeypatch.setattr(tuning, "ATTENTION_CHUNK", 8)
    llama.clear_prefix_cache()
    stream = llama.generate_stream(SINGLE[:1], 20, temperature=0)
    with count_forward_tokens() as forwards:
        tokens = [next(stream).token]
        got, values = llama.generate([long], 6, **option)
    begin = forwards[: 2 * 4 + 2]
    assert begin == [len(SINGLE[0]), 1, 16, 2, 16, 2, 16, 2, 3, 2]  # the row of the long prompt is computed, and ignored
    assert [*tokens, *(token.token for token in stream)] == stream_alone
    assert got == want
    if scored:
        assert values[0] == pytest.approx(expected[0], abs=1e-4)  # type: ignore[index]


def test_a_long_prompt_whose_caller_leaves_frees_its_row_before_its_prefill_ends(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, either_backend: bool
) -> None:
    want = llama.generate(SINGLE[:3], 20, temperature=0)[0]
    monkeypatch.setattr(tuning, "PREFILL_CHUNK_BESIDE_DECODING", 8)
    monkeypatch.setattr(tuning, "ATTENTION_CHUNK", 8)
    stream = llama.generate_stream(SINGLE[:1], 20, temperature=0)
    tokens = [next(stream).token]
    running_scheduler = llama.engine.shared.scheduler()
    call = GenerationCall([Request([1, *range(30, 80)], 4)], SamplingParams(0), stop_token=2)
    left = running_scheduler.submit(call)
    tokens.append(next(stream).token)
    assert 1 in running_scheduler.running and not left.events
    left.cancelled = True
    tokens.append(next(stream).token)
    assert 1 not in running_scheduler.running and not running_scheduler.prefills
    assert llama.generate(SINGLE[1:3], 20, temperature=0)[0] == want[1:]
    assert [*tokens, *(token.token for token in stream)] == want[0]


def test_a_prompt_that_fills_the_context_ends_no_other_call(llama: Llama, either_backend: bool) -> None:
    want = llama.generate(SINGLE[:1], 30, temperature=0)[0][0]
    full, short = [1, *range(100, 163)], [1, 5, 9]
    scored = llama.generate([full, short], 3, temperature=0, logprobs=True, echo=True)
    stream = llama.generate_stream(SINGLE[:1], 30, temperature=0)
    tokens = [next(stream).token]
    got = llama.generate([full, short], 3, temperature=0, logprobs=True, echo=True)
    assert got[0] == scored[0]
    for values, expected in zip(got[1] or [], scored[1] or [], strict=True):
        assert values == pytest.approx(expected, abs=1e-4)
    assert [*tokens, *(token.token for token in stream)] == want


def test_a_call_alone_uses_the_same_random_numbers_however_long_its_prompts_are(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long prompt that gets the row of a finished answer is prefilled whole if no other call runs."""
    prompts = [*SINGLE[:7], [1, *range(30, 80)], *SINGLE[7:9]]

    def sample() -> list[list[int]]:
        torch.manual_seed(3)
        return llama.generate(prompts, 8, temperature=1.0)[0]

    want = sample()
    monkeypatch.setattr(tuning, "PREFILL_CHUNK_BESIDE_DECODING", 8)
    monkeypatch.setattr(tuning, "ATTENTION_CHUNK", 8)
    assert sample() == want


def test_rows_that_no_request_needs_are_not_computed_any_more(llama: Llama) -> None:
    stream = llama.generate_stream(SINGLE[:1], 12, temperature=0)
    with count_forward_tokens() as forwards:
        next(stream)
        llama.generate(SINGLE[1:4], 2, temperature=0)
        list(stream)
    assert 4 in forwards and forwards[-1] == 1


def test_a_second_reader_of_a_stream_is_told_so(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = llama.text_completion_stream("The", temperature=0, max_gen_len=5)
    errors = []

    def read_again(*_: Any) -> str:
        for call in (lambda: next(stream), stream.close):
            with pytest.raises(InputError, match="another thread is reading this stream") as caught:
                call()
            errors.append(caught)
        return "x"

    with monkeypatch.context() as patch:
        patch.setattr(IncrementalText, "push", read_again)
        next(stream)
    stream.close()  # frees its row now: `errors` keep the tracebacks that refer to it
    assert len(errors) == 2


def test_free_rows_wait_a_little_for_rows_that_are_about_to_end(llama: Llama) -> None:
    """Begin a call with two prompts one step after a call with four. The prompts that wait for their rows enter together."""
    prompts = [[1, *range(20 + i, 25 + i)] for i in range(12)]

    def make_call(first: int, end: int) -> GenerationCall:
        return GenerationCall([Request(prompt, 6) for prompt in prompts[first:end]], SamplingParams(0), stop_token=-1)

    want = [[token.token for token in llama.engine.run(make_call(i, i + 1))] for i in range(12)]
    answers: list[list[int]] = []
    calls = []
    for first, end in ((0, 4), (4, 6), (6, 12)):
        calls.append(llama.engine.submit(make_call(first, end)))
        llama.engine.step_or_wait(calls[-1][0])
    with count_forward_tokens() as forwards:
        for scheduler, call in calls:
            tokens: dict[int, list[int]] = {}
            while events := llama.engine.wait_for_events(scheduler, call):
                for event in events:
                    assert event.token
                    tokens.setdefault(event.prompt_index, []).append(event.token.token)
            answers += [tokens[i] for i in sorted(tokens)]
    assert answers == want
    assert max(forwards) == 6 * 6
