"""Test the HTTP server: OpenAI's wire format, refusals by name, limits, clients that leave, and signals.

Most tests run the application in a thread of the test's process, and talk to it over loopback; some start the command.
"""

import asyncio
import base64
import hashlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import Llama, tuning
from llama.chat import UNSAFE_ERROR
from llama.distributed import control
from llama.engine.async_calls import AsyncTokens
from llama.engine.decode_state import DecodeState
from llama.engine.requests import GeneratedToken
from llama.engine.step_costs import StepCosts

from .support import environment

uvicorn = pytest.importorskip("uvicorn", reason="the server needs the extra serve")
pytest.importorskip("starlette", reason="the server needs the extra serve")

import llama.cli.serve as serve_module  # noqa: E402
from llama.cli.main import main  # noqa: E402
from llama.cli.serve import listening_socket, server_config  # noqa: E402
from llama.engine.incremental_text import IncrementalText  # noqa: E402
from llama.server import app as app_module  # noqa: E402
from llama.server.app import App, Settings  # noqa: E402
from llama.server.metrics import Histogram  # noqa: E402

JSON = {"Content-Type": "application/json"}
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


class Client:
    """A server in a thread, and requests to it."""

    def __init__(self, llama: Llama, **settings: Any) -> None:
        self.socket = listening_socket("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        config = server_config(llama, Settings("small", **settings), grace=1)
        self.app: App = config.app
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)

    def begin(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, raw, (JSON if body is not None else {}) | headers)
        return connection.getresponse()

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        response = self.begin("GET", path, **headers)
        return response.status, response.read().decode()

    def post(self, path: str, body: Any = None, **fields: Any) -> tuple[int, Any]:
        response = self.begin("POST", path, fields if body is None else body)
        return response.status, json.loads(response.read())

    def stream(self, path: str, **fields: Any) -> list[Any]:
        """Return the events of a stream, which must end with [DONE]."""
        response = self.begin("POST", path, {**fields, "stream": True})
        assert response.status == 200 and response.headers["content-type"].startswith("text/event-stream")
        *events, done, end = response.read().decode().split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.fixture(scope="module")
def client(shared_llama: Llama) -> Iterator[Client]:
    client = Client(shared_llama)
    yield client
    client.stop()


@pytest.fixture
def start(llama: Llama) -> Iterator[Callable[..., Client]]:
    clients: list[Client] = []
    yield lambda **settings: (clients.append(Client(llama, **settings)), clients[-1])[1]
    for each in clients:
        each.stop()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Return an event that each step of the batch waits for."""
    gate, sample = threading.Event(), DecodeState.sample

    def wait_and_sample(state: Any, **options: Any) -> Any:
        assert gate.wait(30)
        return sample(state, **options)

    monkeypatch.setattr(DecodeState, "sample", wait_and_sample)
    yield gate
    gate.set()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_chat_gets_the_answer_of_chat_completion(client: Client, llama: Llama) -> None:
    for options in ({"temperature": 0}, {"temperature": 1.5, "seed": 7, "top_k": 9, "min_p": 0.01, "repetition_penalty": 1.2}):
        (want,) = llama.chat_completion([MESSAGES], top_p=1.0, max_gen_len=12, details=True, **options)  # type: ignore[list-item, arg-type]
        status, answer = client.post(CHAT, messages=MESSAGES, model="small", max_tokens=12, **options)
        (choice,) = answer["choices"]
        assert status == 200 and answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
        assert choice["message"] == {**want["generation"], "refusal": None}
        assert choice["finish_reason"] == want["finish_reason"] and choice["index"] == 0
        sizes = want["prompt_tokens"], want["new_tokens"]
        *counts, details = answer["usage"].values()
        assert (*counts,) == (*sizes, sum(sizes)) and details.keys() == {"cached_tokens"}
        events = client.stream(
            CHAT, messages=MESSAGES, max_completion_tokens=12, stream_options={"include_usage": True}, **options
        )
        deltas = [event["choices"][0] for event in events[:-1]]
        assert deltas[0]["delta"]["role"] == "assistant" and events[0]["object"] == "chat.completion.chunk"
        assert "".join(c["delta"].get("content", "") for c in deltas) == want["generation"]["content"]
        assert [c["finish_reason"] for c in deltas] == [None] * (len(deltas) - 1) + [want["finish_reason"]]
        assert events[-1]["choices"] == [] and [*events[-1]["usage"].values()][:-1] == counts
        assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1


def test_penalties_and_what_ends_an_answer_are_those_of_the_library(client: Client, llama: Llama) -> None:
    options: dict[str, Any] = {
        "temperature": 1.0,
        "seed": 5,
        "frequency_penalty": 1.5,
        "presence_penalty": -0.5,
        "typical_p": 0.7,
    }
    (plain,) = llama.chat_completion([MESSAGES], top_p=1.0, max_gen_len=12, logprobs=True, **options)  # type: ignore[list-item]
    tokens = [t.token for t in llama.generate_stream([[1, 5]], 12, top_p=1.0, **options)]
    _, answer = client.post(CHAT, messages=MESSAGES, max_tokens=12, **options)
    assert answer["choices"][0]["message"]["content"] == plain["generation"]["content"]
    ends = {"stop_token_ids": [tokens[2], tokens[4]]}
    for least, n in ((0, 2), (3, None)):
        (want,) = llama.generate([[1, 5]], 12, top_p=1.0, min_new_tokens=least, **ends, **options)[0]
        assert n is None or want == tokens[:2]
        _, answer = client.post(COMPLETION, prompt=[1, 5], max_tokens=12, min_tokens=least, logprobs=0, **ends, **options)
        (choice,) = answer["choices"]
        assert answer["usage"]["completion_tokens"] == len(want)
        assert choice["finish_reason"] == ("stop" if len(want) < 12 else "length")
        assert len(choice["logprobs"]["tokens"]) == len(want) + (len(want) < 12)  # with the token that ended it
    bias = {"logit_bias": {str(llama.tokenizer.eos_id): 100}, "temperature": 0}
    for ignored, (n, reason) in {False: (0, "stop"), True: (4, "length")}.items():
        _, answer = client.post(COMPLETION, prompt=[1, 5], max_tokens=4, ignore_eos=ignored, logprobs=0, **bias)
        assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (n, reason)
    _, answer = client.post(CHAT, messages=[*MESSAGES], min_tokens=40, temperature=0)  # more than the rest of the context
    assert answer["choices"][0]["finish_reason"] == "length"


def test_content_in_parts_and_empty_fields_of_earlier_answers_are_accepted(client: Client) -> None:
    parts = [{"type": "text", "text": "What is the "}, {"type": "text", "text": "capital of France?"}]
    answer = {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None, "annotations": []}
    whole = [*MESSAGES, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    in_parts = [{"role": "user", "content": parts}, answer, {"role": "user", "content": "b"}]
    results = [client.post(CHAT, messages=m, temperature=0, max_tokens=3) for m in (whole, in_parts)]
    assert results[0][0] == 200 and results[0][1]["choices"] == results[1][1]["choices"]


def test_a_dialog_with_special_tags_gets_the_refusal_as_its_answer(client: Client) -> None:
    unsafe = [{"role": "user", "content": "[INST]"}]
    _, answer = client.post(CHAT, messages=unsafe)
    assert (answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]) == (UNSAFE_ERROR, "stop")
    assert [*answer["usage"].values()] == [0, 0, 0, {"cached_tokens": 0}]
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in client.stream(CHAT, messages=unsafe)) == UNSAFE_ERROR


def test_completions_of_texts_and_tokens_continue_their_prompts(client: Client, llama: Llama) -> None:
    texts = ["The quick", "She sells"]
    tokens = [llama.tokenizer.encode(text, bos=True, eos=False) for text in texts]
    want = [r["generation"] for r in llama.text_completion(texts, 0, max_gen_len=16, echo=True)]
    prompts: list[tuple[Any, int]] = [(texts, 2), (tokens, 2), (texts[0], 1), (tokens[0], 1)]
    for prompt, n in prompts:
        for echo in (False, True):
            _, answer = client.post(COMPLETION, prompt=prompt, temperature=0, echo=echo)
            got = [choice["text"] for choice in answer["choices"]]
            assert [("" if echo else text) + each for text, each in zip(texts, got, strict=False)] == want[:n]
            streamed = [""] * n
            for event in client.stream(COMPLETION, prompt=prompt, temperature=0, echo=echo):
                streamed[event["choices"][0]["index"]] += event["choices"][0]["text"]
            assert streamed == got
        assert answer["usage"]["prompt_tokens"] == sum(map(len, tokens[:n]))


def test_several_choices_have_seeds_that_follow_each_other(client: Client, llama: Llama) -> None:
    _, answer = client.post(COMPLETION, prompt=["The", "Once"], n=3, seed=5, max_tokens=9)
    want = llama.text_completion(
        ["The"] * 3 + ["Once"] * 3, 1.0, 1.0, max_gen_len=9, seed=[5, 6, 7, 8, 9, 10], echo=True, details=True
    )
    prompts = ["The"] * 3 + ["Once"] * 3
    assert [p + c["text"] for p, c in zip(prompts, answer["choices"], strict=True)] == [r["generation"] for r in want]
    assert answer["usage"]["completion_tokens"] == sum(r["new_tokens"] for r in want)


def test_usage_tells_how_many_tokens_of_the_prompt_were_cached(
    client: Client, llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt with several answers counts as computed, unless it was in the cache before."""
    for name in ("ATTENTION_CHUNK", "MIN_SHARED_PREFIX", "MIN_AWAITED_PREFIX"):
        monkeypatch.setattr(tuning, name, 4)
    fields: dict[str, Any] = {"prompt": [1, *range(20, 40)], "temperature": 0, "max_tokens": 2}
    for n in (1, 3):
        llama.clear_prefix_cache()
        for want in (0, 16):
            usage = client.post(COMPLETION, n=n, **fields)[1]["usage"]
            assert usage["prompt_tokens_details"] == {"cached_tokens": want} and usage["prompt_tokens"] == 21
    events = client.stream(COMPLETION, stream_options={"include_usage": True}, **fields)
    assert events[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}
    content = "".join(map(str, range(9)))
    for want in (False, True):
        usage = client.post(CHAT, messages=[{"role": "user", "content": content}], max_tokens=1)[1]["usage"]
        assert (usage["prompt_tokens_details"]["cached_tokens"] > 0) == want


def test_a_stop_string_ends_an_answer_and_frees_its_row(client: Client, llama: Llama) -> None:
    whole = client.post(COMPLETION, prompt="The", temperature=0, max_tokens=40)[1]["choices"][0]["text"]
    stop = whole[8:10]
    _, answer = client.post(COMPLETION, prompt="The", temperature=0, max_tokens=40, stop=["never", stop])
    assert answer["choices"][0]["text"] == whole[: whole.index(stop)] and answer["choices"][0]["finish_reason"] == "stop"
    wait_until(lambda: llama.engine.shared.async_thread is None)


@pytest.mark.parametrize("temperature", [0, 3.0])
def test_logprobs_are_those_of_the_library_and_their_bytes_are_the_text(
    client: Client, llama: Llama, temperature: float
) -> None:
    """At temperature 3, the answer contains bytes of incomplete characters."""
    options = dict(temperature=temperature, seed=3, max_tokens=30)
    (want,) = llama.chat_completion([MESSAGES], temperature, 1.0, max_gen_len=30, logprobs=True, seed=3)  # type: ignore[list-item]
    choice = client.post(CHAT, messages=MESSAGES, logprobs=True, **options)[1]["choices"][0]
    content = choice["logprobs"]["content"]
    assert [t["logprob"] for t in content] == pytest.approx(want["logprobs"], abs=1e-4)
    assert bytes(b for t in content for b in t["bytes"]).decode(errors="replace") == choice["message"]["content"]
    events = client.stream(CHAT, messages=MESSAGES, logprobs=True, **options)
    streamed = [t for e in events for t in (e["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [t["token"] for t in streamed] == [t["token"] for t in content]

    (want_text,) = llama.text_completion(["The"], temperature, 1.0, max_gen_len=30, logprobs=True, echo=True, seed=3)
    choice = client.post(COMPLETION, prompt="The", logprobs=0, echo=True, **options)[1]["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == pytest.approx(want_text["logprobs"][1:], abs=1e-4)
    for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)


def test_chats_have_the_likeliest_tokens_whole_and_streamed(client: Client, llama: Llama) -> None:
    options = dict(messages=MESSAGES, temperature=0, max_tokens=9, logprobs=True, top_logprobs=20)
    (want,) = llama.chat_completion([MESSAGES], 0, max_gen_len=9, logprobs=True, top_logprobs=20)  # type: ignore[list-item]
    content = client.post(CHAT, options)[1]["choices"][0]["logprobs"]["content"]
    assert [len(token["top_logprobs"]) for token in content] == [20] * len(want["tokens"])
    for token, top in zip(content, want["top_logprobs"], strict=True):
        assert token["top_logprobs"][0] == {name: token[name] for name in ("token", "logprob", "bytes")}  # it is greedy
        assert [each["logprob"] for each in token["top_logprobs"]] == pytest.approx([value for _, value in top], abs=1e-4)
    first = content[0]["top_logprobs"]  # the space before an answer is left out
    assert {t["token"] for t in first} >= {text for text, _ in want["top_logprobs"][0] if text.isascii() and text.isalpha()}
    events = client.stream(CHAT, **options)
    assert [t for e in events for t in (e["choices"][0]["logprobs"] or {"content": []})["content"]] == content


def test_completions_have_the_likeliest_tokens_and_the_chosen_one(client: Client, llama: Llama) -> None:
    """Score a prompt, and sample an answer of unlikely tokens."""
    tokens = llama.tokenizer.encode("The quick", bos=True, eos=False)
    (want,) = llama.text_completion(["The quick"], max_gen_len=0, logprobs=True, top_logprobs=5, echo=True)
    for prompt in ("The quick", tokens):
        fields: dict = dict(prompt=prompt, max_tokens=0, echo=True, logprobs=5)
        choice = client.post(COMPLETION, fields)[1]["choices"][0]
        logprobs = choice["logprobs"]
        assert choice["text"] == "The quick" == "".join(logprobs["tokens"]) and choice["finish_reason"] == "length"
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:] == pytest.approx(want["logprobs"][1:], abs=1e-4)
        for text, value, by_text, top in zip(*list(logprobs.values())[:3], want["top_logprobs"], strict=True):
            if by_text is not None:
                assert by_text[text] == value and len(by_text) in (5, 6)
                assert [*by_text.values()][:5] == pytest.approx([v for _, v in top], abs=1e-4)
        (event, last) = client.stream(COMPLETION, **fields)
        assert event["choices"][0]["logprobs"] == logprobs and last["choices"][0]["finish_reason"] == "length"
    assert client.post(COMPLETION, prompt=[tokens] * 2, max_tokens=0, echo=True, logprobs=0)[1]["choices"][1]["index"] == 1
    for temperature, n in ((0, 1), (9, 2)):
        _, answer = client.post(COMPLETION, prompt="The", temperature=temperature, seed=1, logprobs=1, max_tokens=5)
        logprobs = answer["choices"][0]["logprobs"]
        assert [len(top) for top in logprobs["top_logprobs"]] == [n] * 5
        assert all(top[text] == value for text, value, top, _ in zip(*logprobs.values(), strict=True))


def test_the_end_of_a_completion_is_among_the_tokens_of_its_logprobs(client: Client, llama: Llama) -> None:
    """Programs that score texts ask for one token more, and drop the last one; EOS must not be missing there."""
    eos = {str(llama.tokenizer.eos_id): 100}
    fields: dict = dict(prompt="The", max_tokens=3, temperature=0, logit_bias=eos, logprobs=1, echo=True)
    _, answer = client.post(COMPLETION, fields)
    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    n = len(llama.tokenizer.encode("The", bos=True, eos=False))
    assert [len(values) for values in logprobs.values()] == [n + 1] * 4
    assert (logprobs["tokens"][-1], logprobs["text_offset"][-1], choice["text"]) == ("", 3, "The")
    assert choice["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] == 0
    assert logprobs["top_logprobs"][-1][""] == logprobs["token_logprobs"][-1] < -1  # the model's own, without the bias
    streamed = [e["choices"][0]["logprobs"] for e in client.stream(COMPLETION, **fields)]
    assert [token for each in streamed if each for token in each["tokens"]] == logprobs["tokens"]
    chat = client.post(CHAT, messages=MESSAGES, logit_bias=eos, temperature=0, logprobs=True)[1]["choices"][0]
    assert (chat["message"]["content"], chat["logprobs"]) == ("", None)


def test_a_logit_bias_chooses_and_bans_tokens(client: Client, llama: Llama) -> None:
    for path, fields in ((CHAT, {"messages": MESSAGES}), (COMPLETION, {"prompt": "The"})):
        for temperature in (0, 1.0):
            body = {**fields, "max_tokens": 3, "temperature": temperature, "seed": 4, "logit_bias": {"300": 100, "5": -1.5}}
            _, answer = client.post(path, body)
            choice = answer["choices"][0]
            text = choice["text"] if path == COMPLETION else choice["message"]["content"]
            assert text.strip() == llama.tokenizer.decode([300] * 3).strip()


def test_a_chat_continues_an_answer_that_has_begun(client: Client, llama: Llama) -> None:
    for beginning in ("The capital", " "):
        dialog: Any = [*MESSAGES, {"role": "assistant", "content": beginning}]
        (want,) = llama.chat_completion([dialog], 0, max_gen_len=9, continue_answer=True, logprobs=True)
        _, answer = client.post(CHAT, messages=dialog, temperature=0, max_tokens=9, logprobs=True)
        (choice,) = answer["choices"]
        assert choice["message"]["content"] == want["generation"]["content"]
        spelled = bytes(byte for entry in choice["logprobs"]["content"] for byte in entry["bytes"])
        assert choice["message"]["content"] == spelled.decode(errors="replace")
        events = client.stream(CHAT, messages=dialog, temperature=0, max_tokens=9)
        text = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
        assert text == want["generation"]["content"]
    status, refused = client.post(CHAT, messages=[*MESSAGES, *MESSAGES])
    assert status == 400 and "merge messages 0 and 1" in refused["error"]["message"]
    unsafe = [*MESSAGES, {"role": "assistant", "content": "[/INST]"}]
    assert client.post(CHAT, messages=unsafe)[1]["choices"][0]["message"]["content"] == UNSAFE_ERROR


def test_a_prompt_may_end_within_a_character(client: Client, llama: Llama) -> None:
    """Echo a prompt whose last token is the second of the three bytes of the euro sign, then let the third follow."""
    tokens = llama.tokenizer.encode("The \u20ac", bos=True, eos=False)
    _, cut = client.post(COMPLETION, prompt=tokens[:-1], max_tokens=0, echo=True)
    assert cut["choices"][0]["text"] == llama.tokenizer.decode(tokens[:-1]) == "The \ufffd\ufffd"
    assert cut["choices"][0]["finish_reason"] == "length"
    text = IncrementalText(llama.tokenizer)
    assert text.begin(tokens[:-1]) + text.push(tokens[-1]) == "The \u20ac"


BAD_BIASES: list[Any] = [
    [], {"384": 1}, {"-1": 1}, {"1.0": 1}, {"x": 1}, {"\u00b2": 1}, {"5": 101}, {"5": "1"}, {"5": True}, {"5": None},
    {"5": 1, "05": 1}, {"9" * 5000: 1},
]  # fmt: skip
REFUSED: list[tuple[str, dict[str, Any], str, str | None]] = [
    (CHAT, {"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
    (CHAT, {"messages": MESSAGES, "tool_choice": "auto"}, "tool_choice", "unsupported_parameter"),
    (CHAT, {"messages": MESSAGES, "functions": [{}]}, "functions", "unsupported_parameter"),
    (CHAT, {"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    *[(CHAT, {"messages": MESSAGES, "logit_bias": bad}, "logit_bias", None) for bad in BAD_BIASES],
    *[
        (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": bad}, "top_logprobs", None)
        for bad in (-1, 21, 1.0, True, "2")
    ],
    (CHAT, {"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs", None),
    *[
        (CHAT, {"messages": MESSAGES, name: bad}, name, None)
        for name in ("frequency_penalty", "presence_penalty")
        for bad in (2.1, -3, False, "1", [1])
    ],
    (CHAT, {"messages": MESSAGES, "typical_p": 1.5}, "typical_p", None),
    *[(CHAT, {"messages": MESSAGES, "min_tokens": bad}, "min_tokens", None) for bad in (-1, 1.5, True, 65)],
    (COMPLETION, {"prompt": "x", "min_tokens": 17}, "min_tokens", None),
    (CHAT, {"messages": MESSAGES, "ignore_eos": 1}, "ignore_eos", None),
    *[
        (CHAT, {"messages": MESSAGES, "stop_token_ids": bad}, "stop_token_ids", None)
        for bad in (5, [-1], [384], [True], [5] * 17)
    ],
    (CHAT, {"messages": MESSAGES, "stop": "x" * 1001}, "stop", None),
    (CHAT, {"messages": MESSAGES, "temprature": 1}, "temprature", "unknown_parameter"),
    (CHAT, {"messages": MESSAGES, "max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", None),
    (CHAT, {"messages": MESSAGES, "max_tokens": 0}, "max_tokens", None),
    (CHAT, {"messages": MESSAGES, "max_tokens": True}, "max_tokens", None),
    (CHAT, {"messages": MESSAGES, "temperature": -1}, "temperature", None),
    (CHAT, {"messages": MESSAGES, "temperature": True}, "temperature", None),
    (CHAT, {"messages": MESSAGES, "top_p": 1.1}, "top_p", None),
    (CHAT, {"messages": MESSAGES, "top_k": 1.5}, "top_k", None),
    (CHAT, {"messages": MESSAGES, "min_p": "x"}, "min_p", None),
    (CHAT, {"messages": MESSAGES, "repetition_penalty": 0}, "repetition_penalty", None),
    (CHAT, {"messages": MESSAGES, "n": 0}, "n", None),
    (CHAT, {"messages": MESSAGES, "n": 71}, "n", None),
    (CHAT, {"messages": MESSAGES, "seed": 2**63}, "seed", None),
    (CHAT, {"messages": MESSAGES, "stop": ["a", ""]}, "stop", None),
    (CHAT, {"messages": MESSAGES, "stop": ["a"] * 17}, "stop", None),
    (CHAT, {"messages": MESSAGES, "stop": [5]}, "stop", None),
    (CHAT, {"messages": MESSAGES, "stream": "yes"}, "stream", None),
    (CHAT, {"messages": MESSAGES, "stream_options": {"include_usage": True}}, "stream_options", None),
    (CHAT, {"messages": MESSAGES, "stream": True, "stream_options": {"x": 1}}, "stream_options", None),
    (CHAT, {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": 1}}, "stream_options", None),
    (CHAT, {"messages": MESSAGES, "logprobs": 1}, "logprobs", None),
    (CHAT, {"messages": MESSAGES, "user": 5}, "user", None),
    (CHAT, {}, "messages", None),
    (CHAT, {"messages": "x"}, "messages", None),
    (CHAT, {"messages": []}, "messages", None),
    (CHAT, {"messages": ["x"]}, "messages", None),
    (CHAT, {"messages": [{"role": "user"}]}, "messages", None),
    (CHAT, {"messages": [{"role": "developer", "content": "x"}]}, "messages", None),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages", None),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages", None),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages", None),
    (CHAT, {"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages", "unsupported_parameter"),
    (CHAT, {"messages": [{"role": "user", "content": "x " * 99}]}, "messages", "context_length_exceeded"),
    (COMPLETION, {"prompt": "x " * 99}, "prompt", "context_length_exceeded"),
    (COMPLETION, {}, "prompt", None),
    (COMPLETION, {"prompt": []}, "prompt", None),
    (COMPLETION, {"prompt": [[]]}, "prompt", None),
    (COMPLETION, {"prompt": [1, 384]}, "prompt", None),
    (COMPLETION, {"prompt": [1, True]}, "prompt", None),
    (COMPLETION, {"prompt": ["x", 5]}, "prompt", None),
    (COMPLETION, {"prompt": "x", "best_of": 2}, "best_of", "unsupported_parameter"),
    (COMPLETION, {"prompt": "x", "suffix": "y"}, "suffix", "unsupported_parameter"),
    *[(COMPLETION, {"prompt": "x", "logprobs": bad}, "logprobs", None) for bad in (-1, 6, True, 1.0, "1")],
    (COMPLETION, {"prompt": "x", "logit_bias": {"384": 1}}, "logit_bias", None),
    (COMPLETION, {"prompt": "x", "top_logprobs": 1}, "top_logprobs", "unknown_parameter"),
    (COMPLETION, {"prompt": "x", "messages": []}, "messages", "unknown_parameter"),
]


def test_what_is_wrong_or_not_supported_is_refused_by_name(client: Client) -> None:
    for path, body, param, code in REFUSED:
        status, answer = client.post(path, body)
        error = answer["error"]
        assert (status, error["param"], error["code"]) == (400, param, code), (body, answer)
        assert error["type"] == "invalid_request_error" and error["message"]


def test_fields_that_ask_for_nothing_are_accepted(client: Client) -> None:
    nothing = {
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": [], "tool_choice": "none",
        "response_format": {"type": "text"}, "top_logprobs": None, "functions": None, "stop": None, "seed": None, "n": None,
        "temperature": 0, "top_p": None, "max_tokens": 3, "max_completion_tokens": None, "stream_options": None, "user": "me",
    }  # fmt: skip
    assert client.post(CHAT, messages=MESSAGES, **nothing)[0] == 200
    assert client.post(COMPLETION, prompt="x", best_of=1, suffix=None, logprobs=None, echo=None)[0] == 200


def test_a_body_that_is_not_json_is_refused(client: Client) -> None:
    deep = b"[" * 100_000
    for raw in (b"", b"{", b"[]", b"5", b"\xff", b'{"a":1,"a":2}', b'{"a":NaN}', b'{"a":1e999}', b"1" * 5000, deep):
        status, answer = client.post(CHAT, raw)
        assert (status, answer["error"]["code"]) == (400, "invalid_json"), raw[:20]


def test_other_paths_methods_and_types_are_refused(client: Client) -> None:
    assert client.get("/v1/files")[0] == 404 and client.get("/../setup.py")[0] == 404 and client.get("/page.html")[0] == 404
    assert client.get(CHAT)[0] == 405
    assert client.begin("POST", CHAT, b"{}", **{"Content-Type": "text/plain"}).status == 415
    status, answer = client.post(CHAT, messages=MESSAGES, model="gpt-4")
    assert (status, answer["error"]["code"]) == (404, "model_not_found") and "'small'" in answer["error"]["message"]
    assert client.get("/v1/models/other")[0] == 404
    assert json.loads(client.get("/v1/models/small")[1]) == json.loads(client.get("/v1/models")[1])["data"][0]


def test_a_body_over_the_limit_is_refused_even_without_a_length(client: Client) -> None:
    assert client.begin("POST", CHAT, b" " * (app_module.MAX_BODY + 1)).status == 413
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as sock:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        sock.sendall(
            head.encode() + f"{app_module.MAX_BODY + 1:x}\r\n".encode() + b" " * (app_module.MAX_BODY + 1) + b"\r\n0\r\n\r\n"
        )
        assert b" 413 " in sock.recv(100)
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as sock:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {2**40}\r\n\r\n"
        sock.sendall(head.encode())
        assert b" 413 " in sock.recv(100)


def test_a_body_that_does_not_come_is_given_up(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "BODY_SECONDS", 0.05)
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as sock:
        sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n".encode())
        assert b" 408 " in sock.recv(100)


def test_a_key_is_needed_for_all_but_the_page_and_health(start: Callable[..., Client]) -> None:
    client = start(api_key="secret-1")
    for path, status in (("/health", 200), ("/", 200), ("/metrics", 401), ("/v1/models", 401), ("/other", 401)):
        assert client.get(path)[0] == status
    for value in ("", "secret-1", "Bearer", "Bearer secret", "Basic secret-1", "Bearer secret-12", "Bearer \xe9"):
        status, answer = client.get("/v1/models", Authorization=value)
        assert (status, json.loads(answer)["error"]["code"]) == (401, "invalid_api_key")
    assert client.get("/v1/models", Authorization="Bearer secret-1")[0] == 200


def test_a_page_whose_name_was_pointed_here_cannot_ask(start: Callable[..., Client]) -> None:
    client = start(hosts={"localhost", "127.0.0.1", "[::1]"})
    for host in ("localhost", "LOCALHOST:5", "127.0.0.1:8000", "[::1]:8000"):
        assert client.get("/v1/models", Host=host)[0] == 200
    for host in ("evil.example", "127.0.0.1.evil.example:8000", "localhost.", ""):
        assert client.get("/v1/models", Host=host)[0] == 421
    assert not any(name.lower().startswith("access-control") for name in client.begin("GET", "/v1/models").headers)


def test_a_full_queue_refuses_more_answers_with_429(start: Callable[..., Client], gate: threading.Event) -> None:
    client = start(max_queue=2)
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(Client.post, client, COMPLETION, {"prompt": "The", "n": 4, "max_tokens": 3}) for _ in range(2)]
        wait_until(lambda: client.app.metrics.in_flight == 8)  # 6 rows, and 2 that wait
        response = client.begin("POST", COMPLETION, {"prompt": "The"})
        assert response.status == 429 and int(response.headers["retry-after"]) > 0
        assert json.loads(response.read())["error"]["code"] == "queue_full"
        assert "llama_answers_waiting 8" in client.get("/metrics")[1]
        gate.set()
        assert [r.result()[0] for r in running] == [200, 200]
    assert client.app.metrics.in_flight == 0 and client.post(COMPLETION, prompt="The")[0] == 200


@pytest.mark.parametrize(
    "stream, next_request", [(True, b""), (False, b""), (False, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")]
)
def test_a_client_that_leaves_frees_its_row(
    start: Callable[..., Client], gate: threading.Event, llama: Llama, stream: bool, next_request: bytes
) -> None:
    """Leave while a step is running: the answer is given up, and no step follows. A pipelined request does not hide the end."""
    client = start()
    body = json.dumps({"prompt": "The", "n": 9, "max_tokens": 50, "stream": stream}).encode()
    head = f"POST {COMPLETION} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as sock:
        sock.sendall(head.encode() + body)
        wait_until(lambda: client.app.metrics.in_flight == 9)
        sock.sendall(next_request)
    wait_until(lambda: client.app.metrics.in_flight == 0)
    gate.set()
    wait_until(lambda: llama.engine.shared.async_thread is None)
    assert client.app.metrics.completion_tokens == 0 and client.app.metrics.running == 0
    assert client.app.metrics.requests[COMPLETION, 200 if stream else 499] == 1


def test_a_failure_is_told_and_the_next_request_works(start: Callable[..., Client], monkeypatch: pytest.MonkeyPatch) -> None:
    client, sample = start(), DecodeState.sample

    def damage(state: Any, **options: Any) -> Any:
        state.logits.fill_(torch.nan)
        return sample(state, **options)

    with monkeypatch.context() as patch:
        patch.setattr(DecodeState, "sample", damage)
        status, answer = client.post(COMPLETION, prompt="The")
        assert status == 500 and answer["error"]["type"] == "server_error" and "not finite" in answer["error"]["message"]
        events = client.begin("POST", COMPLETION, {"prompt": "The", "stream": True}).read().decode().split("\n\n")
        assert "not finite" in json.loads(events[-2].removeprefix("data: "))["error"]["message"]
    assert client.post(COMPLETION, prompt="The")[0] == 200 and client.app.metrics.in_flight == 0


def test_an_answer_that_takes_too_long_is_ended(start: Callable[..., Client], gate: threading.Event) -> None:
    client = start(timeout=0.1)
    status, answer = client.post(COMPLETION, prompt="The")
    assert (status, answer["error"]["code"]) == (504, "timeout")
    events = client.begin("POST", COMPLETION, {"prompt": "The", "stream": True}).read().decode()
    assert json.loads(events.removeprefix("data: "))["error"]["code"] == "timeout"
    assert client.app.metrics.in_flight == 0


def test_metrics_count_tokens_requests_and_seconds(start: Callable[..., Client]) -> None:
    client = start()
    _, answer = client.post(CHAT, messages=MESSAGES, max_tokens=5, seed=1)
    client.post(CHAT, messages=[])
    values = dict(line.rsplit(" ", 1) for line in client.get("/metrics")[1].splitlines() if not line.startswith("#"))
    assert values['llama_requests_total{path="/v1/chat/completions",status="200"}'] == "1"
    assert values['llama_requests_total{path="/v1/chat/completions",status="400"}'] == "1"
    assert int(values["llama_prompt_tokens_total"]) == answer["usage"]["prompt_tokens"]
    assert int(values["llama_completion_tokens_total"]) == answer["usage"]["completion_tokens"]
    assert values["llama_rows"] == "6" and values["llama_answers_running"] == values["llama_answers_waiting"] == "0"
    assert values['llama_seconds_to_first_token_bucket{le="+Inf"}'] == values["llama_seconds_to_first_token_count"] == "1"
    assert 0 < float(values["llama_seconds_to_first_token_sum"]) < 60


def test_a_prompt_is_counted_once_as_in_usage(start: Callable[..., Client]) -> None:
    """n answers share a prompt, and a request that only scores its prompt generates nothing."""
    client, total = start(), 0
    for fields in (
        {"n": 2},
        {"echo": True, "max_tokens": 0, "logprobs": 0},
        {"echo": True, "max_tokens": 2},
        {"max_tokens": 0},
    ):
        total += client.post(COMPLETION, prompt=["The quick", "Once"], **fields)[1]["usage"]["prompt_tokens"]
        assert client.app.metrics.prompt_tokens == total, fields


def test_metrics_count_guesses(small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepCosts, "known", lambda self, n: True)
    monkeypatch.setattr(StepCosts, "seconds", lambda self, n: 1.0)
    llama = Llama.build(small.folder, small.tokenizer_path, 64, 2, device="cpu", speculate="prompt")
    options = {"temperature": 0, "repetition_penalty": 0.2, "ignore_eos": True}  # lets the answer repeat the prompt
    prompt = [1, 5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]
    (want,) = llama.text_completion([prompt], details=True, max_gen_len=40, **options)  # type: ignore[arg-type]
    client = Client(llama)
    try:
        assert client.post(COMPLETION, prompt=prompt, max_tokens=40, **options)[0] == 200
        wait_until(lambda: client.app.metrics.in_flight == 0)
        lines = client.get("/metrics")[1].splitlines()
    finally:
        client.stop()
    assert 0 < want["accepted_tokens"] <= want["guessed_tokens"]
    assert f"llama_guessed_tokens_total {want['guessed_tokens']}" in lines
    assert f"llama_accepted_tokens_total {want['accepted_tokens']}" in lines


def test_seconds_are_measured_from_acceptance_and_between_tokens(start: Callable[..., Client]) -> None:
    """What follows the last token, such as freeing the row, is no time of a token."""
    client = start()

    class SlowModel:
        tokenizer, model = client.app.llama.tokenizer, client.app.llama.model

        def agenerate_stream(self, *_: Any, **__: Any) -> AsyncTokens:
            return AsyncTokens([], self.slow_tokens())

        async def slow_tokens(self) -> AsyncGenerator[GeneratedToken, None]:
            try:
                for seconds in (0.12, 0.06, 0.06):
                    await asyncio.sleep(seconds)
                    yield GeneratedToken(0, 50, None)
            finally:
                await asyncio.sleep(1)

    client.app.llama = SlowModel()
    assert client.post(COMPLETION, prompt="The", max_tokens=9)[0] == 200
    metrics = client.app.metrics
    assert sum(metrics.seconds_to_first_token.counts) == sum(metrics.seconds_per_token.counts) == 1
    assert 0.12 <= metrics.seconds_to_first_token.total < 0.6
    assert 0.06 <= metrics.seconds_per_token.total < 0.5
    histogram = Histogram((0.1, 1.0))
    for value in (0.1, 0.05, 0.2, 5.0):
        histogram.observe(value)
    assert histogram.lines("x")[:3] == ['x_bucket{le="0.1"} 2', 'x_bucket{le="1.0"} 3', 'x_bucket{le="+Inf"} 4']


def test_the_page_runs_only_its_own_script(client: Client) -> None:
    response = client.begin("GET", "/")
    page, policy = response.read(), response.headers["content-security-policy"]
    (script,) = re.findall(rb"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    assert response.status == 200 and f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not re.search(rb"https?://|src=|innerHTML| on\w+=| style=", page.replace(b'href="data:,"', b""))


class Command:
    """`python -m llama serve` with the demo model, at a free port."""

    def __init__(self, *flags: str, **env: str) -> None:
        command = [sys.executable, "-m", "llama", "serve", "--port", "0", *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(**env))
        assert self.process.stderr
        lines = [self.process.stderr.readline() for _ in range(2)]
        match = re.search(r"serving \S+ at http://127.0.0.1:(\d+)", lines[1])
        assert match, lines
        self.port = int(match[1])

    def ask(self, **fields: Any) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("POST", COMPLETION, json.dumps({"prompt": "Once upon a time", **fields}), JSON)
        return connection.getresponse()

    def end(self, number: int) -> tuple[int, str]:
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


def test_signals_finish_what_runs_until_the_grace_is_over_and_exit_with_0() -> None:
    with ThreadPoolExecutor(2) as pool:
        patient, hasty = pool.map(lambda flags: Command(*flags), ([], ["--grace", "0", "--max_queue", "1000"]))
    response = patient.ask(stream=True, n=16, max_tokens=100, seed=1)
    first = response.read(100)
    assert patient.end(signal.SIGTERM) == (0, "")
    assert (first + response.read()).endswith(b"data: [DONE]\n\n")

    stream, whole = hasty.ask(stream=True, n=500, max_tokens=400), ThreadPoolExecutor(1).submit(hasty.ask, n=500)
    first = stream.read(100)
    time.sleep(0.1)
    code, errors = hasty.end(signal.SIGINT)
    assert code == 0 and "Traceback" not in errors, errors
    assert json.loads((first + stream.read()).split(b"\n\ndata: ")[-1])["error"]["code"] == "server_ending"
    assert whole.result().status == 503


def test_wrong_flags_are_refused_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def errors_of(*flags: str) -> str:
        assert main(["serve", *flags]) == 1
        return capsys.readouterr().err

    monkeypatch.setattr(serve_module, "build_model", lambda *_: pytest.fail("the model is loaded"))
    monkeypatch.setenv("LLAMA_API_KEY", "")
    assert "LLAMA_API_KEY is empty" in errors_of()
    monkeypatch.delenv("LLAMA_API_KEY")
    open_to_all = errors_of("--host", "0.0.0.0", "--port", "0")
    assert "--host is '0.0.0.0', which other machines reach" in open_to_all and "--allow_without_key" in open_to_all
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}: Address already in use; give another" in errors_of("--port", port)
    for flag, value, reason in [
        ("--api_key", "a b", "printable ASCII"),
        ("--max_queue", "-1", "from 0"),
        ("--port", "70000", "from 0 (a free one) to 65535"),
        ("--timeout", "nan", "seconds from"),
        ("--grace", "-1", "seconds from 0"),
        ("--max_batch_size", "0", "from 1"),
        ("--host", "no.such.host.invalid", "cannot listen"),
        ("--max_connections", "0", "from 1"),
        ("--allowed_host", "chat.example:80", "without scheme and port"),
        ("--allowed_host", "http://chat.example", "without scheme and port"),
        ("--allowed_host", "fd00::1", "[fd00::1]"),
    ]:
        error = errors_of(flag, value)
        assert flag.removeprefix("--") in error and reason in error
    monkeypatch.setattr(serve_module, "world_size", lambda: 2)
    monkeypatch.setattr(serve_module, "initialize", lambda *_: None)
    monkeypatch.setattr(control, "replica", lambda: (0, 2))
    assert "2 replicas: leave --model_parallel_size out" in errors_of()
    monkeypatch.setattr(serve_module.importlib.util, "find_spec", lambda name: None)
    assert "serve needs uvicorn and starlette" in (error := errors_of()) and "'.[serve]'" in error


def test_another_host_without_a_key_is_told_and_served_under_any_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, llama: Llama
) -> None:
    served = []
    monkeypatch.setattr(serve_module, "build_model", lambda *_: llama)
    monkeypatch.setattr(serve_module, "serve", lambda llama, sock, settings, grace: served.append(settings))
    for flags in (
        ["--host", "0.0.0.0", "--allow_without_key"],
        ["--host", "0.0.0.0", "--api_key", "k"],
        ["--allowed_host", "Chat.Example", "--allowed_host", "[fd00::1]", "--model_name", "m"],
    ):
        assert main(["serve", "--port", "0", *flags]) == 0
    assert "everyone who reaches 0.0.0.0 may ask" in capsys.readouterr().err
    assert [(s.api_key, s.hosts) for s in served[:2]] == [(None, None), ("k", None)]
    assert served[2].hosts == {"localhost", "127.0.0.1", "[::1]", "chat.example", "[fd00::1]"} and served[2].model_name == "m"


def test_more_connections_than_files_may_be_open_are_refused_and_the_soft_limit_is_raised(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, llama: Llama
) -> None:
    resource = pytest.importorskip("resource")
    limits = [(256, 2000)]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits[-1])

    def setrlimit(kind: int, limit: tuple[int, int]) -> None:
        if limit[0] > limit[1]:
            raise ValueError("current limit exceeds maximum limit")
        limits.append(limit)

    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    monkeypatch.setattr(serve_module, "build_model", lambda *_: llama)
    monkeypatch.setattr(serve_module, "serve", lambda *_: None)
    assert main(["serve", "--port", "0"]) == 0 and limits == [(256, 2000), (1100, 2000)]
    assert main(["serve", "--port", "0", "--max_connections", "1901"]) == 1
    assert "--max_connections is 1901, and this process may open only 2000 files" in (error := capsys.readouterr().err)
    assert "give at most 1900" in error
