"""Test calls that rank 0 makes alone while the other ranks follow (`Llama.lead`), and the server on several ranks."""

import http.client
import importlib.util
import json
import os
import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import Llama

from . import lead_worker
from .jobs import Job
from .support import TORCHRUN, torchrun, write_shards

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to look at processes")
needs_server = pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="the server needs the extra serve")


@needs_proc
@pytest.mark.parametrize("ranks", [2, 4], ids=["one model", "two replicas"])
def test_threads_and_event_loops_of_rank_0_get_the_answers_of_one_rank(
    small: SimpleNamespace, tmp_path: Path, ranks: int
) -> None:
    """Streams that are left, wrong prompts and failing calls disturb no other call. After `lead`, all ranks call together."""
    llama = Llama.build(small.folder, small.tokenizer_path, 256, 3, device="cpu")
    with torch.no_grad():
        llama.model.tok_embeddings.weight[lead_worker.NAN_TOKEN] = torch.nan
    want = json.loads(json.dumps(lead_worker.answers(llama)))
    done = torchrun(ranks, lead_worker.__file__, tmp_path / "out", small.folder, small.tokenizer_path)
    assert done.returncode == 0, done.stderr
    rank0, rank1, *others = (json.loads((tmp_path / f"out.{rank}.json").read_text()) for rank in range(ranks))
    assert all(rank["taken"] > 0.35 * (rank0["taken"] + rank["taken"]) for rank in others)  # requests
    assert rank0["answers"] == want and rank0["ahead"] == want
    assert rank0["idle"] < 0.5 * lead_worker.IDLE_SECONDS  # CPU seconds
    assert (rank0["returned"], rank1["returned"]) == ("done", None)
    for name, parts in {
        "stream from before": ["InputError", "has been called since"],
        "nan": ["NonFiniteError: prompt 0"],
        "sampler": ["ZeroDivisionError: planted"],
        "sampled": ["InputError", "tokens that are not from 0 to 383"],
        "processor": ["InputError: prompt 0: its logits processor has failed: ZeroDivisionError: planted"],
        "banned": ["InputError: prompt 0: its logits processor has set all logits to -inf"],
        "scoring processor": ["InputError", "called its own model during a step"],
        "nested": ["InputError", "`lead` is running already"],
        "build": ["InputError", "build it before `lead`"],
        "forward": ["InputError", "call it on all ranks"],
        "other model": ["InputError", "another model", "make the call on all ranks"],
        "hook": ["InputError", "layers.0 has a hook", "make the call on all ranks"],
        "async hook": ["InputError", "layers.0 has a hook", "make the call on all ranks"],
        "score hook": ["InputError", "layers.0 has a hook", "make the call on all ranks"],
        "embed hook": ["InputError", "layers.0 has a hook", "make the call on all ranks"],
        "stream hook": ["InputError", "the model has been changed"],
        "fewer rows": ["InputError", "params.max_batch_size has been changed"],
        "tokens": ["right"],
    }.items():
        error = rank0["failures"].pop(name)
        assert [part for part in parts if part not in error] == [], (name, error)
    assert rank0["failures"] == {}
    assert "the weights have been changed on rank 0" in rank0["changed"]
    assert "rank 1 follows the calls of rank 0" in rank1["thread"]
    assert rank0["failed"] == "ZeroDivisionError: planted"
    assert rank1["failed"] == "LlamaError: rank 0 failed, so every rank stops: ZeroDivisionError: planted"
    assert "`lead`, in which it ran, has ended" in rank0["running"]
    assert (rank0["exit"], rank1["exit"]) == (3, 0)
    assert rank1["rank 1 fails"] == "OutOfMemoryError: planted"
    for error in (rank0["rank 1 fails"], *rank0["calls when rank 1 fails"]):
        assert re.search("LlamaError|InputError", error) and "rank 1 failed, so every rank stops: OutOfMemoryError" in error
    assert rank0["alike"] == [llama.generate([prompt], 3, temperature=0)[0] for prompt in lead_worker.ALIKE[:2]]
    for name in ("same call on all ranks", "after the failure"):
        assert rank0[name] == rank1[name] == llama.generate(lead_worker.PROMPTS[:2], 5, temperature=0)[0]


def test_one_process_simply_does_the_work(llama: Llama) -> None:
    assert llama.lead(lambda: llama.generate([[1, 5]], 3, temperature=0)) == llama.generate([[1, 5]], 3, temperature=0)


class Server:
    """A server on two ranks, under torchrun or as two processes that this test starts itself, which are replicas then."""

    def __init__(self, folder: Path, small: SimpleNamespace, tmp_path: Path, under_torchrun: bool) -> None:
        flags = "-m", "llama", "serve", "--ckpt_dir", folder, "--tokenizer_path", small.tokenizer_path, "--port", 0
        flags = (*flags, "--max_seq_len", 4096, "--device", "cpu")
        if under_torchrun:
            self.jobs = [Job(tmp_path, *TORCHRUN, 2, *flags)]
            return
        with socket.create_server(("127.0.0.1", 0)) as free:
            env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        self.jobs = [Job(tmp_path, *flags, "--model_parallel_size", 1, RANK=str(rank), **env) for rank in (0, 1)]

    def rank(self, number: int) -> int:
        """Return the id of the process of a rank."""
        for pid in (pid for job in self.jobs for pid in job.alive()):
            if f"RANK={number}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return pid
        raise AssertionError(f"rank {number} has ended")

    def ask(self, max_tokens: int, stream: bool) -> http.client.HTTPResponse:
        self.jobs[0].sees("serving")
        (port,) = re.findall(r"serving .* at http://127\.0\.0\.1:(\d+)", self.jobs[0].stderr)  # one line, of rank 0
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
        body = json.dumps({"prompt": [1, 5, 9], "max_tokens": max_tokens, "temperature": 0, "stream": stream, "logprobs": 0})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        return connection.getresponse()


def events_of(response: http.client.HTTPResponse) -> list[Any]:
    """Return the rest of the events of a stream, without [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.read().decode().splitlines()]
    return [json.loads(line) for line in lines if line not in ("", "[DONE]")]


@needs_proc
@needs_server
def test_a_server_on_two_ranks_answers_and_ends_when_told_or_when_a_rank_is_killed(
    small: SimpleNamespace, tmp_path: Path
) -> None:
    """SIGTERM to rank 0 lets it finish a stream, and all ranks exit with 0. If rank 1 is killed, in a step or while all ranks
    wait, answers end with an error, and rank 0 exits with 1."""
    output = small.weights["output.weight"].clone()
    output[:259] = 0  # no EOS, so that answers are long
    folder = write_shards(tmp_path / "endless", small.params, small.weights | {"output.weight": output})
    llama = Llama.build(folder, small.tokenizer_path, 256, 1, device="cpu")
    _, (values,) = llama.generate([[1, 5, 9]], 200, temperature=0, logprobs=True)  # type: ignore[misc]
    del llama

    def watch(what: str, server: Server) -> None:
        choice = json.loads(server.ask(200, stream=False).read())["choices"][0]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(values, abs=1e-3)
        follower = server.rank(1)
        if what == "idle":
            os.kill(follower, signal.SIGKILL)
        else:
            response = server.ask(1500 if what == "signal" else 4000, stream=True)
            response.readline()
            os.kill(*((server.rank(0), signal.SIGTERM) if what == "signal" else (follower, signal.SIGKILL)))
            *_, last = events_of(response)
            if what == "signal":
                assert last["choices"][0]["finish_reason"] == "length"
            else:
                assert "internal error" in last["error"]["message"]
        print(f"{what}: rank 0 had ended after {server.jobs[0].ends():.1f} s")
        for job in server.jobs[1:]:
            job.ends()
        assert server.jobs[0].process.returncode == (0 if what == "signal" else 1)
        assert ("another rank ended without a reason" in server.jobs[0].stderr) == (what != "signal")

    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        servers = {what: Server(folder, small, tmp_path, what != "idle") for what in ("signal", "step", "idle")}
        for server in servers.values():
            for job in server.jobs:
                stack.enter_context(job)
        list(pool.map(watch, servers.keys(), servers.values()))
