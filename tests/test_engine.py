"""The loop: any number of prompts, each answer as if alone, what it costs, what it leaves behind."""

import itertools
import random
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llama import InputError, Llama, SamplingParams, tuning
from llama.backends import cpu
from llama.backends.cuda_graphs import CudaGraphsBackend
from llama.engine import decode_state, engine, scheduler
from llama.engine.forward import EngineForward, EngineLayer
from llama.engine.kv_cache import KVCache, RaggedBatch
from llama.engine.requests import GenerationCall, Request

from .counting import counted

GREEDY = SamplingParams(0)
PROMPTS = [[1, *range(7 * i + 5, 7 * i + 6 + i % 5)] for i in range(20)]  # 2 to 6 ids


@pytest.fixture
def rows(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many rows run at a time, 6 at most."""
    return lambda n: monkeypatch.setattr(llama.model.params, "max_batch_size", n)


def alone(llama: Llama, prompts: list[list[int]], **options: Any) -> tuple[list, list]:
    """The slow twin: each prompt in a call of its own."""
    answers = [llama.generate([prompt], 14, logprobs=True, **options) for prompt in prompts]
    return [ids[0] for ids, _ in answers], [values[0] for _, values in answers if values]


def agree(got: tuple[list, list | None], want: tuple[list, list]) -> None:
    assert got[0] == want[0]
    for mine, theirs in zip(got[1] or [], want[1], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("limit", [1, 3, 6])
@pytest.mark.parametrize("late", [False, True])
def test_any_number_of_prompts_answers_as_each_alone(
    llama: Llama, rows: Callable, limit: int, late: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Some end by EOS, the others at 14; one fills the window and gets none. Also with late reading, where a row that has
    ended has one step too many before the next takes its slot."""
    prompts = [*PROMPTS, [1, *range(100, 163)], *PROMPTS[:3]]
    free, _ = alone(llama, prompts, temperature=0)
    monkeypatch.setattr(llama.tokenizer, "eos_id", statistics.mode(itertools.chain(*free)))
    want = alone(llama, prompts, temperature=0)
    assert len({len(ids) for ids in want[0]}) > 4
    if late:
        request.getfixturevalue("as_on_cuda")
    rows(limit)
    agree(llama.generate(prompts, 14, temperature=0, logprobs=True), want)
    echoed, values = llama.generate(prompts, 14, temperature=0, logprobs=True, echo=True)
    assert echoed == [p + ids for p, ids in zip(prompts, want[0], strict=True)]
    agree((want[0], [v[len(p) :] for p, v in zip(prompts, values or [], strict=True)]), want)
    assert llama.generate(prompts, 14, temperature=0, echo=True)[0] == echoed


def test_a_free_slot_is_taken_at_once(llama: Llama) -> None:
    """64 prompts, answers of 4 to 40 ids, 6 rows: steps and forwards counted, against an account of it on paper, and
    against fixed waves, which take as many steps as the longest answer of each has ids."""
    lengths = [round(4 * 10 ** (i / 63)) for i in range(64)]
    random.Random(0).shuffle(lengths)
    requests = [Request(PROMPTS[i % 20] + [200], n) for i, n in enumerate(lengths)]
    with counted() as forwards:
        order = [token.prompt_index for token in llama.engine.run(GenerationCall(requests, GREEDY), eos_id=-1)]
    assert [order.count(row) for row in range(64)] == lengths == [r.num_new_tokens for r in requests]
    assert {r.finish_reason for r in requests} == {"length"}

    left, waiting, expected = [0] * 6, list(range(64)), []
    while any(left) or waiting:
        free = [slot for slot in range(6) if not left[slot]][: len(waiting)]
        entering, waiting = waiting[: len(free)], waiting[len(free) :]
        for slot, row in zip(free, entering, strict=True):
            left[slot] = lengths[row]
        expected += [sum(len(requests[row].prompt) for row in entering)] * bool(entering)
        left = [max(n - 1, 0) for n in left]
        expected += [6] * any(left)
    assert forwards == expected
    waves = sum(max(lengths[i : i + 6]) for i in range(0, 64, 6))  # forwards: the prompts' one gives the first id
    assert waves / len(forwards) > 1.5, (waves, len(forwards))


def test_a_long_batch_shows_how_many_are_answered(llama: Llama, rows: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: dict[str, int] = {}

    def progress(items: list, weigh: Callable, label: str, unit: str) -> Iterator:
        for item in items:
            yield item
            bars[label] = bars.get(label, 0) + weigh(item)

    monkeypatch.setattr(scheduler, "progress", progress)
    monkeypatch.setattr(engine, "progress", progress)
    llama.generate(PROMPTS[:6], 3, temperature=0)
    assert bars == {"reading prompts": sum(map(len, PROMPTS[:6]))}
    bars.clear()
    rows(3)
    llama.generate([*PROMPTS, [1] * 64], 3, temperature=0)
    assert bars == {"answering": 21}


# --- seeds -----------------------------------------------------------------------------------------------------------

HOT = dict(temperature=1.0, top_p=0.95)


@pytest.mark.parametrize("late", [False, True])
def test_a_seed_decides_alone(llama: Llama, rows: Callable, late: bool, request: pytest.FixtureRequest) -> None:
    """Whatever ran before, whatever else is in the batch, whatever the batch's limit."""
    seeds = [*range(-3, 17)]
    want = [llama.generate([p], 14, seed=s, **HOT)[0][0] for p, s in zip(PROMPTS, seeds, strict=True)]
    if late:
        request.getfixturevalue("as_on_cuda")
    for limit, skip in ((6, 0), (4, 3), (1, 17)):
        rows(limit)
        torch.manual_seed(limit)
        state = torch.get_rng_state()
        assert llama.generate(PROMPTS[skip:], 14, seed=seeds[skip:], **HOT)[0] == want[skip:]
        assert torch.equal(torch.get_rng_state(), state)  # nor does it change what others draw
        llama.generate(PROMPTS[:2], 3, **HOT)


def test_one_seed_serves_all_prompts_and_several_make_several_answers(llama: Llama) -> None:
    one = llama.generate(PROMPTS[:1], 14, seed=5, **HOT)[0][0]
    assert llama.generate([PROMPTS[3], PROMPTS[0]], 14, seed=5, **HOT)[0][1] == one
    several = llama.generate(PROMPTS[:1] * 8, 14, seed=range(8), **HOT)[0]
    assert several[5] == one and len({tuple(ids) for ids in several}) == 8
    assert llama.generate(PROMPTS[:2], 14, temperature=0, seed=5) == llama.generate(PROMPTS[:2], 14, temperature=0)
    assert llama.generate(PROMPTS[:1], 5, seed=2**64 - 1, **HOT) == llama.generate(PROMPTS[:1], 5, seed=-1, **HOT)


def test_more_prompts_than_rows_draw_without_a_seed_too(llama: Llama, rows: Callable) -> None:
    rows(4)

    def draw(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return llama.generate(PROMPTS, 14, **HOT)[0]

    assert draw(3) == draw(3) != draw(4)


def test_penalized_rows_hold_their_own_ids(llama: Llama, rows: Callable) -> None:
    """Prompt's and answer's, and none of the row that had the slot before. So large a penalty forbids repetition."""
    options = dict(temperature=0, repetition_penalty=100.0)
    want = alone(llama, PROMPTS, **options)
    rows(3)
    agree(llama.generate(PROMPTS, 14, logprobs=True, **options), want)
    for prompt, ids in zip(PROMPTS, want[0], strict=True):
        assert len({*prompt, *ids}) == len(set(prompt)) + len(ids)
    assert any(len(set(ids)) < len(ids) for ids in alone(llama, PROMPTS, temperature=0)[0])


# --- what stays between calls ----------------------------------------------------------------------------------------


def turn(llama: Llama, ids: list[int], most: int, reuse: bool = True, stop: int | None = None) -> tuple[list[int], list[float]]:
    """One row's new ids and log probabilities; left after `stop` ids."""
    stream = llama.engine.run(GenerationCall([Request(ids, most)], GREEDY, logprobs=True, reuse=reuse), -1)
    new = list(itertools.islice(stream, stop))
    stream.close()
    return [t.token for t in new], [t.logprob or 0.0 for t in new]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("left", [None, 3])
def test_a_turn_computes_only_what_is_new(llama: Llama, late: bool, left: int | None, request: pytest.FixtureRequest) -> None:
    """A dialog that grows, an answer that is left early, and one that is said anew; logits as if from scratch."""
    if late:
        request.getfixturevalue("as_on_cuda")
    llama.engine.shared.cache = KVCache.adopt(llama.model)
    ids, written = [1, 5, 9, 30, 8], 0
    for more in ([44, 45, 46], [7], [50, 51, 52, 53]):
        with counted() as forwards:
            new, values = turn(llama, ids, 6, stop=left)
        assert forwards[0] == len(ids) - written
        written = len(ids) + len(new) - 1
        want, expected = turn(llama, ids, 6, reuse=False, stop=left)
        assert new == want and values == pytest.approx(expected, abs=1e-4)
        turn(llama, ids, 6, stop=left)  # another call has forgotten it
        ids = ids + new + more
    with counted() as forwards:
        same = turn(llama, ids[:10], 4)
    assert forwards[0] == 1 and same[0] == turn(llama, ids[:10], 4, reuse=False)[0]  # all but the last id are there
    turn(llama, ids, 1)
    with counted() as forwards:
        assert turn(llama, [*ids[:7], 99, *ids[8:]], 2)[1] != [] and forwards[0] == len(ids) - 7


@pytest.mark.parametrize("use", ["generate", "forward", "layer's cache", "another cache", "changed model", "stream"])
def test_any_other_use_of_the_cache_forgets(llama: Llama, use: str) -> None:
    want = turn(llama, PROMPTS[4], 4, reuse=False)
    turn(llama, PROMPTS[4], 4)
    if use == "generate":
        llama.generate([[1, 9]], 2, temperature=0)
    elif use == "forward":
        llama.model.forward(torch.tensor([[1, 9]]), 0)
    elif use == "layer's cache":  # written by the caller
        llama.model.layers[1].attention.cache_v[0, 2] = 7
    elif use == "another cache":
        attention = llama.model.layers[1].attention
        attention.cache_k = attention.cache_k.clone()
    elif use == "changed model":
        hook = llama.model.register_forward_hook(lambda *_: None)
        llama.generate([[1, 9]], 2, temperature=0)
        hook.remove()
    else:
        next(llama.generate_stream([[1, 9]], 2, temperature=0))
    with counted() as forwards:
        got = turn(llama, PROMPTS[4], 4)
    assert got[0] == want[0] and forwards[0] == len(PROMPTS[4])


# --- faults ----------------------------------------------------------------------------------------------------------


class Fault(Exception):
    pass


def failing(call: Callable, at: int) -> Callable:
    """The call, which fails the `at`-th time, after its work."""
    times = itertools.count(1)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        if next(times) == at:
            raise Fault
        return result

    return wrapped


@pytest.mark.parametrize("where", ["a layer", "prefill", "step", "choice", "text", "consumer"])
@pytest.mark.parametrize("late", [False, True])
def test_a_failed_call_leaves_no_trace(
    llama: Llama, rows: Callable, where: str, late: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Of batches in more rows than fit and of a stream with reuse: the next calls answer as before."""
    rows(2)
    texts = ["Once upon", "a time", "there was", "a bear"]

    def stream() -> str:
        return "".join(llama.text_completion_stream("Once upon a time", 0, max_gen_len=12, reuse=True))

    def batch() -> list:
        return llama.text_completion(texts, max_gen_len=8, seed=3, stop="qq", repetition_penalty=1.1)

    want = batch(), stream(), stream()
    if late:
        request.getfixturevalue("as_on_cuda")
    for call, at in ((batch, 3), (stream, 1), (stream, 2)):
        cache = llama.engine.forward().cache
        cache.prefix_tokens = None
        cache.data.zero_()  # no right keys and values from before
        if where == "consumer":
            with pytest.raises(Fault):
                for _ in llama.text_completion_stream("Once upon a time", 0, max_gen_len=12, reuse=True):
                    raise Fault
        else:
            target, name = {
                "a layer": (EngineLayer, "swiglu"),
                "prefill": (llama.engine, "prefill"),
                "step": (CudaGraphsBackend, "take") if late else (cpu, "decode_layerwise"),
                "choice": (decode_state, "sample"),
                "text": (llama.tokenizer.sp_model, "is_byte"),
            }[where]
            at = {"prefill": 1, "a layer": 2 * at - 1}.get(where, at)  # of two layers
            with monkeypatch.context() as patch:
                patch.setattr(target, name, failing(getattr(target, name), at))
                with pytest.raises(Fault):
                    call()
        assert (stream(), batch(), stream()) == (want[1], want[0], want[2])


def test_a_stream_overtaken_while_prompts_wait_says_so(llama: Llama, rows: Callable) -> None:
    rows(2)
    stream = llama.generate_stream(PROMPTS, 1, temperature=0)
    assert [next(stream).prompt_index, next(stream).prompt_index] == [0, 1]
    llama.generate([[1, 9]], 2, temperature=0)
    with pytest.raises(InputError, match="another call"):
        next(stream)


def test_as_many_steps_as_ids_need(llama: Llama, as_on_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is launched whose logits nobody could want."""
    steps: list[int] = []
    take = CudaGraphsBackend.take
    monkeypatch.setattr(CudaGraphsBackend, "take", lambda self, *args: (steps.append(1), take(self, *args))[1])
    run = llama.engine.run(GenerationCall([Request([1, 5], 8)], GREEDY), eos_id=-1)
    assert len(list(run)) == 8 and len(steps) == 7


def test_the_prompt_s_first_id_is_penalized_too(llama: Llama) -> None:
    prompts = [[x, 5] for x in range(3, 300)]
    free = llama.generate(prompts, 16, 0)[0]
    prompt = next(p for p, ids in zip(prompts, free, strict=True) if p[0] in ids)
    assert prompt[0] not in llama.generate([prompt], 16, 0, repetition_penalty=100.0)[0][0]


def test_prompts_are_cut_where_blocks_end(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "PREFILL_CHUNK", 24)
    monkeypatch.setattr(tuning, "ATTENTION_CHUNK", 8)
    seen: list[RaggedBatch] = []
    hidden = EngineForward.hidden_states

    def seeing(self: EngineForward, tokens: torch.Tensor, batch: RaggedBatch, *args: Any, **options: Any) -> torch.Tensor:
        seen.append(batch)
        return hidden(self, tokens, batch, *args, **options)

    monkeypatch.setattr(EngineForward, "hidden_states", seeing)
    llama.generate([[1, *range(20, 40)], [1, *range(50, 61)]], 1, 0)
    segments = [segment for batch in seen for segment in batch.segments]
    assert len(seen) == 2 and all(segment.kv_len % 8 == 0 or segment.kv_len in (21, 12) for segment in segments)
