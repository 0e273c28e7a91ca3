"""Test that bad arguments, prompts and dialogs raise a LlamaError before any work, which names the value and the limit."""

import collections
import math
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import DeviceError, InputError, Llama, LlamaError, SamplingParams, Tokenizer, validate_options
from llama.engine.forward import EngineForward

from .support import assert_raises


@pytest.fixture
def idle(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> Llama:
    """Return a small model with max_seq_len=64 and max_batch_size=6 that fails the test if it computes anything."""
    monkeypatch.setattr(EngineForward, "hidden_states", lambda *_, **__: pytest.fail("the model ran"))
    return llama


# --- generate --------------------------------------------------------------------------------------------------------

TOKENS, LISTS = "tokens are whole numbers from 0 to 383", "a list of lists of tokens"


@pytest.mark.parametrize(
    "prompts, parts",
    [
        *[(bad, (f"{bad!r:.10}", LISTS)) for bad in (None, 5, "abc", b"abc", {"a": [1]}, {1, 2}, torch.tensor(1))],
        *[([[1], bad], ("prompt 1", f"{bad!r:.10}", "a list of tokens")) for bad in (None, 5, "ab", b"ab", {1: 2})],
        *[([[1], [5, bad]], ("prompt 1", f"{bad!r:.10}", TOKENS)) for bad in (384, -1, True, 1.0, "a", None, [1], 10**400)],
        (torch.ones(1, 2), ("prompt 0: 1.0 (float)", TOKENS)),
        ([[1], []], ("prompt 1 has no tokens", "begin it with BOS (1)")),
        ([[1], [1] * 65], ("prompt 1 has 65 tokens", "max_seq_len=64", "shorten it", "larger max_seq_len")),
    ],
    ids=lambda value: f"{value!r:.30}" if not isinstance(value, tuple) else "",
)
def test_generate_refuses_bad_prompts(idle: Llama, prompts: Any, parts: tuple) -> None:
    """Check that both `generate` and `generate_stream` raise when they are called. A stream must not raise only when its first
    token is read."""
    assert_raises(lambda: idle.generate(prompts, 4, temperature=0), InputError, *parts)
    assert_raises(lambda: idle.generate_stream(prompts, 4, temperature=0), InputError, *parts)


@pytest.mark.parametrize(
    "name, value, limit",
    [
        *[
            ("temperature", bad, "from 0 (the likeliest token) to 1e30")
            for bad in (math.nan, math.inf, -0.1, -1, "0", True, 10**400)
        ],
        *[("top_p", bad, "from 0 to 1") for bad in (math.nan, -0.1, 1.01, math.inf, "0.9", True, 1j)],
        *[("max_gen_len", bad, "a whole number, 0 or more") for bad in (-1, 4.0, True, "4", math.nan)],
    ],
    ids=lambda value: f"{value!r:.20}",
)
def test_bad_sampling_arguments_are_refused(idle: Llama, name: str, value: Any, limit: str) -> None:
    arguments = {"temperature": 0.6, "top_p": 0.9, "max_gen_len": 4} | {name: value}
    parts = (f"{name} is {value!r:.20}", limit)
    assert_raises(lambda: idle.generate([[1, 5]], **arguments), InputError, *parts)
    assert_raises(lambda: idle.text_completion(["a"], **arguments), InputError, *parts)
    assert_raises(lambda: idle.chat_completion([[USER]], **arguments), InputError, *parts)


def test_none_means_the_default_of_each_option(llama: Llama) -> None:
    """Many programs pass None for an option that is not set."""
    assert SamplingParams(None, None, None, None, None) == SamplingParams(0.6, 0.9, 0, 0.0, 1.0) == SamplingParams()
    sampling = dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias"))
    tokens, texts, dialogs = [[1, 5, 9]], ["once upon"], [[USER]]
    for call, argument, *names in (
        (llama.generate, tokens, "logprobs", "echo", "stop_token", "stop"),
        (llama.generate_stream, tokens, "logprobs", "echo", "top_logprobs", "include_eos", "stop"),
        (llama.text_completion, texts, "logprobs", "echo", "stop", "details", "top_logprobs", "keep_space"),
        (llama.chat_completion, dialogs, "logprobs", "stop", "details", "top_logprobs", "continue_answer"),
        (llama.iter_text_completion, texts, "stop", "keep_space"),
        (llama.iter_chat_completion, dialogs, "stop", "continue_answer"),
        (llama.text_completion_stream, texts[0], "stop", "keep_space"),
        (llama.chat_completion_stream, dialogs[0], "stop", "continue_answer"),
    ):
        nones = sampling | dict.fromkeys(names)
        default, with_none = (call(argument, max_gen_len=20, seed=4, **options) for options in ({}, nones))
        results = [result if isinstance(result, tuple) else list(result) for result in (default, with_none)]
        assert results[0] == results[1] and results[0]
    assert llama.generate(tokens, None, 0) == llama.generate(tokens, 64, 0)  # None: the rest of the context


def test_the_traceback_of_a_refused_call_contains_no_internal_frames(idle: Llama, tmp_path: Path) -> None:
    """A notebook prints several lines of code for each frame. The frames of the caller stay, also those that a call runs."""

    def prompts() -> Iterator[str]:
        yield idle.tokenizer.decode([-1])

    here = Path(__file__).name
    for call, frames in (
        (lambda: idle.text_completion("a string"), [here, "errors.py"]),
        (lambda: idle.chat_completion([USER]), [here, "errors.py"]),
        (lambda: idle.generate([[1]], 4, temperature=-1), [here, "errors.py"]),
        (lambda: idle.generate_stream([[384]], 4), [here, "errors.py"]),
        (lambda: idle.text_completion_stream("a", stop=""), [here, "errors.py"]),
        (lambda: idle.iter_chat_completion([[]]), [here, "errors.py"]),
        (lambda: idle.score(["a"], []), [here, "errors.py"]),
        (lambda: idle.text_completion(prompts()), [here, "errors.py", here]),
        (lambda: Llama.build(tmp_path / "none", "tokenizer.model", 16, 2, device="cpu"), [here, "errors.py"]),
        (lambda: validate_options(top_p=2), [here, "errors.py"]),
    ):
        with pytest.raises(LlamaError) as raised:
            call()
        names = [Path(frame.filename).name for frame in traceback.extract_tb(raised.value.__traceback__)]
        assert names[1:] == frames and raised.value.__cause__ is None and raised.value.__suppress_context__


@pytest.mark.parametrize("value", ["yes", 2, [True], torch.tensor([1, 0]), {}], ids=str)
def test_flags_must_be_true_or_false(idle: Llama, small: SimpleNamespace, value: Any) -> None:
    for name in ("logprobs", "echo", "details", "keep_space"):
        assert_raises(lambda name=name: idle.text_completion(["a"], **{name: value}), InputError, f"{name} is", "True or False")
    for name in ("logprobs", "details", "continue_answer"):
        assert_raises(
            lambda name=name: idle.chat_completion([[USER]], **{name: value}), InputError, f"{name} is", "True or False"
        )
    assert_raises(lambda: Llama.build("m", "t", 16, 2, device="cpu", compile=value), InputError, "compile is", "True or False")


def test_errors_shorten_values_whose_full_text_would_be_endless(idle: Llama) -> None:
    """Pass lists that are nested 40 deep. Each list contains the previous list three times, so the full repr would print 3**40
    lists."""
    nested: Any = []
    for _ in range(40):
        nested = [nested, nested, nested]
    assert_raises(lambda: idle.chat_completion([nested]), InputError, "dialog 0")
    assert_raises(lambda: idle.generate([[1, nested]], 4), InputError, "prompt 0")
    assert_raises(lambda: idle.generate([[1]], 4, temperature=nested), InputError, "temperature")
    assert_raises(lambda: idle.tokenizer.decode([nested]), InputError, "the tokens to decode")
    assert_raises(
        lambda: idle.chat_completion([[{"x" * 10**6: nested} | {i: nested for i in range(10**5)}]]), InputError, "has no 'role'"
    )
    for size in (nested, 10**5000, "9" * 10**6):
        assert_raises(lambda size=size: Llama.build("m", "t", model_parallel_size=size), DeviceError, "model_parallel_size is")
        assert_raises(lambda size=size: Llama.build("m", "t", device=size), DeviceError, "is not a device")
    ordered_dict = collections.OrderedDict(a=nested)
    assert_raises(lambda: idle.chat_completion(ordered_dict), InputError, "dialogs is {'a': [[[...], [...], [...]]")
    assert_raises(lambda: idle.chat_completion([[[{"role": "user"}]], 5]), InputError, "give one dialog here")
    assert_raises(lambda: idle.generate([{"a": {"b": {"c": {"d": 1}}}}], 4), InputError, "{'a': {'b': {'c': {...}}}} (dict)")


def test_a_temperature_close_to_zero_samples_the_likeliest_token(llama: Llama) -> None:
    """Use temperatures so small that logits divided by the temperature overflow to infinity. Their softmax would be NaN."""
    greedy = llama.generate([[1, 5], [1, 9]], 6, temperature=0)
    assert llama.generate([[1, 5], [1, 9]], 6, temperature=1e-40) == greedy
    assert llama.generate([[1, 5], [1, 9]], 6, temperature=1e-300) == greedy


# --- texts and dialogs -----------------------------------------------------------------------------------------------

TEXTS, SURROGATE = "a list of texts, as in [text]", ("a lone surrogate", r"'\ud800' at 2", "no character", "UTF-8")


@pytest.mark.parametrize(
    "prompts, parts",
    [
        *[(bad, (f"{bad!r:.10}", TEXTS)) for bad in (None, 5, "once", b"once", {"a": 1}, {"a"})],
        *[(["a", bad], ("prompt 1", f"{bad!r:.10}", "must be a string, or a list of tokens")) for bad in (None, 5, b"a")],
        (["a", ["a"]], ("prompt 1: 'a' (str) is no token", "whole numbers from 0 to 383")),
        (["a", [1, 384]], ("prompt 1: 384 (int) is no token", "whole numbers from 0 to 383")),
        (["a", []], ("prompt 1 has no tokens", "begin it with BOS")),
        (["a", "ab\ud800"], ("prompt 1", *SURROGATE)),
        (["a", "b" * 100], ("prompt 1 has 101 tokens", "max_seq_len=64", "shorten it")),
    ],
    ids=lambda value: f"{value!r:.30}" if not isinstance(value, tuple) else "",
)
def test_text_completion_refuses_bad_prompts(idle: Llama, prompts: Any, parts: tuple) -> None:
    assert_raises(lambda: idle.text_completion(prompts), InputError, *parts)


def message(role: Any, content: Any = "hello") -> dict:
    return {"role": role, "content": content}


SYSTEM, USER, ASSISTANT = message("system"), message("user"), message("assistant")
ORDER = "then 'user' and 'assistant' in turn"


@pytest.mark.parametrize(
    "dialog, parts",
    [
        *[(bad, (f"{bad!r:.10}", "a list of messages, {'role'")) for bad in (None, 5, "hello", USER, {1, 2})],
        *[
            ([USER, bad], ("message 1", f"{bad!r:.10}", "a dict with 'role' and 'content'"))
            for bad in (None, "hello", ["user"])
        ],
        ([], ("is empty", "must end with a 'user' message")),
        ([SYSTEM], ("only a system message", "must end with a 'user' message")),
        ([ASSISTANT], ("message 0 is by 'assistant'", "must be by 'user'", ORDER, "begin with the user's question")),
        ([SYSTEM, ASSISTANT, USER], ("message 1 is by 'assistant'", "must be by 'user'", ORDER)),
        ([SYSTEM, SYSTEM, USER], ("message 1 is by 'system'", "must be by 'user'", ORDER, "merge messages 0 and 1: join")),
        ([USER, USER], ("message 1 is by 'user'", "must be by 'assistant'", ORDER, "merge messages 0 and 1: join")),
        ([USER, ASSISTANT, ASSISTANT], ("message 2 is by 'assistant'", "must be by 'user'", "merge messages 1 and 2: join")),
        ([USER, SYSTEM, USER], ("message 1 is by 'system'", "must be by 'assistant'", ORDER, "merge all system messages")),
        ([USER, ASSISTANT], ("ends with 'assistant'", "must be by 'user'", "unless continue_answer=True")),
        *[
            ([message(bad)], ("message 0", f"{bad!r:.10}", "'system', 'user' and"))
            for bad in ("bot", "User", None, 5, [], {}, b"user")
        ],
        ([USER, {"role": "assistant"}], ("message 1 has no 'content'", "['role']")),
        ([{"content": "hello", 5: 6}], ("message 0 has no 'role'", "['content', 5]")),
        *[
            ([message("user", bad)], ("message 0", f"{bad!r:.10}", "must be a string"))
            for bad in (None, 5, b"a", ["a"], {"a": 1})
        ],
        ([message("user", "ab\ud800")], ("message 0", *SURROGATE)),
        ([message("user", "b" * 100)], ("has 116 tokens", "max_seq_len=64", "shorten it")),
    ],
    ids=lambda value: f"{value!r:.40}" if not isinstance(value, tuple) else "",
)
def test_chat_completion_refuses_bad_dialogs(idle: Llama, dialog: Any, parts: tuple) -> None:
    """Check that the error names the index of the bad dialog. The index also counts dialogs with special tags,
    although these are never encoded."""
    assert_raises(lambda: idle.chat_completion([[message("user", "[INST]")], [USER], dialog]), InputError, "dialog 2", *parts)


def test_dialogs_must_be_a_list_of_dialogs(idle: Llama) -> None:
    for bad in (None, 5, "hello", USER, {1, 2}):
        assert_raises(
            lambda bad=bad: idle.chat_completion(bad), InputError, f"dialogs is {bad!r:.10}", "must be a list of dialogs"
        )
    assert_raises(
        lambda: idle.chat_completion([USER]), InputError, "dialog 0 is {'role': 'user'", "here a list of dialogs is needed"
    )


def test_the_tokenizer_refuses_bad_texts_and_tokens(tokenizer: Tokenizer) -> None:
    for bad in (None, 5, b"a", ["a"]):
        assert_raises(lambda bad=bad: tokenizer.encode(bad, bos=True, eos=False), InputError, f"{bad!r}", "must be a string")
    assert_raises(lambda: tokenizer.encode("a", bos=torch.tensor([1, 0]), eos=False), InputError, "bos is", "True or False")
    assert_raises(lambda: tokenizer.encode("ab\ud800c", bos=True, eos=False), InputError, *SURROGATE)
    for bad in (384, -1, 10**400):
        assert_raises(lambda bad=bad: tokenizer.decode([5, bad]), InputError, f"{bad!r:.20}", "out of range", "0 to 383")
    for bad in (None, 5.0, "ab", [1.0], ["a"], [None], [[1]]):
        assert_raises(lambda bad=bad: tokenizer.decode(bad), InputError, f"{bad!r}", "a list of whole numbers")
    assert tokenizer.decode(torch.tensor(tokenizer.encode("sea shells", True, True))) == "sea shells"
    assert tokenizer.decode(300) == tokenizer.decode([300]) != ""


def test_a_refused_call_does_not_change_the_next_answer(llama: Llama) -> None:
    before = llama.generate([[1, 5, 9], [1, 7]], 8, temperature=0, logprobs=True)
    for prompts, options in (
        ([[1, 384]], {}),
        ([[]], {}),
        ([[1] * 65], {}),
        ([[1]], {"top_p": 2}),
        (None, {}),
    ):
        assert_raises(lambda p=prompts, o=options: llama.generate(p, 8, **o), InputError)
        assert_raises(lambda: llama.chat_completion([[ASSISTANT]]), InputError)
        assert llama.generate([[1, 5, 9], [1, 7]], 8, temperature=0, logprobs=True) == before


def test_a_list_of_dialogs_in_place_of_one_dialog_is_refused(idle: Llama) -> None:
    dialog = [USER]
    for call in (lambda: idle.chat_completion_stream([dialog]), lambda: idle.chat_completion([[dialog]])):
        assert_raises(call, InputError, "give one dialog here, not a list of dialogs")
