"""Logits that are not finite are an error, which names the row and the step, and leave nothing behind."""

from types import SimpleNamespace

import pytest
import torch

from llama import Llama, NonFiniteError, SamplingParams, tuning
from llama.engine.forward import EngineForward
from llama.engine.requests import GenerationCall, Request

from .support import refused

PROMPTS = [[1, 5], [1, 9, 30], [1, 300]]


@pytest.fixture(params=["step by step", "ahead"])
def stepping(request: pytest.FixtureRequest, llama: Llama) -> Llama:
    """Also where the next step is launched before the ids of this one are read."""
    if request.param == "ahead":
        request.getfixturevalue("as_on_cuda")
    return llama


def plant(llama: Llama, monkeypatch: pytest.MonkeyPatch, id_: int, value: float = float("nan")) -> None:
    """An embedding that holds a number that is none: no row is harmed before it meets that id."""
    weight = llama.model.tok_embeddings.weight.detach().clone()
    weight[id_, 3] = value
    monkeypatch.setitem(llama.model.tok_embeddings._parameters, "weight", torch.nn.Parameter(weight, requires_grad=False))


def test_a_prompt_s_numbers(stepping: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    want = stepping.generate(PROMPTS, 8, temperature=0)
    with monkeypatch.context() as patch:
        plant(stepping, patch, 30)
        for temperature in (0.0, 1.0):
            refused(
                lambda t=temperature: stepping.generate(PROMPTS, 8, temperature=t),
                NonFiniteError, "prompt 1: the logits of new token 1, at position 3, are not finite", "checklist.chk",
            )  # fmt: skip
    assert stepping.generate(PROMPTS, 8, temperature=0) == want


def test_a_step_s_numbers(stepping: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made before has been handed out, and the cache is clean for the next call, of any length."""
    (want,), _ = stepping.generate([[1, 5]], 8, temperature=0)
    third = next(i for i in range(2, 8) if want[i] not in want[:i] and want[i] not in (1, 5))
    with monkeypatch.context() as patch:
        plant(stepping, patch, want[third])
        got: list[int] = []
        with pytest.raises(NonFiniteError, match=f"new token {third + 2}, at position {third + 3},"):
            got.extend(token.token for token in stepping.generate_stream([[1, 5]], 8, temperature=0))
        assert got == want[: third + 1]
    assert stepping.generate([[1, 5]], 8, temperature=0)[0] == [want]


def test_what_a_row_leaves_is_not_the_next_one_s(stepping: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's last id, which nothing follows, has no numbers; it steps on beside others, in whose slots new prompts come."""
    monkeypatch.setattr(stepping.model.params, "max_batch_size", 2)
    short, longer, third = [1, 5], [1, 9, 30], [1, 7]
    want = [stepping.generate([p], n, temperature=0)[0][0] for p, n in ((short, 2), (longer, 9), (third, 3))]
    assert want[0][-1] not in want[1] + want[2]
    plant(stepping, monkeypatch, want[0][-1])
    prompts = [short, longer, third]
    requests = [Request(p, n) for p, n in zip(prompts, (2, 9, 3), strict=True)]
    got: list[list[int]] = [[], [], []]
    for token in stepping.engine.run(GenerationCall(requests, SamplingParams(0)), eos_id=-1):
        got[token.prompt_index].append(token.token)
    assert got == want


def logits_of_7(value: float, monkeypatch: pytest.MonkeyPatch, others: float | None = None) -> None:
    """Plant a value among the logits, and `others`, if given, as all the rest."""
    plain = EngineForward.logits

    def logits(self: EngineForward, hidden: torch.Tensor) -> torch.Tensor:
        found = plain(self, hidden)
        found = found if others is None else torch.full_like(found, others)
        found[..., 7] = value
        return found

    monkeypatch.setattr(EngineForward, "logits", logits)


@pytest.mark.parametrize(
    "value, others",
    [(float("inf"), None), (float("nan"), None), (float("-inf"), float("-inf")), (float("nan"), float("-inf"))],
)
def test_a_single_logit(llama: Llama, monkeypatch: pytest.MonkeyPatch, value: float, others: float | None) -> None:
    """Infinite, or no number, among finite ones, or all masked."""
    logits_of_7(value, monkeypatch, others)
    refused(
        lambda: llama.generate(PROMPTS, 4, 0),
        NonFiniteError,
        "prompt 0: the logits of new token 1, at position 2, are not finite",
    )


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_masked_logit_is_no_error(stepping: Llama, monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    """Minus infinity beside finite logits is how a caller forbids an id: it is never chosen, but may stand in a prompt."""
    free, _ = stepping.generate(PROMPTS, 8, temperature, seed=1)
    chosen = free[0][0]
    plain = EngineForward.logits

    def logits(self: EngineForward, hidden: torch.Tensor) -> torch.Tensor:
        found = plain(self, hidden)
        found[..., chosen] = float("-inf")
        return found

    monkeypatch.setattr(EngineForward, "logits", logits)
    masked, values = stepping.generate(PROMPTS, 8, temperature, seed=1, logprobs=True)
    assert all(masked) and not any(chosen in ids for ids in masked)
    assert all(value > float("-inf") for row in values or [] for value in row)
    (ids,), given = stepping.generate([[1, 5, chosen, 9]], 2, 0, logprobs=True, echo=True)
    assert given and [value == float("-inf") for value in given[0]] == [i > 0 and id_ == chosen for i, id_ in enumerate(ids)]


def test_log_probabilities(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    want = llama.score(["The", "a"], [" fox", "b"])
    bad = llama.tokenizer.encode("b", bos=False, eos=False)[-1]
    with monkeypatch.context() as patch:
        plant(llama, patch, bad)
        refused(lambda: llama.score(["The", "b"], [" fox", "ab"]), NonFiniteError, "prompt 1 with its continuation")
        refused(
            lambda: llama.generate([[1, 5], [1, bad, 9]], 2, temperature=0, logprobs=True, echo=True),
            NonFiniteError, "prompt 1: a token's log probability",
        )  # fmt: skip
    assert llama.score(["The", "a"], [" fox", "b"]) == want


@pytest.mark.parametrize("dtype, way_out", [("float16", "'bfloat16' or 'float32'"), ("bfloat16", "'float32'")])
def test_the_way_out_of_a_narrow_dtype(small: object, monkeypatch: pytest.MonkeyPatch, dtype: str, way_out: str) -> None:
    llama = Llama.build(small.folder, small.tokenizer_path, 32, 2, device="cpu", dtype=dtype)  # type: ignore[attr-defined]
    plant(llama, monkeypatch, 5)
    refused(lambda: llama.generate([[1, 5]], 4), NonFiniteError, f"or build with dtype={way_out}: {dtype} may not hold")


def test_a_step_beyond_the_end_harms_no_later_call(stepping: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host runs ahead, EOS is known when the step that takes it is on its way."""
    prompt = [1, 5, 9, 30, 8, 44, 45]

    def greedy(eos: int) -> list[int]:
        run = stepping.engine.run(GenerationCall([Request(list(prompt), 6)], SamplingParams(0), reuse=True), eos)
        return [token.token for token in run]

    want = greedy(-1)
    eos = next(id_ for id_ in want if id_ not in prompt)
    stepping.engine.forward().cache.prefix_tokens = None
    with monkeypatch.context() as patch:
        plant(stepping, patch, eos)
        assert greedy(eos) == greedy(eos) == want[: want.index(eos)]
    assert greedy(-1) == want


def test_after_an_error_nothing_is_kept(stepping: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [1, 5, 9, 30, 8, 44, 45]

    def greedy() -> list[int]:
        return [
            token.token
            for token in stepping.engine.run(GenerationCall([Request(list(prompt), 6)], SamplingParams(0), reuse=True), -1)
        ]

    want = greedy()
    stepping.engine.forward().cache.prefix_tokens = None
    with monkeypatch.context() as patch:
        plant(stepping, patch, next(id_ for id_ in want if id_ not in prompt))
        with pytest.raises(NonFiniteError):
            greedy()
    assert greedy() == want


def test_the_id_is_named_whose_log_probability_is_none(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(llama, monkeypatch, 30)
    call = lambda: llama.generate([[1, 9, 30, 44]], 2, 0, logprobs=True, echo=True)  # noqa: E731
    refused(call, NonFiniteError, "a token's log probability is")


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_weights_that_are_none_are_loaded_and_told(
    small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, kind: str | None
) -> None:
    """By the caller's own `load_state_dict`, into weights that were packed."""
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)
    llama = Llama.build(small.folder, small.tokenizer_path, 32, 1, device="cpu", dtype="bfloat16", quantize=kind)
    weights = {name: weight.clone() for name, weight in llama.model.state_dict().items()}
    for value in (float("nan"), float("inf")):
        weights["layers.0.attention.wo.weight"][3, 5] = value
        llama.model.load_state_dict(weights)
        refused(lambda: llama.generate([[1, 5]], 2, temperature=0), NonFiniteError, "not finite")
