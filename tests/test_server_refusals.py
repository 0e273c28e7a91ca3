"""Test which requests the server refuses, and that each refusal names its reason."""

import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the server needs the extra serve")
pytest.importorskip("starlette", reason="the server needs the extra serve")

from llama.server import app as app_module

from . import server_client
from .server_client import CHAT, COMPLETION, MESSAGES, Client

client, start = server_client.client, server_client.start  # fixtures


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
