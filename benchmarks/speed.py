"""Measure the speed of this library and of other libraries, in turns and on the same weights. Each library is a "peer".

    python benchmarks/speed.py [--shape 1.1B|7B] [--runs 5] [--threads 2] [--peers transformers,openvino:int4,...]
        [--workloads prefill-512,decode-1,...] [--dtype bf16|f16|f32] [--device cpu|cuda] [--work FOLDER]
        [--ckpt FOLDER --tokenizer FILE] [--json FILE] [--plot FILE.svg]

The weights are random, in the shape of a known model, or come from --ckpt (one shard). Each peer runs in its own process.
Each run measures one workload on all peers, then the next workload. Before decode steps are timed, a plain read measures the
memory bandwidth, because other programs on the machine may reduce it. If the models do not fit into memory together, each run
loads each peer again. Decoding is greedy and continues past EOS.

    prefill-N       a prompt of N tokens, until the first new token
    decode-B        32 decode steps of B rows after prompts of 8 tokens, without the prefill
    context-N       16 decode steps of one row after a prompt of N tokens, without the prefill
    ragged          prompts of 16, 64, 128 and 512 tokens with 32 new tokens each, including the prefill

The peers are transformers, llama.cpp, openvino (OpenVINO GenAI, CPU only), ctranslate2 (CPU only) and reference (the decode
loop of facebookresearch/llama). A peer may have a variant, as in llama.cpp:Q8_0, openvino:int4, ctranslate2:int8 or, on a GPU,
ours:int8+compile. `ours` is this library; it comes first and may be left out.
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import SHAPES, make_checkpoint, make_tokenizer, peak_rss, process_environment, run_python
from peers import Job, peer_names
from report import plot, table

from llama import ModelArgs, Tokenizer
from llama.planning.estimate import cache_bytes
from llama.planning.free_memory import free_memory

DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
WORKLOADS = "prefill-512,decode-1,decode-4,decode-8,ragged,context-128,context-1024,context-4000"
DEFAULT_PEERS = {"cpu": "transformers,llama.cpp", "cuda": "ours:compile,ours,transformers"}
# Bytes of memory that a peer needs for each byte of its weights. On a GPU, the KV cache is added to the product.
MEMORY_PER_WEIGHT_BYTE = {"cpu": 1.3, "cuda": 1.1}
MIN_SECONDS = {"cpu": 0.5, "cuda": 0.2}  # minimum duration of a measurement; a shorter workload is repeated
CHECK_LENGTHS = range(9, 17)  # lengths, in tokens, of the prompts whose answers are compared between the peers
CHECK_NEW = 16  # new tokens in each answer that is compared between the peers


@dataclass(frozen=True)
class Workload:
    name: str
    lengths: tuple[int, ...]
    new: int
    timed: str  # the part that is timed: "prefill", "step" (one decode step) or "all"

    @staticmethod
    def parse(name: str) -> "Workload":
        family, _, number = name.partition("-")
        if family == "ragged":
            return Workload(name, (16, 64, 128, 512), 32, "all")
        if family not in ("prefill", "decode", "context") or not number.isdecimal():
            raise SystemExit(f"{name!r} is not a workload: give prefill-N, decode-N, context-N or ragged")
        n = int(number)
        return {
            "prefill": Workload(name, (n,), 1, "prefill"),
            "decode": Workload(name, (8,) * n, 33, "step"),
            "context": Workload(name, (n,), 17, "step"),
        }[family]

    def prompts(self, vocab_size: int) -> list[list[int]]:
        rng = random.Random(0)
        return [[rng.randrange(3, vocab_size) for _ in range(n)] for n in self.lengths]

    def seconds(self, times: list[list[float]]) -> float:
        """Return the median seconds of the timed part: the prefill, one decode step, or the whole workload.

        times: for each repetition, the seconds until all rows have their first new token, and the seconds for later tokens.
        """
        first, rest = (statistics.median(column) for column in zip(*times, strict=True))
        return {"prefill": first, "step": rest / max(1, self.new - 1), "all": first + rest}[self.timed]

    def n_tokens(self) -> int | None:
        """Return the number of tokens in the timed part; None if the table shows seconds instead of tokens/s."""
        return {"prefill": sum(self.lengths), "step": len(self.lengths), "all": None}[self.timed]


class Worker:
    """The process of a peer, which waits for its next request while other peers are measured."""

    def __init__(self, job: Job) -> None:
        self.peer, self.log = job.peer, tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "peers.worker", json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=process_environment(job.threads),
        )
        reply = self._read()
        self.load = {"seconds": reply["seconds"], "peak": reply["device_peak"] or peak_rss(self.process.pid)}

    def ask(self, prompts: list[list[int]], new: int, min_seconds: float) -> dict[str, Any]:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # if the process has ended, _read exits with its output
            self.process.stdin.write(json.dumps({"prompts": prompts, "new": new, "min_seconds": min_seconds}) + "\n")
            self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise SystemExit(f"{self.peer} ended with exit code {self.process.wait()}:\n{self.log.read()[-4000:]}")
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()


class Bandwidth:
    """Measure the memory bandwidth in bytes/s, as the median of 5 reads of 1 GB. On a GPU, measure copies instead of reads."""

    def __init__(self, device: str) -> None:
        self.data = torch.ones(250_000_000, device=device)
        self.copy = torch.empty_like(self.data) if device == "cuda" else None

    def __call__(self) -> float:
        return statistics.median(self._measure() for _ in range(5))

    def _measure(self) -> float:
        if self.copy is None:
            start = time.perf_counter()
            self.data.sum()
            return self.data.nbytes / (time.perf_counter() - start)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):  # a single copy takes half a millisecond, of which the launch is a large part
            self.copy.copy_(self.data)
        torch.cuda.synchronize()
        return 10 * 2 * self.data.nbytes / (time.perf_counter() - start)  # a copy reads and writes each byte


def measure(jobs: dict[str, Job], workloads: list[Workload], n_runs: int, vocab_size: int, together: bool) -> dict[str, Any]:
    """Measure all peers. Return a dict of "runs" (the measurements), "load" (load times and peak memory) and "agreement".

    "agreement" compares the tokens of each peer with this library's. together: True to keep all peers loaded during all runs;
    False to load one peer at a time, again in each run.
    """
    device = next(iter(jobs.values())).device
    bandwidth = Bandwidth(device)
    results: dict[str, Any] = {"load": {peer: [] for peer in jobs}, "agreement": {}, "runs": []}
    groups = [list(jobs)] if together else [[peer] for peer in jobs]
    workers: dict[str, Worker] = {}
    answers: dict[str, list[list[int]]] = {}
    try:
        for run, group in itertools.product(range(n_runs), groups):
            for peer in group:
                if peer not in workers:
                    workers[peer] = Worker(jobs[peer])
                    results["load"][peer].append(workers[peer].load)
                    answers[peer] = warm_up(workers[peer], workloads, vocab_size, jobs[peer].device)
                    results["agreement"][peer] = agreement(answers, peer)
            for workload, peer in itertools.product(workloads, group):
                bandwidth_now = bandwidth() if workload.timed == "step" else None
                times = workers[peer].ask(workload.prompts(vocab_size), workload.new, MIN_SECONDS[device])["times"]
                record = {"run": run, "workload": workload.name, "peer": peer, "seconds": workload.seconds(times)}
                results["runs"].append(record | {"bandwidth": bandwidth_now, "times": times})
                show_progress(f"run {run + 1} of {n_runs}: {peer}, {workload.name}")
            if not together:
                workers.pop(group[0]).close()
    finally:
        show_progress("")
        for worker in workers.values():
            worker.close()
    return results


def show_progress(progress: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{progress}\033[K", end="", file=sys.stderr, flush=True)


def warm_up(worker: Worker, workloads: list[Workload], vocab_size: int, device: str) -> list[list[int]]:
    """Return a peer's answers to the prompts that serve to compare peers.

    On a GPU, run each workload first, because the first run compiles kernels.
    """
    if device == "cuda":
        for workload in workloads:
            worker.ask(workload.prompts(vocab_size), workload.new, min_seconds=0)
    prompts = Workload("check", tuple(CHECK_LENGTHS), CHECK_NEW, "all").prompts(vocab_size)
    return worker.ask(prompts, CHECK_NEW, min_seconds=0)["tokens"]


def agreement(answers: dict[str, list[list[int]]], peer: str) -> dict[str, float]:
    """Compare a peer's answers with this library's, and return two shares.

    "first" is the share of answers with the same first token. "all" is the share of tokens before the first difference between
    the two answers. With random weights, two tokens often have almost equal logits, so rounding or quantization decides between
    them. But if most first tokens of a peer without quantization differ from this library's, the weights of the peer were
    converted wrongly, and the script exits with an error.
    """
    ours, n_same = next(iter(answers.values())), []
    for our_tokens, peer_tokens in zip(ours, answers[peer], strict=True):
        equal = (a == b for a, b in zip(our_tokens, peer_tokens, strict=True))
        n_same.append(sum(itertools.takewhile(bool, equal)))
    first = statistics.mean(n > 0 for n in n_same)
    if first < 0.5 and not re.search(":(Q|int)", peer):
        raise SystemExit(
            f"{peer}: only {first:.0%} of the first tokens equal this library's, and at least 50% must: the weights were "
            "converted wrongly; delete the converted files in --work, and they are written again"
        )
    return {"first": first, "all": sum(n_same) / (len(n_same) * CHECK_NEW)}


def library_versions(*packages: str) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in packages or ("torch", "transformers", "llama-cpp-python", "openvino-genai", "ctranslate2"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def machine_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1B", choices=SHAPES, help="model size, for random weights; default: 1.1B")
    parser.add_argument("--ckpt", type=Path, help="folder of a checkpoint with one shard; default: random weights")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.model of the checkpoint")
    parser.add_argument("--runs", type=int, default=5, help="measurements of each workload and peer; default: 5")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument(
        "--peers", help="libraries beside ours; default: " + "; on ".join(f"{d}: {p}" for d, p in DEFAULT_PEERS.items())
    )
    parser.add_argument("--workloads", default=WORKLOADS, help=f"default: {WORKLOADS}")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the stored one")
    parser.add_argument("--device", default="cpu", choices=DEFAULT_PEERS, help="default: cpu")
    parser.add_argument("--work", type=Path, help="folder that keeps all checkpoints; default: a temporary one")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--plot", type=Path, help="SVG file for a plot")
    a = parser.parse_args()
    if bool(a.ckpt) != bool(a.tokenizer):
        parser.error("give --ckpt and --tokenizer together, or neither")
    peers = (a.peers or DEFAULT_PEERS[a.device]).split(",")
    a.peers = peers if peers[0].startswith("ours") else ["ours", *peers]
    for name in a.peers:
        if name not in peer_names(a.device):
            parser.error(f"{name!r} is not a peer on {a.device}: give some of {', '.join(peer_names(a.device))}")
    a.workloads = [Workload.parse(name) for name in a.workloads.split(",")]
    return a


def main() -> None:
    a = parse_args()
    torch.set_num_threads(a.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = a.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        ckpt, tokenizer_path = (a.ckpt, a.tokenizer) if a.ckpt else (make_checkpoint(work, a.shape), make_tokenizer(work))
        stored = torch.load(ckpt / "consolidated.00.pth", map_location="cpu", weights_only=True, mmap=True)
        dtype = DTYPES[a.dtype] if a.dtype else str(stored["tok_embeddings.weight"].dtype).removeprefix("torch.")
        size = sum(w.numel() for w in stored.values()) * getattr(torch, dtype).itemsize
        rows = max(len(w.lengths) for w in a.workloads)
        context = max(max(CHECK_LENGTHS) + CHECK_NEW, *(max(w.lengths) + w.new for w in a.workloads))
        common = (str(ckpt), str(tokenizer_path), str(work / ckpt.name), dtype, a.device, a.threads, rows, context)
        jobs = {peer: Job(peer, *common) for peer in a.peers}
        step_bytes = {
            peer: run_python("-m", "peers.convert", json.dumps(asdict(job)), threads=a.threads)[0]["bytes"]
            for peer, job in jobs.items()
        }
        free, vocab_size = free_memory(torch.device(a.device)), Tokenizer(tokenizer_path).n_words
        cache_sizes = dict(max_batch_size=rows, max_seq_len=context, vocab_size=vocab_size)
        args = ModelArgs(**json.loads((ckpt / "params.json").read_text()) | cache_sizes)
        cache = cache_bytes(args, 1, getattr(torch, dtype)) if a.device == "cuda" else 0
        peer_bytes = MEMORY_PER_WEIGHT_BYTE[a.device] * size + cache
        together = free is None or peer_bytes * len(jobs) < free.bytes
        measurements = measure(jobs, a.workloads, a.runs, vocab_size, together)

    results = {
        "model": ckpt.name,
        "dtype": dtype,
        "bytes": size,
        "step_bytes": step_bytes,
        "device": a.device,
        "machine": machine_name(a.device),
        "threads": a.threads,
        "versions": library_versions(),
        "workloads": [{"name": w.name, "timed": w.timed, "ids": w.n_tokens()} for w in a.workloads],
        **measurements,
    }
    print("\n".join(table(results)))
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(results, indent=1))
    if a.plot:
        plot(results, a.plot)


if __name__ == "__main__":
    main()
