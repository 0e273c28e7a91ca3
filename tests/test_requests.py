"""Test scoring, and the options that all calls share: an invalid option raises InputError before the model runs."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llama import InputError, Llama, Score, Tokenizer, Transformer, tuning
from llama.engine import calls, scoring
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
    assert forwards == [sum(len(encode(p + c, bos=True, eos=False)) - 1 for p, c in zip(PROMPTS, CONTINUATIONS, strict=True))]


def test_a_score_tells_whether_greedy_sampling_would_choose_each_token(llama: Llama) -> None:
    prompt = [1, 5, 9, 30]
    answer = llama.generate([prompt], 5, temperature=0)[0][0]
    other = [*answer[:2], answer[2] + 1 if answer[2] < 300 else 3, *answer[3:]]
    ((right, wrong),) = llama.score([prompt], [[answer, other]], top_logprobs=2)
    assert right.is_greedy and right.greedy == [True] * len(answer)
    assert not wrong.is_greedy and wrong.greedy[:3] == [True, True, False]
    assert right.top_logprobs and right.logprobs == [top[0][1] for top in right.top_logprobs]
    assert right.top_logprobs[1][0][0] == right.tokens[1] and len(right.top_logprobs[1]) == 2


def test_prompts_and_continuations_are_texts_or_tokens_and_one_or_several(llama: Llama) -> None:
    encode = llama.tokenizer.encode
    prompt, choices = "Once upon a", [" time", " bear"]
    want = llama.score([prompt] * 2, choices)
    tokens = [encode(prompt + choice, True, False) for choice in choices]
    n = len(encode(prompt, True, False))
    got = llama.score([prompt, "a", tokens[0][:n]], [choices, " b", [each[n:] for each in tokens]])
    for several in (got[0], got[2]):
        assert [each.tokens for each in several] == [each.tokens for each in want]
        for each, expected in zip(several, want, strict=True):
            assert each.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert isinstance(got[1], Score)
    assert llama.score([""], [" time"])[0].logprobs == pytest.approx(
        llama.score([[1]], [encode(" time", False, False)])[0].logprobs
    )


def test_the_last_scored_token_needs_no_place_in_the_context(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Score sequences of max_seq_len + 1 tokens, side by side and in rows of the cache, and compare with the reference."""
    sequences = [[1, *range(5, 68), 70 + i] for i in range(3)]
    table = llama.model.forward(torch.tensor([sequences[0][:64]]), 0)[0].log_softmax(-1)
    want = [[table[62, 67].item(), table[63, 70 + i].item()] for i in range(3)]
    for shares in (True, False):
        monkeypatch.setattr(scoring, "shares_long_prefixes", lambda *_, shares=shares: shares)
        scores = llama.score([each[:63] for each in sequences], [each[63:] for each in sequences])
        assert [each.logprobs for each in scores] == [pytest.approx(values, abs=1e-4) for values in want]


@pytest.mark.parametrize("stride", [None, 1, 7, 64])
def test_perplexity_scores_each_token_once_in_windows(llama: Llama, stride: int | None) -> None:
    tokens = [1, *(3 + i * i % 300 for i in range(150))]
    step, values = stride or 32, []
    for i in range(1, len(tokens)):
        end = 65 if i < 65 else min(len(tokens), 65 + -(-(i + 1 - 65) // step) * step)
        begin = max(0, end - 65)
        table = llama.model.forward(torch.tensor([tokens[begin:i]]), 0)[0, -1].log_softmax(-1)
        values.append(table[tokens[i]].item())
    assert llama.perplexity(tokens, stride) == pytest.approx(math.exp(-sum(values) / len(values)), rel=1e-4)


def test_perplexity_refuses_what_it_cannot_score(idle: Llama) -> None:
    for arguments, part in [
        (("",), "the text has a single token, and nothing to score after it"),
        (("a", 0), "stride is 0 (int); it must be a whole number from 1 to max_seq_len = 64"),
        (("a", 65), "stride is 65 (int)"),
        ((7,), "the text is 7 (int); it must be a text, or a list of tokens"),
    ]:
        with pytest.raises(InputError) as caught:
            idle.perplexity(*arguments)
        assert part in str(caught.value)


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
        (["a"], "b", "continuations is 'b' (str); it must be a list with one entry for each prompt"),
        (["a", 5], ["b", "c"], "prompt 1 is 5 (int); it must be a text, or a list of tokens"),
        (["a"], ["b\ud800"], "continuation 0 holds a lone surrogate"),
        (["a"], ["b", "c"], "1 prompts, but 2 continuations; give one continuation for each prompt"),
        (["a", "b"], ["c", ""], "continuation 1 is '' (str), which adds no token to its prompt"),
        (["a", "b" * 40], ["c", "d" * 40], "prompt 1 with its continuation has 81 tokens, more than max_seq_len + 1 = 65"),
        (["a"], [["b", ""]], "continuation 0, choice 1 is '' (str), which adds no token to its prompt"),
        (["a"], [[]], "continuation 0 is an empty list; give some text or tokens"),
        ([[1, 5]], [" b"], "continuation 0 is a text, but prompt 0 is [1, 5] (list); give tokens for both, or two texts"),
        ([[]], [[5]], "prompt 0 has no tokens; begin it with BOS (1)"),
        ([[1]], [[[5], [384]]], "continuation 0, choice 1: 384 (int) is no token"),
        (["a"], [7], "continuation 0 is 7 (int); it must be a text, or a list"),
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
        *[("seed", bad, "give one value, or one for each prompt") for bad in ([], [1, 2, 3])],
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
        assert {"top_k", "min_p", "repetition_penalty", "seed"} <= set(inspect.signature(call).parameters)
    for word in ("seed:", "stop:", "details:", "max_batch_size"):
        assert word in (Llama.__doc__ or "")


def test_long_prompts_are_spread_over_the_replicas() -> None:
    assert calls.partition_by_length([9, 1, 8, 2], 2) == [[0, 3], [1, 2]]


def test_tokens_of_numpy_types_are_returned_as_int(llama: Llama) -> None:
    tokens = llama.generate([[np.int64(1), np.int64(5)]], 2, 0, echo=True)[0][0]
    assert {type(token) for token in tokens} == {int}
