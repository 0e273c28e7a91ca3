"""Test callers that share a model: calls and streams of several threads, or of one, do not disturb each other."""

import gc
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from llama import InputError, Llama, NonFiniteError
from llama.backends.eager import EagerBackend
from llama.engine import decode_state, events
from llama.engine.call_options import CallOptions
from llama.engine.incremental_text import IncrementalText
from llama.engine.scheduler import Scheduler

from .counting import count_forward_tokens
from .support import assert_raises

PROMPTS = [[[1, 5], [1, 9, 30]], [[1, 300]], [[1, 7, 7], [1, 8], [1, *range(20, 40)]], [[1, 44, 45]]]
SINGLE = [[1, *range(5 + i, 8 + 2 * i)] for i in range(24)]


def run_together(calls: list[Callable[[], Any]]) -> list[Any]:
    """Run each call in a thread of its own, all at the same time; return their results in order."""
    start = threading.Barrier(len(calls))
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: (start.wait(), call())[1], calls))


def test_calls_of_several_threads_give_the_answers_of_one_thread(llama: Llama) -> None:
    want = [llama.generate(prompts, 12, temperature=0, logprobs=True) for prompts in PROMPTS]
    calls = [lambda p=prompts: [llama.generate(p, 12, temperature=0, logprobs=True) for _ in range(4)] for prompts in PROMPTS]
    for results, (tokens, logprobs) in zip(run_together(calls), want, strict=True):
        for got_tokens, got_logprobs in results:
            assert got_tokens == tokens
            for values, expected in zip(got_logprobs, logprobs, strict=True):
                assert values == pytest.approx(expected, abs=1e-4)


def test_a_background_thread_steps_for_several_threads_and_none_for_a_single_one(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, names = Scheduler.step, list[str]()
    monkeypatch.setattr(Scheduler, "step", lambda self: (names.append(threading.current_thread().name), step(self))[1])

    def share_of_thread(calls: list[Callable[[], Any]]) -> float:
        """Return the fraction of the steps of these calls that the background thread has run."""
        names.clear()
        run_together(calls)
        deadline = time.monotonic() + 20
        while llama.engine.shared.turn.thread and time.monotonic() < deadline:
            time.sleep(0.005)
        return names.count("llama-steps") / len(names)

    def call(i: int) -> Any:
        return llama.generate(SINGLE[i : i + 1], 50, temperature=0)

    for _ in range(2):
        assert share_of_thread([lambda i=i: call(i) for i in range(4)]) > 0.5  # not for the first and the last caller alone
        assert share_of_thread([lambda: call(0)]) == 0


def test_threads_take_turns_if_the_system_allows_no_background_thread(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        if thread.name == "llama-steps":
            raise RuntimeError("can't start new thread")
        start_thread(thread)

    start_thread = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", start)
    want = [llama.generate([prompt], 12, temperature=0) for prompt in SINGLE[:8]]
    assert run_together([lambda p=prompt: llama.generate([p], 12, temperature=0) for prompt in SINGLE[:8]]) == want


def test_threads_may_use_one_model_through_two_llamas(llama: Llama) -> None:
    other, prompts = Llama(llama.model, llama.tokenizer), [[1, *range(5, 5 + i)] for i in range(6)]
    want = llama.generate(prompts, 12, temperature=0)
    assert (
        run_together([lambda c=caller: c.generate(prompts, 12, temperature=0) for caller in (llama, other) * 4]) == [want] * 8
    )


def test_a_llama_with_another_backend_waits_for_the_calls_before_it(llama: Llama) -> None:
    other = Llama(llama.model, llama.tokenizer, backend=type("Other", (type(llama.engine.backend),), {"name": "other"})())
    want = [llama.generate([prompt], 12, temperature=0)[0][0] for prompt in SINGLE[:2]]
    stream = llama.generate_stream(SINGLE[:1], 12, temperature=0)
    first = next(stream).token
    assert other.generate(SINGLE[1:2], 12, temperature=0)[0][0] == want[1]
    assert [first, *(token.token for token in stream)] == want[0]


def test_64_streams_share_the_rows_while_some_are_left_and_some_are_wrong(llama: Llama, either_backend: bool) -> None:
    """Run 64 threads on 6 rows: streams of different prompts, lengths and options. Every sixth is left after 3 tokens.
    Every thirteenth has a wrong prompt. All others get the tokens that they get alone, and the rows are free afterwards."""
    options: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0, "top_p": 0.95, "seed": 3},
        {"temperature": 0.7, "top_k": 7, "seed": 4},
        {"temperature": 0, "repetition_penalty": 3.0},
    ]
    cases = [(SINGLE[i % 24], 4 + i % 17, options[i % 4]) for i in range(64)]
    want = [[token.token for token in llama.generate_stream([p], n, **o)] for p, n, o in cases]

    def read(i: int) -> list[int]:
        prompt, n, option = cases[i]
        if i % 13 == 0:
            with pytest.raises(InputError, match=r"9999 \(int\) is no token"):
                llama.generate_stream([[*prompt, 9999]], n, **option)
            return want[i]
        stream, tokens = llama.generate_stream([prompt], n, **option), []
        for token in stream:
            tokens.append(token.token)
            if i % 6 == 0 and len(tokens) == 3:
                stream.close()  # type: ignore[attr-defined]
                return tokens + want[i][3:]
        return tokens

    assert run_together([lambda i=i: read(i) for i in range(64)]) == want
    gc.collect()
    assert llama.engine.shared.scheduler() is None  # no call, and so no row, is left


def test_a_step_that_ends_a_call_while_its_caller_looks_for_events_loses_no_token(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run a step, as another thread may, whenever a caller has found no events and looks whether its call has ended."""
    want = llama.generate(SINGLE[:3], 4, temperature=0)
    look, stepping = events.RunningCall.ended.fget, []  # type: ignore[attr-defined]

    def step_then_look(call: events.RunningCall) -> bool:
        if not stepping:
            stepping.append(True)
            llama.engine.shared.scheduler().step()
            stepping.clear()
        return look(call)

    monkeypatch.setattr(events.RunningCall, "ended", property(step_then_look))
    assert llama.generate(SINGLE[:3], 4, temperature=0) == want


def test_events_that_a_step_adds_while_they_are_taken_are_taken_next(llama: Llama) -> None:
    call = events.RunningCall(llama._requests.from_tokens([[1, 5]], CallOptions(max_gen_len=4)), 1)
    first, second, list_of_step = (*(events.Event(None, i) for i in range(2)), call.events)
    list_of_step.append(first)
    assert call.take_events() == [first]
    list_of_step.append(second)
    assert call.take_events() == [second]


def test_streams_of_one_thread_may_be_read_in_any_order(llama: Llama, either_backend: bool) -> None:
    want = [llama.generate([prompt], 10, seed=i, temperature=1.0)[0][0] for i, prompt in enumerate(SINGLE[:8])]
    streams = [llama.generate_stream([prompt], 10, seed=i, temperature=1.0) for i, prompt in enumerate(SINGLE[:8])]
    got: list[list[int]] = [[] for _ in streams]
    unfinished, rng = list(range(8)), random.Random(0)
    while unfinished:
        i = rng.choice(unfinished)
        token = next(streams[i], None)
        if token is None:
            unfinished.remove(i)
        else:
            got[i].append(token.token)
    assert got == want


def test_a_text_stream_stops_at_its_stop_string_although_its_row_has_gone_on(llama: Llama) -> None:
    """Read a stream only after another call has generated all of its tokens: text, reason and count are those of the answer."""
    whole = llama.text_completion(["The"], temperature=0, max_gen_len=30)[0]["generation"]
    stop = whole[8:10]
    alone = llama.text_completion(["The"], temperature=0, max_gen_len=30, stop=stop, details=True)[0]
    stream = llama.text_completion_stream("The", temperature=0, max_gen_len=30, stop=stop)
    first = next(stream)
    llama.generate([[1, 5]], 40, temperature=0)
    assert first + "".join(stream) == alone["generation"] == whole[: whole.index(stop)]
    assert (stream.finish_reason, stream.new_tokens) == (alone["finish_reason"], alone["new_tokens"])


def test_numbers_that_are_not_finite_end_their_own_call_only(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, either_backend: bool
) -> None:
    """Make the logits of the third row NaN in one step: its stream raises, and the other streams are right."""
    want = [llama.generate([prompt], 8, temperature=0)[0][0] for prompt in SINGLE[:3]]
    streams = [llama.generate_stream([prompt], 8, temperature=0) for prompt in SINGLE[:3]]
    got = [[next(stream).token] for stream in streams]
    sample = decode_state.DecodeState.sample

    def damage(state: Any, **options: Any) -> Any:
        state.logits[2:] = torch.nan
        return sample(state, **options)

    with monkeypatch.context() as patch:
        patch.setattr(decode_state.DecodeState, "sample", damage)
        got[0] += [next(streams[0]).token for _ in range(4)]
    for i in (1, 0):
        got[i] += [token.token for token in streams[i]]
    assert got[:2] == want[:2]
    assert_raises(lambda: list(streams[2]), NonFiniteError, "prompt 0", "not finite")
    assert [llama.generate([prompt], 8, temperature=0)[0][0] for prompt in SINGLE[:3]] == want


def test_a_stream_may_be_garbage_collected_in_a_thread_that_changes_who_steps(llama: Llama) -> None:
    """Close a stream while this thread holds the mutex, as the garbage collector may do at any allocation."""
    stream = llama.generate_stream(SINGLE[:1], 6, temperature=0)
    next(stream)

    def close_while_held() -> None:
        with llama.engine.shared.turn.mutex:
            stream.close()  # type: ignore[attr-defined]

    thread = threading.Thread(target=close_while_held, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


def test_a_failed_step_raises_in_the_thread_that_ran_it_and_ends_the_other_calls_with_its_cause(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [llama.generate_stream([prompt], 8, temperature=0) for prompt in SINGLE[:2]]
    for stream in streams:
        next(stream)

    def fail(*_: Any) -> None:
        raise MemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(decode_state.DecodeState, "advance", fail)
        with pytest.raises(MemoryError):
            list(streams[0])
    assert_raises(lambda: list(streams[1]), InputError, "generate_stream ended before", "MemoryError: no memory left")
    assert llama.generate(SINGLE[:1], 3, temperature=0)[0] != []


def test_unseeded_sampling_of_a_call_alone_depends_on_torchs_generator_only(llama: Llama) -> None:
    """A stream that is still open changes which random numbers a call gets; once it is closed, the call is alone again."""

    def sample() -> list[list[int]]:
        torch.manual_seed(5)
        return llama.generate(SINGLE[:3], 8, temperature=1.0)[0]

    want = sample()
    stream = llama.generate_stream(SINGLE[4:5], 30, temperature=1.0)
    next(stream)
    sample()
    stream.close()  # type: ignore[attr-defined]
    assert sample() == want


def test_a_call_from_within_a_sampler_is_refused(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    import llama.generation as generation

    def sampler(probs: torch.Tensor, top_p: float) -> torch.Tensor:
        llama.generate([[1, 5]], 2)
        return probs.argmax(-1, keepdim=True)

    monkeypatch.setattr(generation, "sample_top_p", sampler)
    assert_raises(lambda: llama.generate([[1, 9]], 2), InputError, "has called its own model during a step")


def test_a_thread_that_is_interrupted_while_it_waits_leaves_the_others_running(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raise KeyboardInterrupt in a waiting thread, as Ctrl-C does in the main thread."""
    want = llama.generate(SINGLE[:6], 20, temperature=0)[0]
    interrupt = threading.local()
    wait = threading.Condition.wait

    def wait_or_raise(condition: threading.Condition, timeout: float | None = None) -> bool:
        wait(condition, timeout)
        if getattr(interrupt, "now", False):
            raise KeyboardInterrupt
        return True

    def read(i: int) -> list[int]:
        interrupt.now = i % 2 == 1
        try:
            return [token.token for token in llama.generate_stream([SINGLE[i]], 20, temperature=0)]
        except KeyboardInterrupt:
            return want[i]
        finally:
            interrupt.now = False

    start = threading.Barrier(6)
    results: dict[int, list[int]] = {}

    def work(i: int) -> None:
        start.wait()
        results[i] = read(i)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(6)]
    monkeypatch.setattr(threading.Condition, "wait", wait_or_raise)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [results[i] for i in range(6)] == want


def test_nobody_waits_for_a_slow_reader(llama: Llama) -> None:
    """Read one stream slowly in a thread. Meanwhile another thread's calls are answered."""
    slow = llama.generate_stream(SINGLE[:1], 6, temperature=0)
    answered = threading.Event()

    def read_slowly() -> list[int]:
        tokens = []
        for token in slow:
            tokens.append(token.token)
            answered.wait(30)
        return tokens

    def ask() -> list[list[int]]:
        answers = [llama.generate([prompt], 6, temperature=0)[0][0] for prompt in SINGLE[1:5]]
        answered.set()
        return answers

    began = time.monotonic()
    tokens, answers = run_together([read_slowly, ask])
    assert time.monotonic() - began < 25
    assert [tokens, *answers] == [llama.generate([prompt], 6, temperature=0)[0][0] for prompt in SINGLE[:5]]


def test_whole_calls_end_before_a_call_that_takes_the_cache(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Call a `Llama` with the eager backend while whole calls of other threads run on the same model: all answers are right."""
    eager = Llama(llama.model, llama.tokenizer, backend=EagerBackend())
    want = llama.generate(SINGLE[:4], 20, temperature=0)
    score = llama.score(["sea"], [" shore"])
    calls: list[Callable[[], Any]] = [lambda: llama.generate(SINGLE[:4], 20, temperature=0)] * 3
    calls += [lambda: eager.generate(SINGLE[:4], 20, temperature=0), lambda: eager.score(["sea"], [" shore"])]
    results = run_together(calls)
    assert results[:4] == [want] * 4
    assert results[4][0].logprobs == pytest.approx(score[0].logprobs, abs=1e-4)


def test_the_exception_of_a_sampler_ends_the_call_of_its_caller_only(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(probs: torch.Tensor, top_p: float) -> torch.Tensor:
        raise ZeroDivisionError("the sampler's own error")

    want = llama.generate(SINGLE[:1], 20, temperature=0)[0][0]
    stream = llama.generate_stream(SINGLE[:1], 20, temperature=0)
    tokens = [next(stream).token]
    with monkeypatch.context() as patch:
        patch.setattr("llama.generation.sample_top_p", fail)
        with pytest.raises(ZeroDivisionError):
            llama.generate(SINGLE[1:2], 4, temperature=1.0)
    assert [*tokens, *(token.token for token in stream)] == want


def test_a_call_that_an_exception_has_ended_keeps_no_row_while_its_traceback_lives(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = IncrementalText.push

    def interrupt(text: IncrementalText, token: int) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(IncrementalText, "push", interrupt)
    with pytest.raises(KeyboardInterrupt) as kept:
        llama.text_completion(["The"] * 6, max_gen_len=40)
    monkeypatch.setattr(IncrementalText, "push", push)
    with count_forward_tokens() as forwards:
        llama.generate(SINGLE[:1], 3, temperature=0)
    assert kept and forwards == [len(SINGLE[0]), 1, 1]
