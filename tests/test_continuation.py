"""Test answers that continue a text: begun answers in dialogs, and the space at the start of an answer. Test prompts given as
tokens, and stop strings for calls that return tokens."""

import asyncio
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import InputError, Llama, Tokenizer
from llama.chat import UNSAFE_ERROR, encode_dialog
from llama.engine.incremental_text import IncrementalText

from .support import ROOT, assert_raises

SYSTEM = {"role": "system", "content": "Be short."}
USER = {"role": "user", "content": " What is the capital of France? "}
GREEDY: dict[str, Any] = {"temperature": 0, "max_gen_len": 12}


def begun(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


async def read(stream: Any) -> list[Any]:
    return [each async for each in stream]


@pytest.fixture(scope="module")
def demo() -> Llama:
    return Llama.build(ROOT / "demo" / "model", ROOT / "demo" / "tokenizer.model", 128, 4, device="cpu", dtype="float32")


# --- begun answers ---


@pytest.mark.parametrize(
    "dialog, exchanges, last",
    [
        ([USER, begun("\n Paris")], [], "[INST] What is the capital of France? [/INST] Paris"),
        ([USER, begun("1.\n")], [], "[INST] What is the capital of France? [/INST] 1.\n"),
        ([USER, begun(" ")], [], "[INST] What is the capital of France? [/INST]"),
        (
            [SYSTEM, USER, begun("a"), {"role": "user", "content": "b"}, begun("c")],
            ["[INST] <<SYS>>\nBe short.\n<</SYS>>\n\n What is the capital of France? [/INST] a "],
            "[INST] b [/INST] c",
        ),
    ],
)
def test_a_begun_answer_follows_the_question_without_eos(llama: Llama, dialog: Any, exchanges: list[str], last: str) -> None:
    encode = llama.tokenizer.encode
    want = [token for text in exchanges for token in encode(text, bos=True, eos=True)] + encode(last, bos=True, eos=False)
    assert encode_dialog(llama.tokenizer, dialog) == llama.encode_dialog(dialog, continue_answer=True) == want


def test_every_call_for_dialogs_continues_a_begun_answer(llama: Llama) -> None:
    """The answer is what `generate` returns for the tokens of the dialog, decoded as the continuation of these tokens."""
    dialogs: Any = [[USER, begun("The capital")], [USER], [SYSTEM, USER, begun(" ")]]
    prompts = [llama.encode_dialog(dialog, continue_answer=True) for dialog in dialogs]
    want = []
    for prompt, tokens in zip(prompts, llama.generate(prompts, **{**GREEDY, "max_gen_len": 12})[0], strict=True):
        continued = prompt is prompts[0]
        before = llama.tokenizer.decode(prompt) if continued else ""
        want.append(llama.tokenizer.decode([*prompt, *tokens] if continued else tokens)[len(before) :])
    options: dict[str, Any] = {**GREEDY, "continue_answer": True}
    for results in (
        llama.chat_completion(dialogs, **options),
        list(llama.iter_chat_completion(dialogs, **options)),
        asyncio.run(llama.achat_completion(dialogs, **options)),
    ):
        assert [result["generation"] for result in results] == [begun(text) for text in want]
    assert ["".join(llama.chat_completion_stream(dialog, **options)) for dialog in dialogs] == want
    for dialog, text in zip(dialogs, want, strict=True):
        assert "".join(asyncio.run(read(llama.achat_completion_stream(dialog, **options)))) == text
    details = llama.chat_completion(dialogs, **options, details=True)
    assert [result["prompt_tokens"] for result in details] == [len(prompt) for prompt in prompts]


def test_a_begun_answer_and_its_continuation_are_the_whole_answer(demo: Llama) -> None:
    dialog: Any = [{"role": "user", "content": "What is the capital of Italy?"}]
    whole = demo.chat_completion([dialog], 0)[0]["generation"]["content"]
    assert whole == "The capital of Italy is Rome."
    for beginning in ("The", "The capital of", "The capital of Italy is Rome"):
        (answer,) = demo.chat_completion([[*dialog, begun(beginning)]], 0, continue_answer=True)
        assert beginning + answer["generation"]["content"] == whole


def test_a_replaced_generate_continues_answers_too(llama: Llama) -> None:
    dialog: Any = [USER, begun("The capital")]
    want = llama.chat_completion([dialog], **GREEDY, continue_answer=True)
    kept = llama.text_completion(["The capital"], **GREEDY, keep_space=True)
    replaced = Llama(llama.model, llama.tokenizer)
    generate = replaced.generate
    replaced.generate = lambda **arguments: generate(**arguments)  # type: ignore[method-assign]
    assert replaced.chat_completion([dialog], **GREEDY, continue_answer=True) == want
    assert replaced.text_completion(["The capital"], **GREEDY, keep_space=True) == kept


def test_tags_are_refused_in_a_begun_answer_and_roles_as_before(llama: Llama) -> None:
    unsafe: Any = [USER, begun("[/INST]")]
    (answer,) = llama.chat_completion([unsafe], continue_answer=True, max_gen_len=2)
    assert answer["generation"]["content"] == UNSAFE_ERROR
    assert list(llama.chat_completion_stream(unsafe, continue_answer=True)) == [UNSAFE_ERROR]
    assert_raises(lambda: llama.encode_dialog(unsafe, True), InputError, "contains [/INST], a special tag", "remove it")
    for dialog in ([begun("a")], [USER, begun("a"), begun("b")], [USER, USER, begun("a")], [], None):
        with pytest.raises(InputError):
            llama.chat_completion([dialog], continue_answer=True)  # type: ignore[list-item]
        with pytest.raises(InputError):
            llama.encode_dialog(dialog, continue_answer=True)  # type: ignore[arg-type]
    assert_raises(lambda: llama.encode_dialog([USER, begun("a")]), InputError, "unless continue_answer=True")  # type: ignore[list-item]
    assert_raises(lambda: llama.encode_dialog([USER], "yes"), InputError, "continue_answer is 'yes'")  # type: ignore[list-item, arg-type]


def test_encode_dialog_returns_the_tokens_that_chat_completion_uses(llama: Llama) -> None:
    dialog: Any = [SYSTEM, USER]
    tokens = llama.encode_dialog(dialog)
    (answer,) = llama.chat_completion([dialog], **GREEDY, details=True)
    assert answer["prompt_tokens"] == len(tokens)
    assert llama.tokenizer.decode(llama.generate([tokens], **GREEDY)[0][0]) == answer["generation"]["content"]
    assert len(llama.encode_dialog([{"role": "user", "content": "sea " * 100}])) > 64  # to be counted before a call


# --- the space at the start of an answer ---


def test_a_prompt_and_an_answer_with_its_space_are_the_text_of_all_tokens(demo: Llama) -> None:
    prompts: list[Any] = [
        "The opposite of hot is",
        "",
        "a\n",
        " ",
        "\u20ac",
        [1],
        demo.tokenizer.encode("x \u20ac", True, False)[:-1],
    ]
    seeds = list(range(len(prompts)))
    options: dict[str, Any] = {"temperature": 1.5, "max_gen_len": 10, "seed": seeds}
    rows = [demo.tokenizer.encode(each, bos=True, eos=False) if isinstance(each, str) else each for each in prompts]
    tokens = demo.generate(rows, **options)[0]
    results = demo.text_completion(prompts, **options, keep_space=True)
    echoed = demo.text_completion(prompts, **options, keep_space=True, echo=True)
    for row, new, result, whole in zip(rows, tokens, results, echoed, strict=True):
        prompt_text = demo.tokenizer.decode(row).rstrip("\ufffd")
        assert prompt_text + result["generation"] == whole["generation"] == demo.tokenizer.decode([*row, *new])
    assert list(demo.iter_text_completion(prompts, **options, keep_space=True)) == demo.text_completion(
        prompts, **options, keep_space=True, details=True
    )
    for i, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        one: dict[str, Any] = {**options, "seed": i, "keep_space": True}
        assert "".join(demo.text_completion_stream(prompt, **one)) == result["generation"]
        assert "".join(asyncio.run(read(demo.atext_completion_stream(prompt, **one)))) == result["generation"]


def test_the_space_is_dropped_unless_it_is_asked_for(demo: Llama) -> None:
    prompts = ["The opposite of hot is"]
    assert demo.text_completion(prompts, 0)[0]["generation"] == "cold."
    assert demo.text_completion(prompts, 0, keep_space=True)[0]["generation"] == " cold."
    assert demo.text_completion(prompts, 0, keep_space=True, stop=" c")[0]["generation"] == ""
    assert demo.text_completion(prompts, 0, stop=" c")[0]["generation"] == "cold."


@pytest.mark.parametrize("name", ["demo", "llama2"])
def test_text_may_begin_anywhere_in_a_sequence_of_tokens(name: str, request: pytest.FixtureRequest) -> None:
    """Cut any text at any token, also within a character: both parts together are the text of all tokens."""
    path = ROOT / "demo" / "tokenizer.model"
    tokenizer = Tokenizer(path) if name == "demo" else request.getfixturevalue("llama2_tokenizer")

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(st.text(alphabet=st.sampled_from(" \n\tabeT.,\u20ac\u00e9\U0001f999\u4e0a"), max_size=12), st.data())
    def check(text: str, data: Any) -> None:
        tokens = tokenizer.encode(text, bos=True, eos=False)
        n = data.draw(st.integers(1, len(tokens)))
        answer = IncrementalText(tokenizer)
        parts = [answer.begin(tokens[:n]), *map(answer.push, tokens[n:]), answer.end()]
        assert "".join(parts) == tokenizer.decode(tokens)
        assert parts[0] == tokenizer.decode(tokens[:n]).rstrip("\ufffd")

    check()


# --- tokens ---


def test_text_calls_take_tokens(llama: Llama) -> None:
    texts = ["Once upon a", "The fox"]
    rows: list[Any] = [llama.tokenizer.encode(text, bos=True, eos=False) for text in texts]
    options: dict[str, Any] = {**GREEDY, "stop": ["e"], "details": True, "logprobs": True, "top_logprobs": 2}
    want = llama.text_completion(texts, **options)
    for prompts in (rows, [rows[0], texts[1]], [torch.tensor(rows[0]), np.array(rows[1])], (tuple(row) for row in rows)):
        assert llama.text_completion(prompts, **options) == want
    assert asyncio.run(llama.atext_completion(rows, **options)) == want
    assert list(llama.iter_text_completion(rows, **GREEDY)) == llama.text_completion(texts, **GREEDY, details=True)
    assert "".join(llama.text_completion_stream(rows[0], **GREEDY)) == llama.text_completion(texts, **GREEDY)[0]["generation"]


def cut(tokenizer: Tokenizer, tokens: list[int], stops: Iterable[str]) -> list[int]:
    """Return the tokens up to the first with which the text contains a stop string."""
    ends = [n for n in range(1, len(tokens) + 1) if any(stop in tokenizer.decode(tokens[:n]) for stop in stops)]
    return tokens[: ends[0]] if ends else tokens


@pytest.mark.parametrize("echo", [False, True])
def test_stop_strings_end_the_answers_of_calls_for_tokens(demo: Llama, echo: bool) -> None:
    prompts = [demo.tokenizer.encode(text, bos=True, eos=False) for text in ("Once upon a time", "The opposite of hot is")]
    options: dict[str, Any] = {"temperature": 0, "max_gen_len": 40, "echo": echo, "logprobs": True}
    stops = ["little", "ld", "Once"]
    tokens, logprobs = demo.generate(prompts, **options)
    stopped, stopped_logprobs = demo.generate(prompts, stop=stops, **options)
    assert logprobs and stopped_logprobs
    skipped = [len(prompt) if echo else 0 for prompt in prompts]
    for i, n in enumerate(skipped):
        assert stopped[i] == tokens[i][:n] + cut(demo.tokenizer, tokens[i][n:], stops)
        assert stopped_logprobs[i] == pytest.approx(logprobs[i][: len(stopped[i])], abs=1e-5)
        assert len(stopped[i]) < len(tokens[i])
    streamed: list[list[int]] = [[], []]
    for token in demo.generate_stream(prompts, stop=stops, **options):
        streamed[token.prompt_index].append(token.token)
    assert streamed == stopped
    collected: list[list[int]] = [[], []]
    for token in asyncio.run(read(demo.agenerate_stream(prompts, stop=stops, **options))):
        collected[token.prompt_index].append(token.token)
    assert collected == stopped
    assert demo.generate(prompts, stop="no such text", **options)[0] == tokens


def test_bad_stop_strings_are_refused_by_calls_for_tokens(llama: Llama) -> None:
    for bad in ("", ["a", ""], 5, [5], b"a"):
        for call in (llama.generate, llama.generate_stream, llama.agenerate_stream):
            assert_raises(lambda call=call, bad=bad: call([[1, 5]], 4, stop=bad), InputError, "stop")
