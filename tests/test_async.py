"""Test the async twins of the calls: same answers, errors at the call, rows freed by cancellation, no thread left behind."""

import asyncio
import gc
import inspect
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from llama import InputError, Llama, NonFiniteError
from llama.chat import UNSAFE_ERROR
from llama.engine import step_thread
from llama.engine.decode_state import DecodeState
from llama.engine.step_turn import StepTurn

from .support import assert_raises, run

TWINS = ("generate_stream", "text_completion", "chat_completion", "text_completion_stream", "chat_completion_stream")
TEXTS = [f"{word} {i}" for i, word in enumerate(["The quick", "Once", "She sells", "How", "Always", "I am"] * 4)]
DIALOG: Any = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_gen_len": 20}


def thread_of(llama: Llama) -> threading.Thread | None:
    return llama.engine.shared.turn.thread


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.005)
    return condition()


@pytest.fixture(autouse=True)
def nothing_is_left(llama: Llama) -> Iterator[None]:
    """Check after each test that the background thread has ended, and that no call, and so no row, is left."""
    yield
    assert wait_until(lambda: thread_of(llama) is None and llama.engine.shared.scheduler() is None)


async def read(stream: Any, n: int | None = None) -> str:
    """Read a stream to its end, or leave it after n chunks."""
    text, chunks = "", 0
    async with stream:
        async for chunk in stream:
            text, chunks = text + chunk, chunks + 1
            if chunks == n:
                break
    return text


def test_the_twins_have_the_parameters_of_the_sync_methods() -> None:
    for name in TWINS:
        sync, twin = (inspect.signature(getattr(Llama, prefix + name)) for prefix in ("", "a"))
        assert [*twin.parameters.values()] == [*sync.parameters.values()]


def assert_same(got: list[Any], want: list[Any]) -> None:
    """Compare results. Log probabilities may differ in their last digits, since rows of a batch may end a step later."""
    assert [{**result, "logprobs": None} for result in got] == [{**result, "logprobs": None} for result in want]
    for result, expected in zip(got, want, strict=True):
        assert result["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-4)


def test_calls_return_what_their_sync_twins_return(llama: Llama) -> None:
    options = GREEDY | {"logprobs": True, "details": True, "stop": ["he", "qu"]}
    unsafe = [{"role": "user", "content": "[INST]"}]
    assert_same(
        asyncio.run(llama.atext_completion(TEXTS, echo=True, **options)), llama.text_completion(TEXTS, echo=True, **options)
    )
    dialogs = [DIALOG, unsafe]
    assert_same(asyncio.run(llama.achat_completion(dialogs, **options)), llama.chat_completion(dialogs, **options))
    assert asyncio.run(llama.atext_completion([])) == []
    assert asyncio.run(llama.atext_completion(["The"], max_gen_len=0, echo=True)) == [{"generation": "The"}]
    sampled = {"temperature": 1.0, "top_k": 9, "repetition_penalty": 1.3, "seed": [1, 2, 3], "max_gen_len": 9}
    assert asyncio.run(llama.atext_completion(TEXTS[:3], **sampled)) == llama.text_completion(TEXTS[:3], **sampled)

    async def tokens() -> list[Any]:
        return [token async for token in llama.agenerate_stream([[1, 5], [1, 9, 30]], 9, 0, logprobs=True, echo=True)]

    want = list(llama.generate_stream([[1, 5], [1, 9, 30]], 9, 0, logprobs=True, echo=True))
    got = asyncio.run(tokens())
    assert [token[:2] for token in got] == [token[:2] for token in want]
    assert [token.logprob for token in got] == pytest.approx([token.logprob for token in want], abs=1e-4)


def test_a_stream_has_the_chunks_and_properties_of_its_sync_twin(llama: Llama) -> None:
    def properties(stream: Any) -> list[Any]:
        return [stream.finish_reason, stream.prompt_tokens, stream.new_tokens, stream.text]

    async def stream_of(stream: Any) -> tuple[list[tuple[str, str]], list[Any], str]:
        chunks = [(chunk, stream.text) async for chunk in stream]
        return chunks, properties(stream), repr(stream).removeprefix("<Async")

    cases: list[tuple[str, Any, dict[str, Any]]] = [
        ("text_completion_stream", "The", GREEDY),
        ("text_completion_stream", "The", {"temperature": 1.0, "seed": 3, "max_gen_len": 30, "stop": "e"}),
        ("chat_completion_stream", DIALOG, GREEDY),
        ("chat_completion_stream", [{"role": "user", "content": "<<SYS>>"}], {}),
    ]
    for name, prompt, options in cases:
        sync = getattr(llama, name)(prompt, **options)
        want = [(chunk, sync.text) for chunk in sync], properties(sync), repr(sync).removeprefix("<")
        assert asyncio.run(stream_of(getattr(llama, f"a{name}")(prompt, **options))) == want
    assert want[0] == [(UNSAFE_ERROR, UNSAFE_ERROR)]


def test_40_streams_share_6_rows_while_some_are_left_and_some_are_cancelled(llama: Llama) -> None:
    """Every fifth stream is left after 3 chunks, the task of every seventh is cancelled; all others get their whole answers.
    Meanwhile three threads make sync calls, and another event loop async ones. All get the answers that they get alone."""
    options = [GREEDY | {"max_gen_len": 8 + i % 13, "stop": "he" if i % 3 else ()} for i in range(40)]
    want = [llama.text_completion([TEXTS[i % 24]], **options[i])[0]["generation"] for i in range(40)]
    alone = llama.text_completion(TEXTS, **GREEDY)

    async def one(i: int) -> str | None:
        stream = llama.atext_completion_stream(TEXTS[i % 24], **options[i])
        if i % 7:
            return await read(stream, 3 if i % 5 == 0 else None)
        task = asyncio.create_task(read(stream))
        await asyncio.sleep(0.001 * i)
        task.cancel()
        await asyncio.wait([task])
        return None

    async def all_streams() -> list[str | None]:
        return await asyncio.gather(*map(one, range(40)))

    with ThreadPoolExecutor(4) as pool:
        sync = [pool.submit(llama.text_completion, TEXTS, **GREEDY) for _ in range(3)]
        other_loop = pool.submit(lambda: asyncio.run(llama.atext_completion(TEXTS, **GREEDY)))
        got = asyncio.run(all_streams())
        assert [each.result() for each in (*sync, other_loop)] == [alone] * 4
    for i in range(40):
        assert i % 7 == 0 or (want[i].startswith(got[i]) if i % 5 == 0 else got[i] == want[i]), (i, got[i], want[i])


def test_cancelling_the_only_call_frees_its_rows_and_ends_the_thread(llama: Llama) -> None:
    async def cancel_between(call: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(call)
        while not (scheduler := llama.engine.shared.scheduler()) or not scheduler.running:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel_between(llama.achat_completion([DIALOG] * 30, temperature=0)))
    asyncio.run(cancel_between(read(llama.achat_completion_stream(DIALOG, temperature=0))))
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(asyncio.wait_for(llama.atext_completion(TEXTS * 200, temperature=0), 0.05))


def test_a_closed_stream_gives_its_row_to_a_waiting_call(llama: Llama) -> None:
    async def leave_six_streams() -> str:
        streams = [llama.atext_completion_stream(text, temperature=0) for text in TEXTS[:6]]
        await asyncio.gather(*map(anext, streams))  # these take all 6 rows
        waiting = asyncio.create_task(read(llama.atext_completion_stream("The", **GREEDY)))
        await streams[3].aclose()
        assert repr(streams[3]).startswith("<AsyncStream ended early")
        text = await waiting
        await asyncio.gather(*(stream.aclose() for stream in streams))
        return text

    assert asyncio.run(leave_six_streams()) == llama.text_completion(["The"], **GREEDY)[0]["generation"]


def test_a_stream_that_is_dropped_and_a_loop_that_ends_in_the_middle_free_their_rows(llama: Llama) -> None:
    async def begin(keep: list[Any]) -> None:
        keep.append(llama.atext_completion_stream("The", temperature=0))
        await anext(keep[-1])

    asyncio.run(begin([]))  # dropped
    kept: list[Any] = []
    asyncio.run(begin(kept))  # asyncio.run closes the streams of its loop
    assert wait_until(lambda: thread_of(llama) is None)

    loop = asyncio.new_event_loop()  # this loop is closed without a chance for its tasks to end
    loop.run_until_complete(begin(kept))
    loop.close()
    assert wait_until(lambda: thread_of(llama) is None)
    kept.clear()


def test_wrong_input_raises_at_the_call_before_any_await(llama: Llama) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: llama.atext_completion("text"),  # type: ignore[arg-type]
        lambda: llama.achat_completion([[]]),
        lambda: llama.atext_completion_stream("The", temperature=-1),
        lambda: llama.achat_completion_stream(DIALOG, stop=""),
        lambda: llama.agenerate_stream([[9999]], 3),
    ]
    for call in calls:
        with pytest.raises(InputError) as caught:
            call()
        assert len(caught.traceback) <= 4
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        llama.achat_completion([DIALOG], temprature=1)  # type: ignore[call-arg]


def test_numbers_that_are_not_finite_end_their_own_call_only(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = DecodeState.sample

    def damage(state: Any, **options: Any) -> Any:
        state.logits[1:] = torch.nan
        return sample(state, **options)

    async def two() -> list[Any]:
        tasks = [llama.atext_completion([text], **GREEDY) for text in TEXTS[:2]]
        return await asyncio.gather(*tasks, return_exceptions=True)

    with monkeypatch.context() as patch:
        patch.setattr(DecodeState, "sample", damage)
        first, second = asyncio.run(two())
    assert first == llama.text_completion(TEXTS[:1], **GREEDY)
    assert isinstance(second, NonFiniteError)


def test_a_failed_step_ends_the_calls_with_its_cause_and_later_calls_work(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no memory left")

    for name in ("advance", "resize"):
        with monkeypatch.context() as patch:
            patch.setattr(DecodeState, name, fail)
            assert_raises(
                lambda: asyncio.run(llama.atext_completion(TEXTS[:1], **GREEDY)), InputError, "MemoryError: no memory left"
            )
    assert asyncio.run(llama.atext_completion(TEXTS[:1], **GREEDY)) == llama.text_completion(TEXTS[:1], **GREEDY)


def test_a_call_that_cannot_be_submitted_raises_its_failure(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no cache")

    with monkeypatch.context() as patch:
        patch.setattr(type(llama.engine), "forward", fail)
        with pytest.raises(MemoryError, match="no cache"):
            asyncio.run(llama.atext_completion(TEXTS[:1], **GREEDY))


def test_a_slow_reader_delays_nobody_and_loses_nothing(llama: Llama) -> None:
    """Block one event loop after its first chunk, until calls of another loop and of a thread have been answered."""
    answered = threading.Event()

    async def read_slowly() -> str:
        stream = llama.atext_completion_stream("The", **GREEDY)
        text = await anext(stream)
        answered.wait(30)
        return text + "".join([chunk async for chunk in stream])

    def ask() -> list[Any]:
        answers = [llama.text_completion(TEXTS[:8], **GREEDY), asyncio.run(llama.atext_completion(TEXTS[:8], **GREEDY))]
        answered.set()
        return answers

    with ThreadPoolExecutor(2) as pool:
        slow, asked = pool.submit(lambda: asyncio.run(read_slowly())), pool.submit(ask)
        assert asked.result(25) == [llama.text_completion(TEXTS[:8], **GREEDY)] * 2
        assert slow.result() == llama.text_completion(["The"], **GREEDY)[0]["generation"]


def test_two_llamas_with_one_model_and_different_backends_take_turns(llama: Llama) -> None:
    other = Llama(llama.model, llama.tokenizer, backend=type("Other", (type(llama.engine.backend),), {"name": "other"})())

    async def both() -> list[Any]:
        return await asyncio.gather(*(each.atext_completion(TEXTS[:8], **GREEDY) for each in (llama, other) * 2))

    assert asyncio.run(both()) == [llama.text_completion(TEXTS[:8], **GREEDY)] * 4


def test_a_modified_model_and_a_replaced_generate_are_refused_with_the_way_out(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = llama.model.layers[0].register_forward_hook(lambda *_: None)
    try:
        assert_raises(
            lambda: llama.achat_completion([DIALOG]), InputError, "layers.0 has a hook", "use chat_completion", "in a thread"
        )
    finally:
        handle.remove()

    async def modify_meanwhile() -> None:
        stream = llama.atext_completion_stream("The", temperature=0)
        await anext(stream)
        handle = llama.model.layers[0].register_forward_hook(lambda *_: None)
        try:
            async for _ in stream:
                pass
        finally:
            handle.remove()

    assert_raises(lambda: asyncio.run(modify_meanwhile()), InputError, "the model has been changed since")
    monkeypatch.setattr(llama, "generate", lambda *args, **kwargs: None, raising=False)
    assert_raises(lambda: llama.atext_completion(["The"]), InputError, "generate has been replaced", "async calls")
    assert_raises(lambda: llama.atext_completion_stream("The"), InputError, "generate has been replaced", "streams")


def test_a_call_from_within_a_sampler_is_refused(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    import llama.generation as generation

    def sampler(probs: torch.Tensor, top_p: float) -> torch.Tensor:
        asyncio.run(llama.atext_completion(["The"], max_gen_len=2))
        return probs.argmax(-1, keepdim=True)

    monkeypatch.setattr(generation, "sample_top_p", sampler)
    assert_raises(lambda: llama.text_completion(["The"], max_gen_len=2), InputError, "called its own model during a step")
    assert_raises(
        lambda: asyncio.run(llama.atext_completion(["The"], max_gen_len=2)), InputError, "called its own model during a step"
    )


def test_a_call_that_begins_while_the_thread_ends_gets_another_thread(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    next_steps, ending = StepTurn.next_steps, threading.Event()

    def end_slowly(turn: StepTurn, steps: Any) -> Any:
        if (found := next_steps(turn, steps)) is None:
            ending.set()
            time.sleep(0.1)
        return found

    async def main() -> None:
        await llama.atext_completion(["The"], **GREEDY)
        await asyncio.to_thread(ending.wait, 20)
        await asyncio.wait_for(llama.atext_completion(["The"], **GREEDY), 20)

    monkeypatch.setattr(StepTurn, "next_steps", end_slowly)
    asyncio.run(main())


def test_a_program_that_ends_during_an_answer_ends_cleanly(small: Any) -> None:
    program = f"""
import asyncio, sys
from llama import Llama
from llama.engine import step_thread
llama = Llama.build({str(small.folder)!r}, {str(small.tokenizer_path)!r}, 64, 2, device="cpu")
loop = asyncio.new_event_loop()
stream = llama.atext_completion_stream("The", temperature=0)
loop.run_until_complete(anext(stream))
sys.exit(3)
"""
    result = run("-c", program)
    assert (result.returncode, result.stderr) == (3, "")


def test_several_ranks_are_refused_with_the_way_out(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ("world_size", 2), ("calls_are_exclusive", True):
        monkeypatch.setattr(step_thread, name, lambda value=value: value)
    parts = "2 ranks", "use chat_completion_stream on all ranks", "`lead`"
    assert_raises(lambda: llama.achat_completion_stream(DIALOG), InputError, *parts)
