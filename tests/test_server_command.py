"""Test the command that starts the server: its flags, limits and signals."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from llama import Llama

from .support import environment

pytest.importorskip("uvicorn", reason="the server needs the extra serve")
pytest.importorskip("starlette", reason="the server needs the extra serve")

import llama.cli.serve as serve_module
from llama.cli.main import main

from .server_client import COMPLETION, JSON


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
