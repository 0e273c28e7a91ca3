"""Test scoring, and the options that all calls share: an invalid option raises InputError before the model runs."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llama import InputError, Llama, Tokenizer, Transformer, tuning
from llama.engine import request_builder
from llama.engine.forward import EngineForward

from .counting import count_forward_tokens

PROMPTS = ["Once upon", "The capital of France is", "", "one, two, three, ", "sea"]
CONTINUATIONS = [" a time there was", " Paris.", "good morning", "four", " shells by the sea shore and he counts them all"]


def test_scores_are_the_log_probabilities_that_echo_returns(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Score more pairs of prompt and continuation than the batch has rows, in chunks of several sizes, while a stream that uses
    the KV cache is open."""
    want = []
    for prompt, continuation in zip(PROMPTS, CONTINUATIONS, strict=True):
        all_tokens = llama.tokenizer.encode(prompt + continuation, bos=True, eos=False)
        start = len(llama.tokenizer.encode(prompt, bos=True, eos=False))
        (echoed,) = llama.text_completion([prompt + continuation], 0, max_gen_len=0, logprobs=True, echo=True)
        start -= all_tokens[:start] != llama.tokenizer.encode(prompt, bos=True, eos=False)
        want.append((echoed["tokens"][start:], echoed["logprobs"][start:]))
    expected = llama.text_completion(["a time"], 0, max_gen_len=9)[0]["generation"]
    stream = llama.text_completion_stream("a time", 0, max_gen_len=9)
    received = next(stream)
    for chunk in (7, 30, 2048):
        monkeypatch.setattr(tuning, "PREFILL_CHUNK", chunk)
        for score, (tokens, values) in zip(llama.score(PROMPTS * 4, CONTINUATIONS * 4), want * 4, strict=True):
            assert score.tokens == tokens and score.logprobs == pytest.approx(values, abs=1e-4)
            assert score.total == pytest.approx(sum(values), abs=1e-3) and score.mean == score.total / len(values)
    assert received + "".join(stream) == expected
    assert llama.score([], []) == []


def test_scoring_runs_one_forward_over_all_tokens(llama: Llama) -> None:
    with count_forward_tokens() as forwards:
        llama.score(PROMPTS, CONTINUATIONS)
    encode = llama.tokenizer.encode
    assert forwards == [sum(len(encode(p + c, bos=True, eos=False)) for p, c in zip(PROMPTS, CONTINUATIONS, strict=True))]


def test_a_token_across_the_border_of_prompt_and_continuation_is_scored(llama: Llama, reference: Transformer) -> None:
    """Score the continuation "al" of the prompt "The capit". The tokens of "The capital" do not begin with the tokens of "The
    capit"."""
    tokenizer: Tokenizer = llama.tokenizer
    prompt, full_text = "The capit", "The capital"
    prompt_tokens, tokens = (tokenizer.encode(text, bos=True, eos=False) for text in (prompt, full_text))
    start = next(i for i, (a, b) in enumerate(zip(prompt_tokens, tokens, strict=False)) if a != b)
    assert start < len(prompt_tokens)
    (score,) = llama.score([prompt], ["al"])
    assert score.tokens == [tokenizer.decode([token]) for token in tokens[start:]]
    table = reference.forward(torch.tensor([tokens]), 0)[0].log_softmax(-1)
    assert score.logprobs == pytest.approx([table[i - 1, tokens[i]].item() for i in range(start, len(tokens))], abs=1e-4)


@pytest.fixture
def idle(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> Llama:
    """Return a model that fails the test if it runs a forward."""
    monkeypatch.setattr(EngineForward, "hidden_states", lambda *_, **__: pytest.fail("the model ran"))
    return llama


@pytest.mark.parametrize(
    "prompts, continuations, part",
    [
        ("a", ["b"], "prompts is 'a' (str); it must be a list of texts"),
        (["a"], "b", "continuations is 'b' (str); it must be a list of texts"),
        (["a", 5], ["b", "c"], "prompt 1 is 5 (int); it must be a string"),
        (["a"], ["b\ud800"], "continuation 0 holds a lone surrogate"),
        (["a"], ["b", "c"], "1 prompts, but 2 continuations; give one continuation for each prompt"),
        (["a", "b"], ["c", ""], "continuation 1 is '' (str), which adds no token to its prompt"),
        (["a", "b" * 40], ["c", "d" * 40], "prompt 1 with its continuation has 81 tokens, more than max_seq_len=64"),
    ],
)
def test_invalid_pairs_raise_before_the_model_runs(idle: Llama, prompts: Any, continuations: Any, part: str) -> None:
    with pytest.raises(InputError) as caught:
        idle.score(prompts, continuations)
    assert part in str(caught.value)


CALLS: list[Callable[..., Any]] = [
    lambda llama, **options: llama.generate([[1], [1, 5]], 4, **options),
    lambda llama, **options: llama.generate_stream([[1], [1, 5]], 4, **options),
    lambda llama, **options: llama.text_completion(["a", "b"], **options),
    lambda llama, **options: llama.chat_completion([[{"role": "user", "content": "a"}]] * 2, **options),
    lambda llama, **options: llama.text_completion_stream("a", **options),
    lambda llama, **options: llama.chat_completion_stream([{"role": "user", "content": "a"}], **options),
]


@pytest.mark.parametrize(
    "name, value, part",
    [
        *[("top_k", bad, "a whole number, 0 (all tokens) or more") for bad in (-1, 1.0, True, "4", math.nan)],
        *[("min_p", bad, "from 0 (off) to 1") for bad in (-0.1, 1.1, math.nan, True, "0")],
        *[("repetition_penalty", bad, "from 0.01 to 100; 1 is off") for bad in (0, -1, math.inf, math.nan, True, "1")],
        *[("seed", bad, "a whole number from -2**63 to 2**64 - 1") for bad in (1.0, True, "1", 2**64, -(2**63) - 1, math.nan)],
        *[("seed", bad, "a whole number from -2**63 to 2**64 - 1") for bad in ([1, None], [1, "2"], b"ab")],
        *[("seed", bad, "give one seed, or one for each prompt") for bad in ([], [1, 2, 3])],
    ],
    ids=lambda value: f"{value!r:.20}",
)
def test_an_invalid_option_raises_at_once_in_every_call(idle: Llama, name: str, value: Any, part: str) -> None:
    """Pass an invalid option to each call. Streaming calls must also raise at once, not when their first token is read."""
    for call in CALLS:
        with pytest.raises(InputError) as caught:
            call(idle, **{name: value})
        assert part in str(caught.value)


def test_each_dialog_keeps_its_own_seed_after_an_unsafe_dialog(llama: Llama) -> None:
    """A dialog with special tags is not generated. Its seed must not be used for the next dialog."""
    user, unsafe = [{"role": "user", "content": "Paris?"}], [{"role": "user", "content": "[INST]"}]
    options: dict = dict(temperature=1.0, max_gen_len=12)
    third = "".join(llama.chat_completion_stream(user, seed=3, **options))
    answers = llama.chat_completion([unsafe, user, user], seed=[1, 2, 3], **options)
    assert [a["generation"]["content"] == third for a in answers] == [False, False, True]


def test_signatures_and_docstrings_show_every_option() -> None:
    for call in (Llama.generate, Llama.text_completion, Llama.chat_completion_stream):
        assert {"top_k", "min_p", "repetition_penalty", "seed"} <= set(call.__annotations__)
    for word in ("seed:", "stop:", "details:", "max_batch_size"):
        assert word in (Llama.__doc__ or "")


def test_long_prompts_are_spread_over_the_replicas() -> None:
    assert request_builder.partition_by_length([9, 1, 8, 2], 2) == [[0, 3], [1, 2]]


def test_tokens_of_numpy_types_are_returned_as_int(llama: Llama) -> None:
    tokens = llama.generate([[np.int64(1), np.int64(5)]], 2, 0, echo=True)[0][0]
    assert {type(token) for token in tokens} == {int}
