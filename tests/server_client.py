"""A server in a thread, requests to it, and fixtures for the tests of the server."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llama import Llama
from llama.engine.decode_state import DecodeState

uvicorn = pytest.importorskip("uvicorn", reason="the server needs the extra serve")
pytest.importorskip("starlette", reason="the server needs the extra serve")

from llama.cli.serve import listening_socket, server_config  # noqa: E402
from llama.server.app import App, Settings  # noqa: E402

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
