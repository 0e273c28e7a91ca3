"""Test threads that share a model. Their calls run one after another. A stream raises if another call has used the KV cache
since the stream began."""

import threading
from concurrent.futures import ThreadPoolExecutor

from llama import InputError, Llama

from .support import assert_raises

PROMPTS = [[[1, 5], [1, 9, 30]], [[1, 300]], [[1, 7, 7], [1, 8], [1, *range(20, 40)]], [[1, 44, 45]]]


def test_calls_of_several_threads_give_the_answers_of_one_thread(llama: Llama) -> None:
    want = [llama.generate(prompts, 12, temperature=0, logprobs=True) for prompts in PROMPTS]
    start_together = threading.Barrier(len(PROMPTS))

    def generate_four_times(prompts: list[list[int]]) -> list:
        start_together.wait()
        return [llama.generate(prompts, 12, temperature=0, logprobs=True) for _ in range(4)]

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        for results, result in zip(pool.map(generate_four_times, PROMPTS), want, strict=True):
            assert results == [result] * 4


def test_threads_may_use_one_model_through_two_llamas(llama: Llama) -> None:
    """Call two `Llama` objects with the same model and the same KV cache from two threads."""
    other, prompts = Llama(llama.model, llama.tokenizer), [[1, *range(5, 5 + i)] for i in range(6)]
    want = llama.generate(prompts, 12, temperature=0)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(caller.generate, prompts, 12, temperature=0) for caller in (llama, other) * 8]
        assert [future.result() for future in futures] == [want] * 16


def test_streams_of_several_threads_yield_correct_tokens_or_raise(llama: Llama) -> None:
    """Read streams in several threads. A stream raises after another stream has used the KV cache. The tokens yielded before
    the error must be correct."""
    want = [llama.generate(prompts[:1], 12, temperature=0)[0][0] for prompts in PROMPTS]
    start_together = threading.Barrier(len(PROMPTS))

    def read_four_streams(prompts: list[list[int]]) -> list[tuple[list[int], bool]]:
        start_together.wait()
        streams = []
        for _ in range(4):
            tokens: list[int] = []
            try:
                tokens.extend(token.token for token in llama.generate_stream(prompts[:1], 12, temperature=0))
                streams.append((tokens, True))
            except InputError:
                streams.append((tokens, False))
        return streams

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        streams_of_threads = list(pool.map(read_four_streams, PROMPTS))
    for streams, answer in zip(streams_of_threads, want, strict=True):
        for tokens, finished in streams:
            assert tokens == (answer if finished else answer[: len(tokens)])
    assert any(finished for streams in streams_of_threads for _, finished in streams)  # at least the last stream finishes


def test_a_stream_raises_after_a_call_of_another_thread(llama: Llama) -> None:
    stream = llama.text_completion_stream("The", temperature=0, max_gen_len=20)
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(llama.generate, [[1, 5]], 3).result()
    assert_raises(lambda: list(stream), InputError, "ended before", "generate has been called since")
