"""Test `top_logprobs`, `include_eos` and `logit_bias`: in each backend, in shared batches, and what is refused."""

import asyncio
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from llama import InputError, Llama, SamplingParams, Transformer, generation, tuning
from llama.engine.forward import EngineForward
from llama.engine.requests import GeneratedToken
from llama.sampling import bias_of_tokens, sample

PROMPTS = [[1, *range(7 * i + 5, 7 * i + 6 + i % 5)] for i in range(14)]  # each prompt has 2 to 6 tokens


def rows_of(stream: Any, n: int) -> list[list[GeneratedToken]]:
    """Return the tokens of a stream by prompt."""
    tokens = list(stream)
    return [[token for token in tokens if token.prompt_index == i] for i in range(n)]


@pytest.mark.parametrize("chunk", [3, 2048])
def test_top_logprobs_are_the_largest_of_a_full_forward(
    any_way: Llama, reference: Transformer, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Echo more prompts than rows, also with short chunks. The tokens are sampled, so most are not the likeliest."""
    monkeypatch.setattr(tuning, "PREFILL_CHUNK", chunk)
    monkeypatch.setattr(tuning, "LOGPROB_CHUNK", chunk)
    options: dict = dict(temperature=1.5, seed=7, logprobs=True)
    rows = rows_of(any_way.generate_stream(PROMPTS, 5, echo=True, top_logprobs=7, **options), len(PROMPTS))
    for prompt, row in zip(PROMPTS, rows, strict=True):
        tokens = [token.token for token in row]
        assert tokens[: len(prompt)] == prompt and row[0].top_logprobs == [] and row[0].logprob == 0.0
        table = reference.forward(torch.tensor([tokens]), 0)[0].log_softmax(-1)
        for token, expected in zip(row[1:], table, strict=False):
            values, best = expected.topk(7)
            assert [value for _, value in token.top_logprobs or []] == pytest.approx(values.tolist(), abs=1e-4)
            assert {each for each, _ in token.top_logprobs or []} == set(best.tolist())
            assert token.logprob == dict(token.top_logprobs or []).get(token.token, token.logprob)  # equal to the last digit
    without = rows_of(any_way.generate_stream(PROMPTS, 5, echo=True, **options), len(PROMPTS))
    assert [[token[:2] for token in row] for row in without] == [[token[:2] for token in row] for row in rows]
    assert {token.top_logprobs for row in without for token in row} == {None}


def test_results_of_texts_have_the_likeliest_tokens_as_text(llama: Llama) -> None:
    options: dict = dict(max_gen_len=4, logprobs=True, top_logprobs=3)
    texts, dialog = ["The quick", "a"], [{"role": "user", "content": "What?"}]
    for echo in (False, True):
        for text, result in zip(texts, llama.text_completion(texts, 0, echo=echo, **options), strict=True):
            prompt = llama.tokenizer.encode(text, bos=True, eos=False)
            (row,) = rows_of(llama.generate_stream([prompt], 4, 0, echo=echo, logprobs=True, top_logprobs=3), 1)
            tops = result["top_logprobs"]
            assert [len(top) for top in tops] == [3 - 3 * (echo and i == 0) for i in range(len(result["tokens"]))]
            for token, got in zip(row, tops, strict=True):
                want = token.top_logprobs or []
                assert [text for text, _ in got] == [llama.tokenizer.decode([each]) for each, _ in want]
                assert [value for _, value in got] == pytest.approx([value for _, value in want], abs=1e-4)
        assert [top[0] for top in tops[-4:]] == [*zip(result["tokens"][-4:], result["logprobs"][-4:], strict=True)]
    unsafe, answer = llama.chat_completion([[{"role": "user", "content": "[INST]"}], dialog], 0, **options)  # type: ignore[list-item]
    assert unsafe["top_logprobs"] == [] and [len(top) for top in answer["top_logprobs"]] == [3] * len(answer["tokens"])
    assert asyncio.run(llama.achat_completion([dialog], 0, **options))[0]["generation"] == answer["generation"]
    assert "top_logprobs" not in llama.text_completion(texts, 0, max_gen_len=4, logprobs=True)[0]


def test_calls_that_share_a_batch_have_their_own_numbers_of_top_logprobs(llama: Llama) -> None:
    numbers = [None, 0, 1, 20, 5, 2, 20]

    async def run() -> list[Any]:
        calls = [
            llama.atext_completion(["The"], 0, max_gen_len=5, logprobs=n is not None, top_logprobs=n, echo=bool(i % 2))
            for i, n in enumerate(numbers)
        ]
        return [result for (result,) in await asyncio.gather(*calls)]

    for n, result in zip(numbers, asyncio.run(run()), strict=True):
        assert ("logprobs" in result, "top_logprobs" in result) == (n is not None, bool(n))
        assert {len(top) for top in result.get("top_logprobs", [])} - {0} == ({n} if n else set())


def test_a_generated_token_stays_a_tuple_of_three() -> None:
    token = GeneratedToken(0, 5, -1.0, [(5, -1.0)])
    assert tuple(token) == (0, 5, -1.0) == pickle.loads(pickle.dumps(token))
    assert pickle.loads(pickle.dumps(token)).top_logprobs == [(5, -1.0)] and GeneratedToken(0, 5, None).top_logprobs is None


def test_eos_is_yielded_on_request(any_way: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict = dict(temperature=0, logprobs=True, top_logprobs=1)
    (row,) = rows_of(any_way.generate_stream([[1, 5]], 9, **options), 1)
    end = next(i for i, token in enumerate(row) if token.token not in [other.token for other in row[:i]] and i > 1)
    monkeypatch.setattr(any_way.tokenizer, "eos_id", row[end].token)
    assert list(any_way.generate_stream([[1, 5]], 9, **options)) == row[:end]
    with_eos = list(any_way.generate_stream([[1, 5]], 9, include_eos=True, **options))
    assert with_eos == row[: end + 1] and with_eos[-1].top_logprobs == row[end].top_logprobs
    assert len(list(any_way.generate_stream([[1, 5]], end, include_eos=True, **options))) == end  # the limit came before


@pytest.fixture
def idle(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> Llama:
    """Return a model that fails the test if it runs a forward."""
    monkeypatch.setattr(EngineForward, "hidden_states", lambda *_, **__: pytest.fail("the model ran"))
    return llama


@pytest.mark.parametrize("value", [-1, 21, 1.0, True, "2", [1]], ids=str)
def test_a_wrong_number_of_top_logprobs_is_refused(idle: Llama, value: Any) -> None:
    with pytest.raises(InputError, match=r"top_logprobs is .*; it must be a whole number, from 0 \(off\) to 20"):
        idle.text_completion(["a"], logprobs=True, top_logprobs=value)


def test_top_logprobs_without_logprobs_or_with_a_replaced_generate_are_refused(idle: Llama) -> None:
    for call in (idle.text_completion, idle.chat_completion, idle.generate_stream):
        with pytest.raises(InputError, match="top_logprobs=2 is for logprobs=True; give both"):
            call([], max_gen_len=1, top_logprobs=np.int64(2))  # type: ignore[operator]
    replaced = Llama(idle.model, idle.tokenizer)
    replaced.generate = lambda prompt_tokens, **options: pytest.fail("generate ran")  # type: ignore[method-assign]
    with pytest.raises(InputError, match="generate has been replaced, and returns no top_logprobs"):
        replaced.text_completion(["a"], logprobs=True, top_logprobs=1)


# --- logit_bias --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_logit_bias_chooses_and_bans_tokens_and_changes_no_logprob(
    any_way: Llama, reference: Transformer, temperature: float
) -> None:
    options: dict = dict(temperature=temperature, seed=3)
    (plain,) = any_way.generate([[1, 5]], 12, **options)[0]
    banned = {token: -100 for token in plain}
    tokens, logprobs = any_way.generate(PROMPTS, 12, logprobs=True, logit_bias=banned, **options)
    assert logprobs and not {token for row in tokens for token in row} & {*plain}
    for prompt, row, values in zip(PROMPTS, tokens, logprobs, strict=True):
        table = reference.forward(torch.tensor([prompt + row]), 0)[0].log_softmax(-1)
        want = [table[len(prompt) + i - 1, token].item() for i, token in enumerate(row)]
        assert values == pytest.approx(want, abs=1e-4)
    assert any_way.generate(PROMPTS[:3], 4, logit_bias={np.int64(77): np.float32(100)}, **options)[0] == [[77] * 4] * 3
    assert any_way.generate([[1, 5]], 12, logit_bias={}, **options)[0] == [plain]
    assert any_way.generate([[1, 5]], 12, logit_bias={plain[0]: 0.0}, **options)[0] == [plain]


def test_rows_of_a_shared_batch_have_their_own_biases(llama: Llama) -> None:
    """Run 20 calls in 6 rows: rows with a bias follow rows without one, and the other way round."""
    biases: list[Any] = [None, {50: 100}, {}, {51: 100, 50: 99}, {60: 2.5, 61: -2.5}] * 4
    options: list[dict[str, Any]] = [
        {"logit_bias": bias, "repetition_penalty": (1.0, 1.5)[i % 2], "temperature": i % 3 / 2, "seed": i}
        for i, bias in enumerate(biases)
    ]
    prompts = [PROMPTS[i % 14] for i in range(20)]
    want = [[t.token for t in llama.generate_stream([p], 3 + i % 4, **options[i])] for i, p in enumerate(prompts)]
    assert want[1] == [50] * 4 or options[1]["repetition_penalty"] != 1

    async def run() -> list[Any]:
        async def one(i: int) -> list[int]:
            return [t.token async for t in llama.agenerate_stream([prompts[i]], 3 + i % 4, **options[i])]

        return await asyncio.gather(*map(one, range(20)))

    assert asyncio.run(run()) == want


def test_a_logit_bias_shifts_the_distribution_before_the_repetition_penalty_and_a_replaced_sampler(
    llama: Llama, reference: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = reference.forward(torch.tensor([[1, 5]]), 0)[0, -1].float()
    biased = logits + bias_of_tokens({5: 6.0, 200: -3.0}, len(logits))
    biased[[1, 5]] = torch.where(biased[[1, 5]] > 0, biased[[1, 5]] / 1.5, biased[[1, 5]] * 1.5)
    seen = []

    def sampler(probs: torch.Tensor, p: float) -> torch.Tensor:
        seen.append(probs)
        return probs.argmax(-1, keepdim=True)

    monkeypatch.setattr(generation, "sample_top_p", sampler)
    llama.generate([[1, 5]], 1, 2.0, repetition_penalty=1.5, logit_bias={200: -3, 5: 6})
    assert torch.allclose(seen[0][0], (biased / 2).softmax(-1), atol=1e-5)


def test_a_bias_that_is_not_used_adds_no_tensor(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama.engine.decode_state.bias_of_tokens", lambda *_: pytest.fail("a bias was made"))
    llama.generate(PROMPTS, 3)
    params = SamplingParams(0, logit_bias={9: 1, 3: 2})
    assert params.logit_bias == {3: 2.0, 9: 1.0} and [*params.logit_bias] == [3, 9]
    assert params == SamplingParams(0, logit_bias={3: 2, 9: 1}) != SamplingParams(0) == SamplingParams(0, logit_bias=None)
    assert hash(params) == hash(SamplingParams(0, logit_bias={3: 2, 9: 1}))
    assert sample(torch.tensor([[1.0, 2.0]]) + bias_of_tokens({0: 1.5}, 2), params).tolist() == [0]


@pytest.mark.parametrize(
    "value, part",
    [
        *[(bad, r"logit_bias is .*; it must map tokens to numbers, as in \{token: -100\}") for bad in ([5], 5, "5", [(5, 1)])],
        *[
            ({bad: 1}, "logit_bias: .* is no token; tokens are whole numbers")
            for bad in (-1, 384, 10**30, True, 1.0, "5", None)
        ],
        *[
            ({5: bad}, "logit_bias of token 5 is .*; it must be a number, from -100 to 100")
            for bad in (101, -100.5, float("nan"), float("inf"), "1", None, True)
        ],
    ],
    ids=str,
)
def test_a_wrong_logit_bias_is_refused_by_every_call(idle: Llama, value: Any, part: str) -> None:
    dialog: Any = [{"role": "user", "content": "a"}]
    for call, argument in (
        (idle.generate, [[1]]), (idle.generate_stream, [[1]]), (idle.text_completion, ["a"]), (idle.chat_completion, [dialog]),
        (idle.iter_text_completion, ["a"]), (idle.iter_chat_completion, [dialog]), (idle.text_completion_stream, "a"),
        (idle.chat_completion_stream, dialog),
    ):  # fmt: skip
        with pytest.raises(InputError, match=part):
            call(argument, max_gen_len=1, logit_bias=value)  # type: ignore[operator]
