"""Test that logits that are not finite raise NonFiniteError, which names the prompt and the position. Later calls must not be
affected."""

from types import SimpleNamespace

import pytest
import torch

from llama import Llama, NonFiniteError, SamplingParams, tuning
from llama.engine.forward import EngineForward
from llama.engine.requests import GenerationCall, Request

from .support import assert_raises

PROMPTS = [[1, 5], [1, 9, 30], [1, 300]]


@pytest.fixture(params=["synchronous", "asynchronous"])
def any_llama(request: pytest.FixtureRequest, llama: Llama) -> Llama:
    """Return a small model. With the parameter "asynchronous", each decode step starts before the tokens of the previous step
    are read."""
    if request.param == "asynchronous":
        request.getfixturevalue("as_on_cuda")
    return llama


def set_embedding(llama: Llama, monkeypatch: pytest.MonkeyPatch, token: int, value: float = float("nan")) -> None:
    """Put `value` into the embedding of a token. The logits of a row that contains the token are then not finite from that
    token on."""
    weight = llama.model.tok_embeddings.weight.detach().clone()
    weight[token, 3] = value
    monkeypatch.setitem(llama.model.tok_embeddings._parameters, "weight", torch.nn.Parameter(weight, requires_grad=False))


def test_logits_of_a_prompt_that_are_not_finite_raise(any_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    want = any_llama.generate(PROMPTS, 8, temperature=0)
    with monkeypatch.context() as patch:
        set_embedding(any_llama, patch, 30)
        for temperature in (0.0, 1.0):
            assert_raises(
                lambda t=temperature: any_llama.generate(PROMPTS, 8, temperature=t),
                NonFiniteError, "prompt 1: the logits of new token 1, at position 3, are not finite", "checklist.chk",
            )  # fmt: skip
    assert any_llama.generate(PROMPTS, 8, temperature=0) == want


def test_a_decode_step_with_logits_that_are_not_finite_raises_after_the_earlier_tokens_are_yielded(
    any_llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the stream yields the tokens before the error. NaN in the KV cache must not affect the next call."""
    (want,), _ = any_llama.generate([[1, 5]], 8, temperature=0)
    index = next(i for i in range(2, 8) if want[i] not in want[:i] and want[i] not in (1, 5))
    with monkeypatch.context() as patch:
        set_embedding(any_llama, patch, want[index])
        got: list[int] = []
        with pytest.raises(NonFiniteError, match=f"new token {index + 2}, at position {index + 3},"):
            got.extend(token.token for token in any_llama.generate_stream([[1, 5]], 8, temperature=0))
        assert got == want[: index + 1]
    assert any_llama.generate([[1, 5]], 8, temperature=0)[0] == [want]


def test_nan_in_a_finished_row_does_not_affect_the_next_prompt_in_that_row(
    any_llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put NaN into the embedding of the last token of the first answer. The next prompt then uses the same row of the KV cache,
    while the other row continues."""
    monkeypatch.setattr(any_llama.model.params, "max_batch_size", 2)
    prompts = short, longer, third = [1, 5], [1, 9, 30], [1, 7]
    want = [any_llama.generate([p], n, temperature=0)[0][0] for p, n in ((short, 2), (longer, 9), (third, 3))]
    assert want[0][-1] not in want[1] + want[2]
    set_embedding(any_llama, monkeypatch, want[0][-1])
    requests = [Request(p, n) for p, n in zip(prompts, (2, 9, 3), strict=True)]
    got: list[list[int]] = [[], [], []]
    for token in any_llama.engine.run(GenerationCall(requests, SamplingParams(0), stop_token=-1)):
        got[token.prompt_index].append(token.token)
    assert got == want


def set_logit(token: int, value: float, monkeypatch: pytest.MonkeyPatch, others: float | None = None) -> None:
    """In each forward, replace the logit of one token by `value` and, unless `others` is None, all other logits by `others`."""
    original = EngineForward.logits

    def replaced_logits(self: EngineForward, hidden: torch.Tensor) -> torch.Tensor:
        logits = original(self, hidden)
        logits = logits if others is None else torch.full_like(logits, others)
        logits[..., token] = value
        return logits

    monkeypatch.setattr(EngineForward, "logits", replaced_logits)


@pytest.mark.parametrize(
    "value, others",
    [(float("inf"), None), (float("nan"), None), (float("-inf"), float("-inf")), (float("nan"), float("-inf"))],
)
def test_one_nan_or_infinite_logit_raises_and_so_do_logits_that_are_all_minus_infinity(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, value: float, others: float | None
) -> None:
    set_logit(7, value, monkeypatch, others)
    assert_raises(
        lambda: llama.generate(PROMPTS, 4, 0),
        NonFiniteError,
        "prompt 0: the logits of new token 1, at position 2, are not finite",
    )


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_token_with_a_logit_of_minus_infinity_is_never_generated_but_may_be_in_a_prompt(
    any_llama: Llama, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """Set the logit of one token to minus infinity, and leave all other logits finite."""
    unmasked, _ = any_llama.generate(PROMPTS, 8, temperature, seed=1)
    banned = unmasked[0][0]
    set_logit(banned, float("-inf"), monkeypatch)
    masked, logprobs = any_llama.generate(PROMPTS, 8, temperature, seed=1, logprobs=True)
    assert all(masked) and not any(banned in tokens for tokens in masked)
    assert all(logprob > float("-inf") for row in logprobs or [] for logprob in row)
    (tokens,), logprobs = any_llama.generate([[1, 5, banned, 9]], 2, 0, logprobs=True, echo=True)
    is_banned = [i > 0 and token == banned for i, token in enumerate(tokens)]
    assert logprobs and [logprob == float("-inf") for logprob in logprobs[0]] == is_banned


def test_scores_that_are_not_finite_raise(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    want = llama.score(["The", "a"], [" fox", "b"])
    bad = llama.tokenizer.encode("b", bos=False, eos=False)[-1]
    with monkeypatch.context() as patch:
        set_embedding(llama, patch, bad)
        assert_raises(lambda: llama.score(["The", "b"], [" fox", "ab"]), NonFiniteError, "prompt 1 with its continuation")
        assert_raises(
            lambda: llama.generate([[1, 5], [1, bad, 9]], 2, temperature=0, logprobs=True, echo=True),
            NonFiniteError, "prompt 1: a token's log probability",
        )  # fmt: skip
    assert llama.score(["The", "a"], [" fox", "b"]) == want


@pytest.mark.parametrize("dtype, way_out", [("float16", "'bfloat16' or 'float32'"), ("bfloat16", "'float32'")])
def test_the_error_advises_a_dtype_of_larger_range(
    small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, dtype: str, way_out: str
) -> None:
    llama = Llama.build(small.folder, small.tokenizer_path, 32, 2, device="cpu", dtype=dtype)
    set_embedding(llama, monkeypatch, 5)
    assert_raises(lambda: llama.generate([[1, 5]], 4), NonFiniteError, f"or build with dtype={way_out}: {dtype} may not hold")


def test_a_decode_step_started_after_eos_does_not_affect_later_calls(any_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """An asynchronous decode step starts before the token of the previous step is known, so its input may be EOS. In this test
    the embedding of EOS is NaN."""
    prompt = [1, 5, 9, 30, 8, 44, 45]

    def greedy(eos: int) -> list[int]:
        run = any_llama.engine.run(GenerationCall([Request(list(prompt), 6)], SamplingParams(0), stop_token=eos))
        return [token.token for token in run]

    want = greedy(-1)
    eos = next(token for token in want if token not in prompt)
    with monkeypatch.context() as patch:
        set_embedding(any_llama, patch, eos)
        assert greedy(eos) == greedy(eos) == want[: want.index(eos)]
    assert greedy(-1) == want


def test_keys_and_values_of_a_failed_call_affect_no_later_call(any_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [1, 5, 9, 30, 8, 44, 45]

    def greedy() -> list[int]:
        return [
            token.token
            for token in any_llama.engine.run(GenerationCall([Request(list(prompt), 6)], SamplingParams(0), stop_token=-1))
        ]

    want = greedy()
    with monkeypatch.context() as patch:
        set_embedding(any_llama, patch, next(token for token in want if token not in prompt))
        with pytest.raises(NonFiniteError):
            greedy()
    assert greedy() == want


def test_a_prompts_log_probability_that_is_not_finite_raises(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    set_embedding(llama, monkeypatch, 30)
    call = lambda: llama.generate([[1, 9, 30, 44]], 2, 0, logprobs=True, echo=True)  # noqa: E731
    assert_raises(call, NonFiniteError, "a token's log probability is")


@pytest.mark.parametrize("format", [None, "int8", "int4"])
def test_nan_and_infinity_loaded_into_packed_weights_raise_at_the_next_call(
    small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, format: str | None
) -> None:
    """Load weights that contain NaN or infinity with `load_state_dict`, which does not check that weights are finite."""
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)
    llama = Llama.build(small.folder, small.tokenizer_path, 32, 1, device="cpu", dtype="bfloat16", quantize=format)
    weights = {name: weight.clone() for name, weight in llama.model.state_dict().items()}
    for value in (float("nan"), float("inf")):
        weights["layers.0.attention.wo.weight"][3, 5] = value
        llama.model.load_state_dict(weights)
        assert_raises(lambda: llama.generate([[1, 5]], 2, temperature=0), NonFiniteError, "not finite")
