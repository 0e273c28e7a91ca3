"""Fixtures and helpers for the tests of commands: a small model that answers at length, and ways to run a command."""

import io
import signal
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from llama import Llama
from llama.cli.main import main

from .support import TORCHRUN, environment, write_shards

CONTEXT = 4000
LLAMA, LLAMA_2 = ("-m", "llama"), (*TORCHRUN, 2, "-m", "llama")


@pytest.fixture(scope="module")
def talker(small: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Return command-line flags for a small model that generates neither EOS nor byte tokens. Its answers fill the context, so
    there is time to interrupt them."""
    output = small.weights["output.weight"].clone()
    output[:259] = 0
    folder = write_shards(tmp_path_factory.mktemp("talker"), small.params, small.weights | {"output.weight": output})
    paths = "--ckpt_dir", folder, "--tokenizer_path", small.tokenizer_path
    return (*map(str, paths), "--temperature", "0", "--device", "cpu", "--max_seq_len", str(CONTEXT))


@pytest.fixture(scope="module")
def llama(talker: tuple) -> Llama:
    return Llama.build(talker[1], talker[3], max_seq_len=CONTEXT, max_batch_size=2, device="cpu")


def answer(llama: Llama, *texts: str, n: int) -> str:
    """Return the text of the first n tokens of the answer to a dialog. `texts` are the messages of user and assistant in
    turn."""
    dialog: Any = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return llama.chat_completion([dialog], temperature=0, max_gen_len=n)[0]["generation"]["content"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a `llama` command in this process, and returns the exit code, stdout and stderr."""

    def run(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            code: Any = main(arguments)
        except SystemExit as e:
            code = e.code
        return code, *capfd.readouterr()

    return run


def spawn(*arguments: object) -> subprocess.Popen[bytes]:
    """Start Python with pipes for stdin, stdout and stderr. Let Ctrl-C interrupt the new process, even if these tests run in
    the background of a shell, where processes ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command, pipe = [sys.executable, *map(str, arguments)], subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment())
    finally:
        signal.signal(signal.SIGINT, before)
