"""Test `logits_processor`: what it sees, masks, errors, and rows of a batch with and without one."""

import asyncio
from typing import Any

import pytest
import torch

from llama import InputError, Llama, Transformer
from llama.engine.decode_state import ProcessedRow

from .support import Fault, assert_raises

PROMPTS = [[1, 5], [1, 9, 30, 7], [1, *range(20, 40)]]
TEXTS = ["The fox", "a", "He said"]
DIALOG: Any = [{"role": "user", "content": "hi"}]


def only(*allowed: int) -> Any:
    """Return a processor that lets only these tokens be chosen."""

    def mask(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        masked = torch.full_like(logits, -torch.inf)
        masked[[*allowed]] = logits[[*allowed]]
        return masked

    return mask


def spell(tokens: list[int], prompt_length: int = 2) -> Any:
    """Return a processor that lets only this answer be chosen."""
    return lambda before, logits: only(tokens[len(before) - prompt_length])(before, logits)


def broken(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
    raise Fault(f"after {len(tokens)} tokens")


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_processor_sees_prompt_and_answer_and_the_models_logits(
    any_way: Llama, reference: Transformer, temperature: float
) -> None:
    seen: list[tuple[list[int], torch.Tensor]] = []

    def watch(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        assert logits.dtype == torch.float32 and logits.shape == (384,)
        seen.append((tokens[:], logits.clone()))
        tokens.append(999)  # the list is the processor's own
        return logits

    options: dict[str, Any] = dict(max_gen_len=6, temperature=temperature, seed=2)
    plain, logprobs = any_way.generate(PROMPTS * 3, logprobs=True, **options)
    watched = any_way.generate(PROMPTS * 3, logprobs=True, logits_processor=[watch, None, None] * 3, **options)
    assert watched[0] == plain and watched[1] == logprobs
    want = [[*PROMPTS[0], *plain[0][:n]] for n in range(len(plain[0]) + (len(plain[0]) < 6))]
    assert sorted(tokens for tokens, _ in seen) == sorted(want * 3)
    for tokens, logits in seen:
        assert torch.allclose(logits, reference.forward(torch.tensor([tokens]), 0)[0, -1].float(), atol=1e-4)


def test_a_processor_sees_the_logits_after_biases_and_penalties_and_before_the_temperature(llama: Llama) -> None:
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda tokens, logits: seen.setdefault(name, logits.clone())

    eos = llama.tokenizer.eos_id
    llama.generate([[1, 5]], 1, 0.3, logits_processor=keep("plain"))
    llama.generate([[1, 5]], 1, 0.3, logits_processor=keep("all"), logit_bias={8: 5}, repetition_penalty=2.0, min_new_tokens=1)
    want = seen["plain"].clone()
    want[8] += 5
    want[[1, 5]] = torch.where(want[[1, 5]] > 0, want[[1, 5]] / 2, want[[1, 5]] * 2)
    want[eos] = -torch.inf
    assert torch.equal(seen["all"], want)


def test_masks_hold_beside_rows_without_one_with_stops_and_seeds_and_n(any_way: Llama) -> None:
    options: dict[str, Any] = dict(temperature=1.2, seed=[5, 6, 7], max_gen_len=8)
    plain = any_way.generate(PROMPTS, n=3, **options)[0]
    mask = only(50, 51, any_way.tokenizer.eos_id)
    masked = any_way.generate(PROMPTS, n=3, logits_processor=[None, mask, None], **options)[0]
    assert masked[:3] + masked[6:] == plain[:3] + plain[6:]
    assert {token for row in masked[3:6] for token in row} <= {50, 51} and len({str(row) for row in masked[3:6]}) > 1
    text = any_way.tokenizer.encode("sea shells", bos=False, eos=False)
    first = len(any_way.tokenizer.encode("a", bos=True, eos=False))
    for result in any_way.text_completion(["a"] * 2, 1.5, stop="shel", logits_processor=spell(text, first), max_gen_len=9):
        assert result["generation"] == any_way.tokenizer.decode(text).partition("shel")[0]


def test_streams_dialogs_and_async_calls_have_processors(llama: Llama) -> None:
    processor = only(*range(60, 70))
    options: dict[str, Any] = dict(temperature=1.0, seed=3, max_gen_len=5, logits_processor=processor)
    (text,) = llama.text_completion(["a"], **options)
    (answer,) = llama.chat_completion([DIALOG], **options)
    assert "".join(llama.text_completion_stream("a", **options)) == text["generation"]
    assert "".join(llama.chat_completion_stream(DIALOG, **options)) == answer["generation"]["content"]
    assert next(llama.iter_text_completion(["a"], **options))["generation"] == text["generation"]

    async def run() -> Any:
        chunks = [chunk async for chunk in llama.atext_completion_stream("a", **options)]
        plain, *masked = await asyncio.gather(
            llama.atext_completion(["a"], 0, max_gen_len=5), llama.atext_completion(["a"], **options),
            llama.achat_completion([DIALOG], **options),
        )  # fmt: skip
        return "".join(chunks), plain, masked

    chunks, plain, masked = asyncio.run(run())
    assert chunks == text["generation"] and masked == [[text], [answer]]
    assert plain == llama.text_completion(["a"], 0, max_gen_len=5)


def test_an_exception_ends_only_its_own_call(llama: Llama) -> None:
    want = llama.text_completion(TEXTS, 0, max_gen_len=8)

    async def run() -> Any:
        bad = [llama.atext_completion(TEXTS, 0, logits_processor=[None, broken, None]) for _ in range(2)]
        return await asyncio.gather(llama.atext_completion(TEXTS, 0, max_gen_len=8), *bad, return_exceptions=True)

    good, *failed = asyncio.run(run())
    assert good == want and [type(each) for each in failed] == [Fault] * 2
    with pytest.raises(Fault, match="after 2 tokens"):
        asyncio.run(llama.atext_completion(["a"], logits_processor=broken))
    with llama.text_completion_stream("He said", 0, max_gen_len=8) as stream:
        begun = next(stream)
        with pytest.raises(Fault, match="after 2 tokens"):
            llama.text_completion(["a"], logits_processor=broken)
        assert begun + "".join(stream) == want[2]["generation"]


def test_the_first_exception_is_the_callers_own_in_every_way(any_way: Llama) -> None:
    with pytest.raises(Fault, match="after 4 tokens"):
        any_way.generate(PROMPTS, 5, logits_processor=[None, broken, None])
    assert len(any_way.generate(PROMPTS, 5)[0]) == 3


@pytest.mark.parametrize(
    "returned, part",
    [
        (lambda logits: logits.fill_(-torch.inf), "has set all logits to -inf; it must leave a token to choose"),
        (lambda logits: logits * torch.nan, "has returned nan; logits are finite, or -inf"),
        (lambda logits: logits + torch.inf, "has returned inf"),
        (lambda logits: None, "has returned None (NoneType); it must return the logits, a tensor of shape (384,)"),
        (lambda logits: logits.tolist(), "has returned ["),
        (lambda logits: logits[None], "has returned Tensor of shape (1, 384)"),
    ],
)  # fmt: skip
def test_what_a_processor_may_not_return_is_one_clear_error(any_way: Llama, returned: Any, part: str) -> None:
    processor = [None, lambda _, logits: returned(logits), None]
    for temperature in (0, 1.0):
        call = lambda: any_way.generate(PROMPTS, 5, temperature, logits_processor=processor)  # noqa: B023, E731
        assert_raises(call, InputError, "prompt 1: its logits processor ", part)


def test_what_is_no_processor_is_refused(llama: Llama) -> None:
    for bad in (5, "x", [None, 5, None]):
        assert_raises(lambda bad=bad: llama.generate(PROMPTS, 5, logits_processor=bad), InputError, "logits_processor is")  # type: ignore[misc]


def test_a_call_without_processors_does_nothing_for_them(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProcessedRow, "process", lambda *_: pytest.fail("a processor ran"))
    llama.generate(PROMPTS, 3, logits_processor=[None] * 3)


def test_a_processor_that_calls_its_model_is_refused(llama: Llama) -> None:
    def calls(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        llama.generate([[1]], 1)
        return logits

    assert_raises(lambda: llama.generate([[1, 5]], 3, logits_processor=calls), InputError, "called its own model during a step")
