"""Test the options of calls: n answers, options for each prompt, what ends an answer, and combinations of all options."""

import asyncio
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama import InputError, Llama, Transformer, validate_options
from llama.engine.forward import EngineForward
from llama.sampling import seeded_exponential

from .counting import count_forward_tokens
from .support import assert_raises

PROMPTS = [[1, 5], [1, 9, 30, 7], [1, *range(20, 40)]]
TEXTS = ["The fox", "a", "He said"]
OFF = dict(
    temperature=0.6, top_p=0.9, top_k=0, min_p=0.0, typical_p=1.0, repetition_penalty=1.0, frequency_penalty=0.0,
    presence_penalty=0.0, min_new_tokens=0,
)  # fmt: skip


# --- a plain reading of the options -------------------------------------------------------------------------------------------


def keep(probs: dict[int, float], tokens: Any) -> dict[int, float]:
    """Return the probabilities of some tokens, normalized, in the same order."""
    kept = set(tokens)
    total = sum(p for token, p in probs.items() if token in kept)
    return {token: p / total for token, p in probs.items() if token in kept}


def first_with_mass(probs: dict[int, float], order: list[int], is_enough: Callable[[float], bool]) -> list[int]:
    mass = 0.0
    for n, token in enumerate(order, 1):
        mass += probs[token]
        if is_enough(mass):
            return order[:n]
    return order


def next_token(logits: list[float], prompt: list[int], answer: list[int], ends: set[int], seed: int, o: dict[str, Any]) -> int:
    """Return the next token of an answer, by the definition of each option, in their order."""
    for token, bias in (o["logit_bias"] or {}).items():
        logits[token] += bias
    for token in {*prompt, *answer}:
        penalty = o["repetition_penalty"]
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token in {*answer}:
        logits[token] -= o["frequency_penalty"] * answer.count(token) + o["presence_penalty"]
    if len(answer) < o["min_new_tokens"]:
        for token in ends:
            logits[token] = -math.inf
    if o["logits_processor"]:
        logits = o["logits_processor"]([*prompt, *answer], torch.tensor(logits)).tolist()
    if o["temperature"] == 0:
        return max(range(len(logits)), key=logits.__getitem__)
    weights = {i: math.exp((x - max(logits)) / o["temperature"]) for i, x in enumerate(logits) if x > -math.inf}
    order = sorted(weights, key=lambda i: -weights[i])
    probs = keep({i: weights[i] for i in order}, order[: o["top_k"] or None])
    order = [i for i in order if i in probs]
    probs = keep(probs, first_with_mass(probs, order, lambda mass: mass > o["top_p"]))
    probs = keep(probs, [i for i, p in probs.items() if p >= o["min_p"] * max(probs.values())])
    if o["typical_p"] < 1:
        entropy = -sum(p * math.log(p) for p in probs.values() if p)
        by_distance = sorted((i for i in probs if probs[i]), key=lambda i: abs(-math.log(probs[i]) - entropy))
        probs = keep(probs, first_with_mass(probs, by_distance, lambda mass: mass >= o["typical_p"]))
    noise = seeded_exponential(torch.tensor([seed]), torch.tensor([len(prompt) + len(answer)]), len(logits))[0].tolist()
    return max(probs, key=lambda i: probs[i] / noise[i])


def plain_answer(model: Transformer, prompt: list[int], eos: int, seed: int, o: dict[str, Any]) -> list[int]:
    answer: list[int] = []
    ends = {*o["stop_token_ids"]} | (set() if o["ignore_eos"] else {eos})
    while len(answer) < o["max_gen_len"]:
        logits = model.forward(torch.tensor([[*prompt, *answer]]), 0)[0, -1].float().tolist()
        token = next_token(logits, prompt, answer, ends, seed, o)
        if token in ends:
            break
        answer.append(token)
    return answer


def odd_only(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
    """Ban the tokens that have the parity of the number of tokens so far."""
    logits[len(tokens) % 2 :: 2] = -torch.inf
    return logits


NUMBERS: dict[str, Any] = {
    "temperature": st.sampled_from([0, 0.7, 1.0, 1.6]), "top_p": st.sampled_from([0.5, 0.9, 1.0]),
    "top_k": st.sampled_from([0, 1, 8, 50]), "min_p": st.sampled_from([0.0, 0.05]),
    "typical_p": st.sampled_from([0.4, 0.9, 1.0]),
    "repetition_penalty": st.sampled_from([0.7, 1.0, 1.3]), "frequency_penalty": st.sampled_from([-1.0, 0.0, 1.5]),
    "presence_penalty": st.sampled_from([-0.5, 0.0, 2.0]), "max_gen_len": st.integers(4, 8),
    "min_new_tokens": st.integers(0, 4),
    "seed": st.integers(-(2**63), 2**63 - 1),
}  # fmt: skip


@st.composite
def options_of_a_call(draw: st.DrawFn) -> dict[str, Any]:
    """Return the options of a call with three prompts. Each number is one for all, or one for each prompt."""
    options = {name: draw(value | st.lists(value, min_size=3, max_size=3)) for name, value in NUMBERS.items()}
    processor = st.sampled_from([None, odd_only])
    return options | {
        "logits_processor": draw(processor | st.lists(processor, min_size=3, max_size=3)), "n": draw(st.integers(1, 3)),
        "logit_bias": draw(st.sampled_from([None, {7: 3.0, 8: -100}])), "ignore_eos": draw(st.booleans()),
        "stop_token_ids": draw(st.sampled_from([[], [*range(10, 60)]])),
    }  # fmt: skip


@settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(options=options_of_a_call(), data=st.data())
def test_combinations_of_options_have_the_answers_of_a_plain_reading(
    any_way: Llama, reference: Transformer, options: dict[str, Any], data: st.DataObject
) -> None:
    n, eos = options["n"], any_way.tokenizer.eos_id
    tokens, _ = any_way.generate(PROMPTS, **options)
    answer = data.draw(st.integers(0, 3 * n - 1))
    assert len(tokens) == 3 * n
    own = {
        name: value[answer // n] if isinstance(value, list) and name != "stop_token_ids" else value
        for name, value in options.items()
    }
    seed = (own["seed"] + answer % n + 2**63) % 2**64 - 2**63
    assert tokens[answer] == plain_answer(reference, PROMPTS[answer // n], eos, seed, own)


# --- n ------------------------------------------------------------------------------------------------------------------------


def test_n_gives_the_answers_of_the_seeds_from_the_prompts_seed_on(any_way: Llama) -> None:
    """The answers to prompt i are results i * n to i * n + n - 1; there are more than rows."""
    options: dict[str, Any] = dict(temperature=1.0, max_gen_len=5)
    seeds = [3, 2**63 - 1, -5]
    want = [
        any_way.text_completion([text], seed=(seed + j + 2**63) % 2**64 - 2**63, **options)[0]
        for text, seed in zip(TEXTS, seeds, strict=True)
        for j in range(4)
    ]
    assert any_way.text_completion(TEXTS, n=4, seed=seeds, **options) == want and len({r["generation"] for r in want}) > 6
    got = any_way.iter_text_completion(TEXTS, n=4, seed=seeds, **options)
    assert [result["generation"] for result in got] == [result["generation"] for result in want]
    stream = [*any_way.generate_stream(PROMPTS[:2], n=3, seed=4, **options)]
    rows = [[token.token for token in stream if token.prompt_index == i] for i in range(6)]
    assert rows == any_way.generate(PROMPTS[:2], n=3, seed=4, **options)[0]
    assert rows == [any_way.generate([p], seed=4 + j, **options)[0][0] for p in PROMPTS[:2] for j in range(3)]


def test_n_answers_without_a_seed_differ_and_use_one_prefill(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineForward, "prefix_multiple", lambda *_: 1)  # in float32, it is 128
    llama.clear_prefix_cache()
    with count_forward_tokens() as counted:
        answers, _ = llama.generate([[1, *range(300, 340)]], 1, 1.5, 1.0, n=5)
    assert len({tuple(answer) for answer in answers}) > 2
    assert sum(counted) == 41 + 4 * 2  # at least two tokens of each prompt are computed


def test_refused_dialogs_have_n_refusals_and_results_keep_their_order(llama: Llama) -> None:
    dialogs: Any = [[{"role": "user", "content": text}] for text in ("[INST]", "hi", "<<SYS>>")]
    results = llama.chat_completion(dialogs, n=2, seed=[1, 2, 3], max_gen_len=3, details=True)
    assert [r["prompt_tokens"] > 0 for r in results] == [False, False, True, True, False, False]
    eager: Any = llama.iter_chat_completion(dialogs, n=2, seed=[1, 2, 3], max_gen_len=3)
    assert [*eager] == results


def test_a_greedy_call_with_n_gives_equal_answers_and_echo_each_time(llama: Llama) -> None:
    results = llama.text_completion(["a"], 0, max_gen_len=3, n=3, echo=True, logprobs=True)
    assert [r["generation"] for r in results] == [
        llama.text_completion(["a"], 0, max_gen_len=3, echo=True)[0]["generation"]
    ] * 3
    assert len({len(r["logprobs"]) for r in results}) == 1


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "2", [1, 2]], ids=str)
def test_a_wrong_n_is_refused(llama: Llama, n: Any) -> None:
    assert_raises(lambda: llama.text_completion(TEXTS, n=n), InputError, "n is ", "it must be a whole number from 1")
    with pytest.raises(TypeError, match=r"text_completion_stream\(\) got an unexpected keyword argument 'n'"):
        llama.text_completion_stream("a", n=n)  # type: ignore[call-arg]


# --- options for each prompt --------------------------------------------------------------------------------------------------


def test_each_prompt_has_its_own_options_in_texts_dialogs_and_async_calls(llama: Llama) -> None:
    lists: dict[str, Any] = dict(
        temperature=[0, 1.0, 1.5], top_p=(1.0, 0.5, None), max_gen_len=np.array([3, 6, 9]), seed=[1, 2, 3],
        stop=[["e"], "o", ()], min_p=[None, 0.1, 0.2], frequency_penalty=iter([0, 1, 2]),
    )  # fmt: skip
    columns = {name: [*value] for name, value in lists.items()}
    columns["max_gen_len"] = [3, 6, 9]
    lists["frequency_penalty"] = columns["frequency_penalty"]
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    want = [llama.text_completion([text], details=True, **row)[0] for text, row in zip(TEXTS, rows, strict=True)]
    assert llama.text_completion(TEXTS, details=True, **lists) == want == [*llama.iter_text_completion(TEXTS, **lists)]
    assert asyncio.run(llama.atext_completion(TEXTS, details=True, **lists)) == want
    dialogs: Any = [[{"role": "user", "content": text}] for text in TEXTS]
    want_chat = [llama.chat_completion([d], details=True, **row)[0] for d, row in zip(dialogs, rows, strict=True)]
    assert llama.chat_completion(dialogs, details=True, **lists) == want_chat


def test_equal_options_in_a_list_use_the_random_numbers_of_one_option_for_all(llama: Llama) -> None:
    def answers(**options: Any) -> list[list[int]]:
        torch.manual_seed(9)
        return llama.generate(PROMPTS, 8, **options)[0]

    assert answers(temperature=[1.0] * 3, top_p=[0.9] * 3) == answers(temperature=1.0) != answers(temperature=[1.0, 1.0, 2.0])


@pytest.mark.parametrize("name", ["temperature", "top_p", "max_gen_len", "seed", "stop", "min_new_tokens", "logits_processor"])
def test_a_list_of_the_wrong_length_is_one_clear_error(llama: Llama, name: str) -> None:
    item: Any = {"stop": ["x"], "logits_processor": odd_only}.get(name, 1)
    for n in (0, 2, 4):
        if name == "stop" and n == 0:
            continue
        assert_raises(
            lambda n=n: llama.text_completion(TEXTS, **{name: [item] * n}),  # type: ignore[misc]
            InputError,
            f"{name} has {n} values for 3 prompts; give one value, or one for each prompt",
        )


def test_a_wrong_value_in_a_list_is_refused(llama: Llama) -> None:
    for name, bad in {
        "temperature": -1,
        "max_gen_len": 2.5,
        "seed": "x",
        "stop": [""],
        "top_k": -2,
        "min_new_tokens": -1,
    }.items():
        good: Any = {"stop": ["x"]}.get(name, 1)
        assert_raises(lambda: llama.text_completion(TEXTS, **{name: [good, good, bad]}), InputError, name.split("_")[0])  # noqa: B023
    assert_raises(lambda: llama.text_completion(["a"], temperature=[[1]]), InputError, "temperature is [1] (list)")  # type: ignore[list-item]


# --- what ends an answer ------------------------------------------------------------------------------------------------------


def test_stop_token_ids_end_answers_and_ignore_eos_does_not(any_way: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = any_way.generate([[1, 5]], 9, 0)[0]
    end = next(i for i in range(2, 9) if row[i] not in row[:i])
    assert any_way.generate([[1, 5]], 9, 0, stop_token_ids=[row[end], 3])[0] == [row[:end]]
    (result,) = any_way.text_completion(["The"], 0, max_gen_len=9, details=True, stop_token_ids=(row[end],))
    assert result["finish_reason"] in ("stop", "length")
    kept = [t.token for t in any_way.generate_stream([[1, 5]], 9, 0, stop_token_ids=[row[end]], include_eos=True)]
    assert kept == row[: end + 1]
    monkeypatch.setattr(any_way.tokenizer, "eos_id", row[end])
    assert any_way.generate([[1, 5]], 9, 0)[0] == [row[:end]]
    assert any_way.generate([[1, 5]], 9, 0, ignore_eos=True)[0] == [row]
    assert any_way.generate([[1, 5]], 9, 0, ignore_eos=True, stop_token_ids=[row[1]])[0] == [row[: row.index(row[1])]]


def test_an_iterator_is_read_once_and_a_call_without_prompts_checks_its_options(llama: Llama) -> None:
    (row,) = llama.generate([[1, 5]], 9, 0)[0]
    assert llama.generate([[1, 5]], 9, 0, stop_token_ids=iter([row[0]]))[0] == [[]]
    assert llama.generate([], [], [], seed=[], logits_processor=[]) == ([], None)
    for name, bad in {"max_gen_len": -1, "min_new_tokens": 1.5, "logits_processor": 5, "seed": "x", "temperature": -1}.items():
        assert_raises(lambda: llama.text_completion([], **{name: bad}), InputError, f"{name} is ")  # noqa: B023


def test_min_new_tokens_bans_what_ends_an_answer(any_way: Llama) -> None:
    eos = any_way.tokenizer.eos_id
    bias: dict[str, Any] = dict(logit_bias={eos: 50, 7: 40}, stop_token_ids=[7])
    assert any_way.generate(PROMPTS, 9, 0, **bias)[0] == [[]] * 3
    for temperature in (0, 1.0):
        rows, logprobs = any_way.generate(PROMPTS, 9, temperature, logprobs=True, min_new_tokens=[0, 4, 9], seed=1, **bias)
        assert [len(row) for row in rows] == [0, 4, 9] and not {eos, 7} & {token for row in rows for token in row}
        assert logprobs and max(value for row in logprobs for value in row) <= 0
    (result,) = any_way.text_completion(["a"], 0, max_gen_len=5, min_new_tokens=5, details=True, **bias)
    assert (result["new_tokens"], result["finish_reason"]) == (5, "length")
    assert len(any_way.generate([[1] * 60], None, 0, min_new_tokens=30, **bias)[0][0]) == 4  # the context ends before


@pytest.mark.parametrize(
    "options, part",
    [
        *[({"stop_token_ids": bad}, "stop_token_ids") for bad in (5, "5", [-1], [384], [1.0], [True], {5: 1})],
        ({"ignore_eos": 2}, "ignore_eos is 2 (int); it must be True or False"),
        ({"min_new_tokens": 4, "max_gen_len": 3}, "min_new_tokens is 4, more than max_gen_len=3"),
        ({"min_new_tokens": 1, "stop_token_ids": range(384)}, "min_new_tokens lets none of them be chosen"),
        ({"frequency_penalty": 2.1}, "frequency_penalty is 2.1 (float); it must be a number, from -2 to 2"),
        ({"presence_penalty": "1"}, "presence_penalty is '1' (str)"),
        ({"typical_p": 1.1}, "typical_p is 1.1 (float); it must be a number, from 0 to 1 (off)"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_before_any_work(llama: Llama, options: dict[str, Any], part: str) -> None:
    assert_raises(lambda: llama.text_completion(["a"], **options), InputError, part)
    assert_raises(lambda: llama.chat_completion_stream([{"role": "user", "content": "a"}], **options), InputError, part)
    if options.get("stop_token_ids") not in ([384], range(384)):  # which need a tokenizer
        assert_raises(lambda: validate_options(**options), InputError, part)


def test_stop_token_and_ignore_eos_exclude_each_other_and_unknown_options_are_refused(llama: Llama) -> None:
    assert_raises(lambda: llama.generate([[1]], 3, stop_token=5, ignore_eos=True), InputError, "stop_token=5 stands in for EOS")
    for call in (lambda **o: llama.generate([[1]], 3, **o), validate_options):
        with pytest.raises(TypeError, match=r"\(\) got an unexpected keyword argument 'frequence_penalty'"):
            call(frequence_penalty=1)


def test_a_replaced_generate_gets_the_options_that_are_not_the_default(llama: Llama) -> None:
    replaced, seen = Llama(llama.model, llama.tokenizer), {}

    def generate(prompt_tokens: list[list[int]], **options: Any) -> Any:
        seen.update(options)
        return llama.generate(prompt_tokens, **options)

    replaced.generate = generate  # type: ignore[method-assign, assignment]
    options: dict[str, Any] = dict(temperature=[0, 1, 1.0], max_gen_len=[2, 3, 4], n=2, seed=5, stop_token_ids=[9])
    assert replaced.text_completion(TEXTS, **options) == llama.text_completion(TEXTS, **options)
    assert seen.pop("seed") == [5, 6] * 3 and seen == {
        "temperature": [0, 0, 1, 1, 1, 1], "top_p": 0.9, "max_gen_len": 4, "logprobs": False, "stop_token_ids": [9],
    }  # fmt: skip
