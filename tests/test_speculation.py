"""Guessed tokens change no answer: tokens, log probabilities, stops and finish reasons are those of plain decoding."""

import asyncio
import copy
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama import InputError, Llama, tuning
from llama.backends.cuda_graphs import CudaGraphsBackend
from llama.checkpoint import loading
from llama.engine.backend import Run
from llama.engine.draft import DraftGuesser
from llama.engine.step_costs import StepCosts

from . import speculation_worker
from .support import random_weights, torchrun, train_tokenizer, write_shards

REPEATING = [1, 5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]
PROMPTS = [REPEATING, [1, 40, 41, 40, 41, 40, 41], [1, 7], [1, 9, 8, 7, 6, 5, 4, 3], [1, *range(50, 80), *range(50, 60)]]
MAX_SEQ_LEN = 64


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all steps seem to take the same time, and guesses none, so that as much as possible is guessed."""
    monkeypatch.setattr(StepCosts, "known", lambda self, n: True)
    monkeypatch.setattr(StepCosts, "seconds", lambda self, n: 1.0)
    monkeypatch.setattr(DraftGuesser, "seconds", lambda self, n: 0.0)


@pytest.fixture(scope="module")
def draft(small: SimpleNamespace) -> Llama:
    """Return a model that guesses well, but not always right: the small one, quantized."""
    return Llama.build(small.folder, small.tokenizer_path, MAX_SEQ_LEN, 8, device="cpu", quantize="int8")


@pytest.fixture(scope="module")
def speculating(small: SimpleNamespace, draft: Llama) -> Llama:
    llama = Llama.build(small.folder, small.tokenizer_path, MAX_SEQ_LEN, 8, device="cpu")
    llama.draft = draft
    return llama


@pytest.fixture(scope="module")
def on_cuda_graphs(small: SimpleNamespace, draft: Llama) -> Llama:
    """Return a model that decodes in static memory, as on CUDA."""
    llama = Llama.build(small.folder, small.tokenizer_path, MAX_SEQ_LEN, 8, device="cpu", backend="torch")
    llama._engine.backend = CudaGraphsBackend()
    llama.draft = draft
    return llama


def answers(llama: Llama, prompts: list[list[int]], **options: Any) -> list[Any]:
    """Return the tokens, log probabilities and finish reasons of answers."""
    results = llama.text_completion(prompts, logprobs=True, details=True, **options)
    keys = "generation", "tokens", "finish_reason", "new_tokens", "logprobs"
    return [tuple(result[key] for key in keys) for result in results]  # type: ignore[literal-required]


def assert_alike(got: list[Any], want: list[Any]) -> None:
    """Compare answers: log probabilities may differ by rounding, since steps of several tokens are other matrix products."""
    for (*one, logprobs), (*other, want_logprobs) in zip(got, want, strict=True):
        assert one == other
        assert logprobs == pytest.approx(want_logprobs, abs=1e-4)


def ban_even(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
    """Allow only tokens whose parity differs from that of the number of tokens so far."""
    logits[len(tokens) % 2 :: 2] = -torch.inf
    return logits


OPTIONS = st.fixed_dictionaries(
    {"max_gen_len": st.sampled_from([1, 2, 9, 20, None]), "speculate": st.sampled_from(["prompt", "draft"])},
    optional={
        "stop": st.sampled_from([["e"], ["th", "qu"], "\n"]),
        "repetition_penalty": st.sampled_from([1.3, 0.8]),
        "frequency_penalty": st.sampled_from([-1.0, 0.7]),
        "presence_penalty": st.just(0.5),
        "logit_bias": st.just({7: 3.0, 9: -5.0}),
        "min_new_tokens": st.integers(1, 1),
        "ignore_eos": st.just(True),
        "stop_token_ids": st.just([8, 77]),
        "logits_processor": st.just(ban_even),
        "n": st.integers(1, 3),
        "top_logprobs": st.just(2),
    },
)
SAMPLING = st.just({"temperature": 0.0}) | st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.3, 1.0]), "seed": st.integers(0, 99)},
    optional={"top_p": st.sampled_from([0.5, 1.0]), "top_k": st.just(20), "min_p": st.just(0.1), "typical_p": st.just(0.8)},
)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompts=st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=9), options=OPTIONS, sampling=SAMPLING)
def test_answers_equal_those_without_guesses(
    always: None, speculating: Llama, prompts: list[list[int]], options: dict[str, Any], sampling: dict[str, Any]
) -> None:
    given = {"temperature": 0.0, **sampling, **options}
    want = answers(speculating, prompts, **{**given, "speculate": False})
    assert_alike(answers(speculating, prompts, **given), want)


@pytest.mark.parametrize("kind", ["prompt", "draft"])
@pytest.mark.parametrize("seed", [None, 3])
def test_captured_steps_of_several_tokens_give_the_same_answers(
    always: None, on_cuda_graphs: Llama, kind: str, seed: int | None
) -> None:
    options: dict[str, Any] = {"temperature": 0.0 if seed is None else 1.0, "seed": seed}
    for prompts in (PROMPTS[:1], PROMPTS, PROMPTS * 2):
        want = answers(on_cuda_graphs, prompts, **options)
        assert_alike(answers(on_cuda_graphs, prompts, speculate=kind, **options), want)


@pytest.mark.parametrize("kind", ["prompt", "draft"])
def test_the_number_of_guesses_is_reported_and_saves_steps(always: None, speculating: Llama, kind: str) -> None:
    options: dict[str, Any] = {"temperature": 0.0, "details": True}
    if kind == "prompt":
        options["repetition_penalty"] = 0.2  # lets the answer repeat the prompt
    (plain,) = speculating.text_completion([REPEATING], **options)
    (result,) = speculating.text_completion([REPEATING], **options, speculate=kind)
    assert "guessed_tokens" not in plain
    assert 0 < result["accepted_tokens"] <= result["guessed_tokens"]
    assert result["accepted_tokens"] > result["new_tokens"] / 2


def test_an_unseeded_answer_uses_the_random_numbers_of_plain_decoding(always: None, speculating: Llama) -> None:
    torch.manual_seed(5)
    want = speculating.generate([REPEATING], 40, temperature=0.4)
    torch.manual_seed(5)
    assert speculating.generate([REPEATING], 40, temperature=0.4, speculate="prompt") == want


@pytest.mark.parametrize("kind", ["prompt", "draft"])
def test_streams_and_async_calls_speculate(always: None, speculating: Llama, kind: str) -> None:
    want = speculating.text_completion(["The quick brown fox"], 0.0, max_gen_len=30)[0]["generation"]
    stream = speculating.text_completion_stream("The quick brown fox", 0.0, max_gen_len=30, speculate=kind)
    assert "".join(stream) == want
    (result,) = speculating.text_completion(["The quick brown fox"], 0.0, max_gen_len=30, speculate=kind, details=True)
    assert 0 < stream.guessed_tokens == result["guessed_tokens"]
    assert stream.accepted_tokens == result["accepted_tokens"]
    got = asyncio.run(speculating.atext_completion(["The quick brown fox"], 0.0, max_gen_len=30, speculate=kind))
    assert got[0]["generation"] == want


def test_rows_that_speculate_run_beside_rows_that_do_not(always: None, speculating: Llama) -> None:
    want = [[token.token for token in speculating.generate_stream([p], 30, temperature=0.0)] for p in PROMPTS]
    kinds = ["prompt", False, "draft", None, "prompt"]
    streams = [
        speculating.generate_stream([p], 30, temperature=0.0, speculate=kind)  # type: ignore[arg-type]
        for p, kind in zip(PROMPTS, kinds, strict=True)
    ]
    got: list[list[int]] = [[] for _ in streams]
    waiting = dict(enumerate(map(iter, streams)))
    while waiting:
        for i, stream in [*waiting.items()]:
            if (token := next(stream, None)) is None:
                del waiting[i]
            else:
                got[i].append(token.token)
    assert got == want


def test_a_draft_that_answers_calls_of_its_own_goes_on_guessing(always: None, speculating: Llama, draft: Llama) -> None:
    want = speculating.generate([REPEATING], 40, temperature=0.0)[0][0]
    got = []
    for token in speculating.generate_stream([REPEATING], 40, temperature=0.0, speculate="draft"):
        got.append(token.token)
        if len(got) % 10 == 5:
            draft.generate([[1, 7, 7]], 3, temperature=0.0)
    assert got == want


def test_a_draft_answers_calls_of_other_threads_while_it_guesses(always: None, speculating: Llama, draft: Llama) -> None:
    want = draft.generate([[1, 7, 7]], 20, temperature=0.0), speculating.generate([REPEATING], 20, temperature=0.0)
    with ThreadPoolExecutor() as threads:
        own = [threads.submit(draft.generate, [[1, 7, 7]], 20, temperature=0.0) for _ in range(8)]
        guessed = [threads.submit(speculating.generate, [REPEATING], 20, 0.0, speculate="draft") for _ in range(8)]
        assert [each.result() for each in own] == [want[0]] * 8
        assert [each.result() for each in guessed] == [want[1]] * 8


def test_a_draft_without_rows_keeps_the_cache_of_its_own_calls(always: None, speculating: Llama, draft: Llama) -> None:
    beside = speculating.generate_stream([REPEATING], 40, temperature=0.0, speculate="prompt")
    next(beside)
    speculating.generate([REPEATING], 4, temperature=0.0, speculate="draft")  # in the same batch
    draft.generate([[1, 7, 7]], 2, temperature=0.0)
    assert len([*beside]) > 20
    owner = draft.engine.shared.owner
    assert owner is not None and owner.name == "generate"


def test_a_draft_that_fails_or_is_taken_away_ends_no_answer(
    always: None, small: SimpleNamespace, draft: Llama, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llama = Llama.build(small.folder, small.tokenizer_path, MAX_SEQ_LEN, 4, device="cpu", draft=draft)
    want = llama.generate([REPEATING], 20, temperature=0.0, speculate=False)[0][0]

    def fail(*_: Any) -> Any:
        raise MemoryError("planted")

    beside = llama.generate_stream([REPEATING], 20, temperature=0.0, speculate="prompt")
    first = next(beside).token
    with monkeypatch.context() as patch:
        patch.setattr(DraftGuesser, "_guess", fail)
        assert llama.generate([REPEATING], 20, temperature=0.0)[0] == [want]
    assert [first, *(token.token for token in beside)] == want
    assert "the draft model has failed (MemoryError: planted): its answers go on" in capsys.readouterr().err
    stream = llama.generate_stream([REPEATING], 20, temperature=0.0)
    llama.draft = None
    assert [token.token for token in stream] == want


def test_a_call_from_a_processor_of_the_draft_does_not_wait_for_ever(always: None, speculating: Llama, draft: Llama) -> None:
    def ask(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        speculating.score(["a"], [" b"])
        return logits

    with ThreadPoolExecutor() as threads:
        calls = [threads.submit(draft.generate, [[1, 7]], 6, logits_processor=ask)]
        calls += [threads.submit(speculating.generate, [REPEATING], 30, 0.0, speculate="draft") for _ in range(4)]
        for call in calls:
            assert call.result(timeout=60)


def test_speculation_that_does_not_pay_is_left_out(speculating: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a token more costs as much as a step, no guess is worth it."""
    monkeypatch.setattr(StepCosts, "known", lambda self, n: True)
    monkeypatch.setattr(StepCosts, "seconds", lambda self, n: float(n))
    (result,) = speculating.text_completion([REPEATING], 0.0, details=True, speculate="prompt")
    assert result["guessed_tokens"] == 0


def test_the_default_is_set_at_build_or_later_and_calls_may_turn_it_off(
    always: None, small: SimpleNamespace, draft: Llama
) -> None:
    llama = Llama.build(small.folder, small.tokenizer_path, MAX_SEQ_LEN, 2, device="cpu", draft=draft)
    assert (llama.speculate, llama.draft) == ("draft", draft)
    for value, kind in (("prompt", "prompt"), (False, ""), ("draft", "draft")):
        llama.speculate = value
        assert (llama.speculate or "") == kind
        (result,) = llama.text_completion([REPEATING], 0.0, details=True)
        assert ("guessed_tokens" in result) == bool(kind)
    assert "guessed_tokens" not in llama.text_completion([REPEATING], 0.0, details=True, speculate=False)[0]
    assert copy.deepcopy(llama).speculate == "draft"
    llama.draft = None
    assert llama.speculate is None and "guessed_tokens" not in llama.text_completion([REPEATING], 0.0, details=True)[0]


def test_what_cannot_speculate_is_refused(
    small: SimpleNamespace, speculating: Llama, draft: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(**options: Any) -> Llama:
        return Llama.build(small.folder, small.tokenizer_path, MAX_SEQ_LEN, **{"max_batch_size": 8, "device": "cpu", **options})

    with pytest.raises(InputError, match=r"speculate is 'fast' \(str\); it must be 'prompt', 'draft', or False"):
        speculating.generate([[1, 5]], 3, speculate="fast")
    with pytest.raises(InputError, match=r"the model has no draft; give build\(draft=...\) a smaller model"):
        build().generate([[1, 5]], 3, speculate="draft")
    with pytest.raises(InputError, match="speculate= and draft= need another backend than 'eager'"):
        build(backend="eager", speculate="prompt")
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_weights", lambda *_: pytest.fail("weights were read"))
        with pytest.raises(InputError, match="the draft is built with max_seq_len=64, less than 65 of its model"):
            Llama.build(small.folder, small.tokenizer_path, 65, 8, device="cpu", draft=draft)
        with pytest.raises(InputError, match="speculate='draft', but the model has no draft"):
            build(speculate="draft")
    for other, message in (
        (build(max_batch_size=2), "the draft is built with max_batch_size=2, less than 8 of its model; build it with 8"),
        (build(backend="eager"), "the draft cannot guess: the backend is eager"),
        (speculating, "a model cannot be its own draft"),
        ("small", r"draft is 'small' \(str\); it must be a Llama"),
    ):
        with pytest.raises(InputError, match=message):
            speculating.draft = other  # type: ignore[assignment]
    other_tokens = train_tokenizer(tmp_path / "tokenizer.model", 383)
    write_shards(tmp_path / "model", small.params, random_weights(small.params, 383, 192))
    with pytest.raises(InputError, match="the draft's tokenizer has other tokens"):
        speculating.draft = Llama.build(tmp_path / "model", other_tokens, MAX_SEQ_LEN, 8, device="cpu")
    assert speculating.draft is draft


def test_two_ranks_guess_alike_and_give_the_answers_of_one(small: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = torchrun(2, speculation_worker.__file__, out, small.folder, small.tokenizer_path)
    assert done.returncode == 0, done.stderr
    llama = Llama.build(small.folder, small.tokenizer_path, MAX_SEQ_LEN, 4, device="cpu")
    _, *want = json.loads(json.dumps(speculation_worker.answers(llama)))
    for by_kind in json.loads(out.read_text()).values():
        for kind, (n_accepted, *got) in by_kind.items():
            assert n_accepted > 0 and got == want, kind


def test_a_draft_that_is_modified_or_has_a_draft_is_refused(small: SimpleNamespace) -> None:
    def build(**options: Any) -> Llama:
        return Llama.build(small.folder, small.tokenizer_path, MAX_SEQ_LEN, 2, device="cpu", **options)

    draft = build()
    llama = build(draft=draft)
    with pytest.raises(InputError, match="this model is the draft of another one; a draft has no draft itself"):
        draft.draft = build()
    handle = draft.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match=r"the draft cannot guess: layers\.0 has a hook"):
        llama.generate([[1, 5]], 3)
    handle.remove()
    llama.draft = None
    draft.draft = llama
    with pytest.raises(InputError, match="the draft has a draft itself"):
        build(draft=draft)


def test_a_modified_model_says_that_it_does_not_speculate(small: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    llama = Llama.build(small.folder, small.tokenizer_path, MAX_SEQ_LEN, 2, device="cpu", speculate="prompt")
    llama.model.layers[0].register_forward_hook(lambda *_: None)
    llama.generate([REPEATING], 5, temperature=0.0)
    assert "which is slower and does not speculate" in capsys.readouterr().err
    llama.generate([REPEATING], 5, temperature=0.0, speculate=False)
    llama.generate([REPEATING], 5, temperature=0.0)
    assert "which is slower and does not speculate" in capsys.readouterr().err


@pytest.fixture(params=["float32", "bfloat16", "int8", "int4"])
def packed(request: pytest.FixtureRequest, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Llama]:
    """Build the small model, with weights that are packed although they are small."""
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)
    dtype = "float32" if request.param == "float32" else "bfloat16"
    quantize = request.param if request.param.startswith("int") else None
    yield Llama.build(small.folder, small.tokenizer_path, MAX_SEQ_LEN, 3, device="cpu", dtype=dtype, quantize=quantize)


def test_a_step_of_several_tokens_gives_the_logits_of_single_steps(packed: Llama) -> None:
    engine, rows = packed.engine, [[1, 5, 9, 30, 8, 7, 33], [1, 7, 50, 60, 70, 80, 90], [1, 80, 81, 82, 83, 84, 85]]
    with torch.inference_mode():
        forward = engine.forward()
        decode, decode_runs = engine.backend.begin(forward, 3), engine.backend.begin_runs(forward)
        steps = [decode(torch.tensor([row[i] for row in rows]), torch.full((3,), i), [i] * 3).clone() for i in range(7)]
        forward.cache.data.zero_()
        for first, ends in (((0, 0, 0), (5, 1, 3)), ((5, 1, 3), (7, 7, 7))):
            runs = [Run(row, first[row], rows[row][first[row] : ends[row]]) for row in range(3)]
            want = torch.stack([steps[i][row] for row in range(3) for i in range(first[row], ends[row])])
            exact = forward.is_batch_invariant
            torch.testing.assert_close(decode_runs(runs), want, atol=0 if exact else 0.05, rtol=0)
