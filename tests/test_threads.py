"""Threads that share a Llama are served in turn, or refused; never mixed."""

import threading
from concurrent.futures import ThreadPoolExecutor

from llama import InputError, Llama

from .support import refused

PROMPTS = [[[1, 5], [1, 9, 30]], [[1, 300]], [[1, 7, 7], [1, 8], [1, *range(20, 40)]], [[1, 44, 45]]]


def test_batches_are_served_in_turn(llama: Llama) -> None:
    want = [llama.generate(prompts, 12, temperature=0, logprobs=True) for prompts in PROMPTS]
    all_at_once = threading.Barrier(len(PROMPTS))

    def calls(prompts: list[list[int]]) -> list:
        all_at_once.wait()
        return [llama.generate(prompts, 12, temperature=0, logprobs=True) for _ in range(4)]

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        for got, once in zip(pool.map(calls, PROMPTS), want, strict=True):
            assert got == [once] * 4


def test_two_of_one_model_are_served_in_turn(llama: Llama) -> None:
    """It has one cache, whoever asks."""
    other, prompts = Llama(llama.model, llama.tokenizer), [[1, *range(5, 5 + i)] for i in range(6)]
    wanted = llama.generate(prompts, 12, temperature=0)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(which.generate, prompts, 12, temperature=0) for which in (llama, other) * 8]
        assert [answer.result() for answer in asked] == [wanted] * 16


def test_a_stream_is_right_or_refused(llama: Llama) -> None:
    """Each thread streams; whose cache another takes learns so, and what it has got until then is right."""
    want = [llama.generate(prompts[:1], 12, temperature=0)[0][0] for prompts in PROMPTS]
    all_at_once = threading.Barrier(len(PROMPTS))

    def streams(prompts: list[list[int]]) -> list[tuple[list[int], bool]]:
        all_at_once.wait()
        found = []
        for _ in range(4):
            got: list[int] = []
            try:
                got.extend(token.token for token in llama.generate_stream(prompts[:1], 12, temperature=0))
                found.append((got, True))
            except InputError:
                found.append((got, False))
        return found

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        all_found = list(pool.map(streams, PROMPTS))
    for found, whole in zip(all_found, want, strict=True):
        for got, finished in found:
            assert got == (whole if finished else whole[: len(got)])
    assert any(finished for found in all_found for _, finished in found)  # the last one, at least


def test_a_batch_in_another_thread_ends_a_stream(llama: Llama) -> None:
    stream = llama.text_completion_stream("The", temperature=0, max_gen_len=20)
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(llama.generate, [[1, 5]], 3).result()
    refused(lambda: list(stream), InputError, "another call has used this model's cache")
