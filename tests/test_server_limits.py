"""Test what the server does with clients that are slow, send too much, are too many or leave, and with failures."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from llama import Llama
from llama.engine.decode_state import DecodeState

from . import server_client
from .server_client import CHAT, COMPLETION, Client, wait_until

import llama.server.app as app_module  # isort: skip
from llama.server import connections  # isort: skip

client, start, gate = server_client.client, server_client.start, server_client.gate  # fixtures

HEAD = f"POST {COMPLETION} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LAST_CHUNK = b"\r\n0\r\n\r\n"


@contextlib.contextmanager
def connected(client: Client, sent: bytes | str = b"", **options: Any) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as sock:
        sock.sendall(sent if isinstance(sent, bytes) else sent.encode())
        yield sock


def read_all(sock: socket.socket) -> bytes:
    """Return what comes until the server closes the connection."""
    return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def stream_request(**fields: Any) -> str:
    body = json.dumps({"prompt": "The", "stream": True, **fields})
    return f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}"


def test_headers_that_do_not_arrive_end_the_connection(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of headers that come one by one do not prolong the time."""
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.2)
    with connected(client) as sock:
        assert read_all(sock) == b""
    with connected(client, "GET /health HTTP/1.1\r\nHost: x\r\n\r\n") as sock:
        assert b" 200 " in sock.recv(1000)
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() < began + 10:
                sock.sendall(b"G")
                time.sleep(0.02)
        assert time.monotonic() < began + 5
        assert b" 408 " in read_all(sock)


def test_a_connection_without_another_request_is_closed(start: Callable[..., Client]) -> None:
    client = start()
    assert client.server.config.timeout_keep_alive == connections.IDLE_SECONDS
    client.server.config.timeout_keep_alive = 0
    with connected(client, "GET /health HTTP/1.1\r\nHost: x\r\n\r\n") as sock:
        assert read_all(sock).endswith(b'{"status":"ok"}')


def test_a_client_that_takes_nothing_is_cut_off(
    start: Callable[..., Client], llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream of more than all buffers contain ends when its client reads nothing of it, and the rows are free."""
    monkeypatch.setattr(connections, "TAKING_SECONDS", 0.1)
    monkeypatch.setattr(app_module.responses, "event", lambda data: b"data: " + b"x" * (4 << 20) + b"\n\n")
    client = start()
    with connected(client, stream_request(n=9, max_tokens=40)) as sock:
        wait_until(lambda: client.app.metrics.completion_tokens > 0)
        wait_until(lambda: client.app.metrics.in_flight == 0 and not client.server.server_state.connections)
        assert not read_all(sock).endswith(LAST_CHUNK)
    wait_until(lambda: llama.engine.shared.turn.thread is None)


def test_a_client_that_takes_little_by_little_gets_all(start: Callable[..., Client], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "TAKING_SECONDS", 1.0)
    monkeypatch.setattr(app_module.responses, "event", lambda data: b"data: " + b"x" * (4 << 20) + b"\n\n")
    with connected(start(), stream_request(max_tokens=2)) as sock:
        end, began = b"", time.monotonic()
        while not end.endswith(LAST_CHUNK):
            part = sock.recv(1 << 19)
            assert part
            end = (end + part)[-100:]
            time.sleep(0.05)
        assert time.monotonic() > began + 1


def test_a_client_that_takes_no_whole_answer_does_not_delay_the_end(
    start: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is complete and fits the server's buffer, but the client's is full: closing waits for it, within the limit."""
    monkeypatch.setattr(connections, "TAKING_SECONDS", 0.1)
    monkeypatch.setattr(app_module.JsonResponse, "render", lambda self, content: b"x" * (16 << 20))
    client = start()
    with connected(client, "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"):
        wait_until(lambda: client.server.server_state.total_requests == 1)
        wait_until(lambda: not client.server.server_state.connections)


def test_the_end_does_not_wait_for_a_body_that_comes_slowly(start: Callable[..., Client]) -> None:
    client = start()
    with connected(client, f"{HEAD}Content-Length: 9\r\n\r\nx") as sock:
        wait_until(lambda: bool(client.server.server_state.tasks))
        began = time.monotonic()
        client.stop()
        assert time.monotonic() < began + 0.9  # the grace is 1 second
        assert b'"code": "server_ending"' in read_all(sock)


@pytest.mark.parametrize("close", ["", "Connection: close\r\n"])
def test_an_early_refusal_reaches_a_client_that_sends_all_before_it_reads(start: Callable[..., Client], close: str) -> None:
    client = start(api_key="k", hosts={"x"})
    body, key = b" " * (20 << 20), "Authorization: Bearer k\r\n"
    json_type = "Content-Type: application/json\r\n"
    for path, host, headers, status in (
        (CHAT, "x", json_type, 401),
        ("/v1/other", "x", key + json_type, 404),
        ("/v1/models", "x", key + json_type, 405),
        (CHAT, "x", key, 415),
        (CHAT, "evil.example", key + json_type, 421),
        (CHAT, "x", key + json_type, 413),
    ):
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\n{headers}{close}Content-Length: {len(body)}\r\n\r\n"
        with connected(client, head.encode() + body) as sock:
            assert f" {status} ".encode() in sock.recv(1000), status
            if not close:
                sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                sock.recv(1000)


def test_a_refused_body_is_not_read_without_end(start: Callable[..., Client], monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse at once what is declared too large or held back, and after a while what does not come or does not end."""
    monkeypatch.setattr(app_module, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(app_module, "MAX_DISCARDED", 1 << 20)
    client = start(api_key="k")
    chunked = b"Transfer-Encoding: chunked\r\n\r\n" + (b"10000\r\n" + b" " * (1 << 16) + b"\r\n") * 20
    for rest in (
        b"Content-Length: 1048577\r\n\r\n",
        b"Content-Length: 9\r\nExpect: 100-continue\r\n\r\n",
        b"Content-Length: 9\r\n\r\n",
        chunked,
    ):
        with connected(client, HEAD.encode() + rest) as sock:
            answer = sock.recv(1000)
            assert answer.startswith(b"HTTP/1.1 401 ") and b"connection: close" in answer.lower(), rest[:50]


def test_too_many_connections_are_refused(start: Callable[..., Client]) -> None:
    client = start(max_connections=2)
    with connected(client), connected(client):
        wait_until(lambda: len(client.server.server_state.connections) == 2)
        with connected(client) as sock:
            answer = read_all(sock)
            assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n") and b'"code": "too_many_connections"' in answer
            sock.sendall(b"x" * 100)  # a client that sends its request meanwhile
            time.sleep(0.05)
            sock.sendall(b"x" * 100)
        assert client.get("/health")[0] == 503
    wait_until(lambda: not client.server.server_state.connections)
    assert client.get("/health")[0] == 200 and 'path="other",status="503"} 2' in client.get("/metrics")[1]


def test_what_is_not_http_is_refused_like_all_else(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection ends soon, even if the client keeps it open and goes on sending."""
    monkeypatch.setattr(connections, "LINGER_SECONDS", 0.1)
    monkeypatch.setattr(connections, "HEADER_SECONDS", 60)
    for sent in ("hello\r\n\r\n", f"{HEAD}Transfer-Encoding: chunked\r\n\r\nno size\r\n"):
        with connected(client, sent) as sock:
            head, _, body = read_all(sock).partition(b"\r\n\r\n")
            assert b" 400 " in head and json.loads(body)["error"]["type"] == "invalid_request_error"
            wait_until(lambda: not client.server.server_state.connections)


def test_prompts_are_counted_before_they_are_read(start: Callable[..., Client], monkeypatch: pytest.MonkeyPatch) -> None:
    client = start(max_queue=2)
    assert client.post(COMPLETION, prompt=["x"] * 8, max_tokens=1)[0] == 200
    monkeypatch.setattr(client.app.served.tokenizer, "encode", lambda *_, **__: pytest.fail("a prompt is tokenized"))
    for prompts in ([""] * 200_000, [[1]] * 9):
        status, answer = client.post(COMPLETION, prompt=prompts)
        assert (status, answer["error"]["param"]) == (400, "prompt") and "8 is the limit" in answer["error"]["message"]
    status, answer = client.post(COMPLETION, prompt=[[1]] * 3, n=3)
    assert (status, answer["error"]["param"]) == (400, "n") and "9 answers, and 8 is the limit" in answer["error"]["message"]


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
    wait_until(lambda: llama.engine.shared.turn.thread is None)
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
