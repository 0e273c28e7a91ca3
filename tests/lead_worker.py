"""Make calls on rank 0, which the other ranks follow. test_leading.py runs this script on 2 and 4 ranks, and `answers` on one.

lead_worker.py OUT CKPT TOKENIZER: ranks 0 and 1 share a model, and so do ranks 2 and 3, as a second replica. Each rank
writes what it got to OUT.RANK.json.
"""

import asyncio
import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama import Llama, generation
from llama.backends.cuda_graphs import CapturedStep, CudaGraphsBackend
from llama.engine import async_copy
from llama.engine.following import MirroredScheduler
from llama.engine.forward import EngineLayer

PROMPTS = [[1, *range(5 + i, 8 + 3 * i)] for i in range(8)]
ALIKE = [[1, *range(5, 145), 50 + i] for i in range(8)]  # prompts that begin alike, so that they share the prefix cache
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "top_p": 0.95, "seed": 3},
    {"temperature": 0.7, "top_k": 7, "seed": 4},
    {"temperature": 0, "repetition_penalty": 3.0},
]
NAN_TOKEN = 383  # its embedding is NaN
IDLE_SECONDS = 1.5


def error_of(call: Callable[[], Any]) -> str:
    """Return the name and text of the error that the call raises."""
    try:
        return f"no error: {call()}"
    except Exception as e:
        return f"{type(e).__name__}: {e}"


def answers(llama: Llama) -> list[Any]:
    """Return what calls of many threads and of an event loop get at the same time. It must not depend on the ranks."""

    def stream(i: int) -> Any:
        prompt = [1, -7] if i % 7 == 3 else (ALIKE if i % 5 == 2 else PROMPTS)[i % 8]
        try:
            with contextlib.closing(llama.generate_stream([prompt], 4 + i % 9, **OPTIONS[i % 4])) as tokens:  # type: ignore[type-var]
                return [token.token for token in itertools.islice(tokens, 3 if i % 6 == 1 else None)]
        except Exception as e:
            return str(e)

    def texts() -> Any:
        return llama.text_completion(["The", "a", "sea"] * 4, 1.0, max_gen_len=9, seed=range(12), stop=["e", "t"], details=True)

    def processed() -> Any:
        lists: dict[str, Any] = dict(temperature=[0, 1.0, 1.5], max_gen_len=[4, 6, 8], seed=[1, 2, 3], min_new_tokens=2)
        return llama.generate(PROMPTS[:3], n=3, logits_processor=[even_only, None, even_only], frequency_penalty=1, **lists)[0]

    def scored() -> Any:
        tokens, logprobs = llama.generate(PROMPTS, 3, temperature=0, logprobs=True, echo=True)
        return tokens, [[round(value, 3) for value in row] for row in logprobs or []]

    def scores() -> Any:
        texts = ["The fox", "sea", "The quick brown fox jumps over the lazy dog", "The quick brown fox jumps over the lazy cat"]
        each = [llama.score([text], [" jumps"])[0] for text in texts]
        return [round(score.total, 2) for score in (*each, *llama.score(texts, [" jumps"] * 4))]

    def states() -> Any:
        embeddings = [llama.embed([prompt, ALIKE[0]], pooling) for prompt in PROMPTS[:3] for pooling in ("mean", "last")]
        return [round(value, 1) for value in torch.cat(embeddings).sum(1).tolist()]

    async def from_loop() -> Any:
        dialogs = [[{"role": "user", "content": text}] for text in ("hi", "[INST]", "sea")]
        left = llama.atext_completion_stream("He said", 1.0, max_gen_len=9, seed=1)
        cancelled = asyncio.create_task(llama.atext_completion(["no"], 0, max_gen_len=40))
        calls = [llama.achat_completion([dialog], 0, max_gen_len=5, details=True) for dialog in dialogs]  # type: ignore[list-item]
        async with left:
            first = await anext(left)
        cancelled.cancel()
        return [first, *await asyncio.gather(*calls)]

    work: list[Callable[[], Any]] = [*(lambda i=i: stream(i) for i in range(24))]  # type: ignore[misc]
    work[3:3] = [texts, processed, scored, scores, states, lambda: asyncio.run(from_loop())]
    with ThreadPoolExecutor(len(work)) as pool:
        return [*pool.map(lambda call: call(), work)]


def failures(llama: Llama, other: Llama, opened: Any) -> dict[str, str]:
    """Return the errors of calls that fail or are refused. A stream that runs meanwhile must get the tokens it gets alone."""
    (want,), _ = llama.generate(PROMPTS[:1], 40, temperature=0)
    running = llama.generate_stream(PROMPTS[:1], 40, temperature=0)
    got = [next(running).token]
    errors = {}

    def fails(name: str, call: Callable[[], Any]) -> None:
        errors[name] = error_of(call)
        got.append(next(running).token)

    fails("stream from before", lambda: list(opened))
    fails("nan", lambda: llama.generate([[1, NAN_TOKEN]], 5, temperature=0))
    sample_top_p, generation.sample_top_p = generation.sample_top_p, broken_sampler
    fails("sampler", lambda: llama.generate([[1, 5]], 5, temperature=1.0))
    generation.sample_top_p = lambda probs, p: torch.full((len(probs), 1), 10**6)
    fails("sampled", lambda: llama.generate([[1, 5]], 5, temperature=1.0))
    generation.sample_top_p = sample_top_p
    fails("processor", lambda: llama.generate([[1, 5]], 5, logits_processor=broken_processor))
    fails("banned", lambda: llama.generate([[1, 5]], 5, logits_processor=lambda _, logits: logits.fill_(-torch.inf)))
    fails("scoring processor", lambda: llama.generate([[1, 5]], 5, logits_processor=lambda *_: llama.score(["a"], [" b"])))
    fails("nested", lambda: llama.lead(lambda: None))
    fails("build", lambda: Llama.build(*sys.argv[2:], 64, 3, device="cpu"))
    fails("forward", lambda: llama.model(torch.tensor([[1, 5]]), 0))
    fails("other model", lambda: other.generate([[1, 5]], 5))
    handle = llama.model.layers[0].register_forward_hook(lambda *_: None)
    errors["hook"] = error_of(lambda: llama.generate([[1, 5]], 5))
    errors["async hook"] = error_of(lambda: llama.atext_completion(["a"]))
    errors["score hook"] = error_of(lambda: llama.score(["a"], [" b"]))
    errors["embed hook"] = error_of(lambda: llama.embed(["a"]))
    errors["stream hook"] = error_of(lambda: list(running))
    handle.remove()
    rest, _ = llama.generate([PROMPTS[0] + got], 40 - len(got), temperature=0)
    errors["tokens"] = "right" if got + rest[0] == want else f"{got} {rest}, not {want}"
    llama.model.params.max_batch_size = 1
    errors["fewer rows"] = error_of(lambda: llama.generate([[1, 5]], 5))
    llama.model.params.max_batch_size = 3
    return errors


def broken_sampler(probs: torch.Tensor, p: float) -> torch.Tensor:
    raise ZeroDivisionError("planted")


def even_only(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
    assert not dist.is_initialized() or dist.get_rank() == 0
    logits[1::2] = -torch.inf
    return logits


def broken_processor(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("planted")


def out_of_memory(*_: Any) -> torch.Tensor:
    raise torch.OutOfMemoryError("planted")


def wait_idle(llama: Llama, follower: int) -> float:
    """Wait longer than the timeout of the process group. Return the CPU seconds that the other rank used meanwhile."""

    def cpu_seconds() -> float:
        times = Path(f"/proc/{follower}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")

    before = cpu_seconds()
    time.sleep(IDLE_SECONDS)
    llama.generate([[1, 5]], 2)
    return cpu_seconds() - before


def decode_as_on_cuda(llama: Llama) -> None:
    """Decode in static memory, and start each decode step before the host reads the previous tokens."""
    run = CapturedStep.run

    def run_into_static_logits(step: CapturedStep) -> None:
        static_logits = step.logits
        run(step)
        step.logits = step.logits if static_logits is None else static_logits.copy_(step.logits)

    CapturedStep.run = run_into_static_logits  # type: ignore[method-assign]
    async_copy.supports_async = lambda device: True
    llama.engine.backend = CudaGraphsBackend()


def main(out: str, folder: str, tokenizer_path: str) -> None:
    llama, other = (Llama.build(folder, tokenizer_path, 256, 3, model_parallel_size=2, device="cpu") for _ in range(2))
    rank, results = dist.get_rank(), dict[str, Any]()
    pids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    for each in (llama, other):
        with torch.no_grad():
            each.model.tok_embeddings.weight[NAN_TOKEN] = torch.nan
    opened = llama.generate_stream(PROMPTS[:1], 9, temperature=0)
    next(opened)

    enqueue, taken = MirroredScheduler.enqueue, list[int]()
    MirroredScheduler.enqueue = lambda self, call, indices: (taken.extend(indices), enqueue(self, call, indices))[1]  # type: ignore

    def work() -> str:
        results["answers"] = answers(llama)
        results["failures"] = failures(llama, other, opened)
        results["idle"] = wait_idle(llama, pids[1])
        llama.model.norm.weight.data  # noqa: B018 - from now on, rank 0 cannot notice edits, so no rank may keep prefixes
        results["alike"] = [llama.generate([prompt], 3, temperature=0)[0] for prompt in ALIKE[:2]]
        with torch.no_grad():
            llama.model.norm.weight.mul_(1)
        results["changed"] = error_of(lambda: llama.generate([[1, 5]], 5))
        return "done"

    if rank:  # a call of another thread of a rank that follows
        timer = threading.Timer(1, lambda: results.update(thread=error_of(lambda: llama.generate([[1, 5]], 5))))
        timer.start()
    results["returned"] = llama.lead(work)
    results["taken"] = len(taken)
    if rank:
        with torch.no_grad():
            llama.model.norm.weight.mul_(1)
    decode_as_on_cuda(llama)
    results["ahead"] = llama.lead(lambda: answers(llama))
    results["same call on all ranks"] = llama.generate(PROMPTS[:2], 5, temperature=0)[0]

    def fail() -> None:
        results["running"] = llama.generate_stream(PROMPTS[:1], 40, temperature=0)
        next(results["running"])
        raise ZeroDivisionError("planted")

    results["failed"] = error_of(lambda: llama.lead(fail))
    if rank == 0:
        results["running"] = error_of(lambda: list(results["running"]))
    results["after the failure"] = llama.generate(PROMPTS[:2], 5, temperature=0)[0]
    try:
        llama.lead(lambda: sys.exit(3))
    except SystemExit as e:
        results["exit"] = e.code
    if rank:
        EngineLayer.swiglu = out_of_memory  # type: ignore[method-assign]
    calls: list[str] = []
    with ThreadPoolExecutor() as pool:
        call = lambda: llama.generate([[1, 5]], 5)  # noqa: E731
        results["rank 1 fails"] = error_of(lambda: llama.lead(lambda: calls.extend(pool.map(error_of, [call] * 3))))
    results["calls when rank 1 fails"] = calls
    Path(f"{out}.{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
